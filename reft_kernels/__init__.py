"""reft_kernels: fused representation finetuning (ReFT) for Hugging Face models."""

from . import functional
from .adapter import Adapter
from .config import ReftConfig
from .ops import BackendUnavailable, backend, current_backend
from .patch import NotPatchable, Reft, patch, unpatch
from .plan import Plan, make_plan
from .pool import Fold, Pool, PoolFull, Span
from .positions import Positions

__version__ = "0.1.0.dev0"
__all__ = [
    "Adapter",
    "BackendUnavailable",
    "Fold",
    "NotPatchable",
    "Plan",
    "Pool",
    "PoolFull",
    "Positions",
    "Reft",
    "ReftConfig",
    "Span",
    "backend",
    "current_backend",
    "functional",
    "make_plan",
    "patch",
    "unpatch",
]
