"""reft_kernels: fused representation finetuning (ReFT) for Hugging Face models."""

from . import functional
from .ops import BackendUnavailable, backend, current_backend
from .plan import Plan, make_plan
from .pool import Fold, Pool, PoolFull, Span

__version__ = "0.1.0.dev0"
__all__ = [
    "BackendUnavailable",
    "Fold",
    "Plan",
    "Pool",
    "PoolFull",
    "Span",
    "backend",
    "current_backend",
    "functional",
    "make_plan",
]
