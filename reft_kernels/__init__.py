"""reft_kernels: fused representation finetuning (ReFT) for Hugging Face models."""

from typing import TYPE_CHECKING, Any

from . import functional
from .adapter import Adapter, Method, Option, ReftConfig, register_method, sae_features, unregister_method
from .batch import Sequence
from .huggingface import NotPatchable, Reft, patch, unpatch
from .ops import BackendUnavailable, backend, current_backend
from .plan import Plan, make_plan
from .pool import Fold, Pool, PoolFull, Span
from .positions import Positions
from .scale_pool import ScaleFold, ScalePool

if TYPE_CHECKING:
    from .training import ReftCollator, ReftTrainer

__version__ = "0.1.0.dev0"
__all__ = [
    "Adapter",
    "BackendUnavailable",
    "Fold",
    "Method",
    "NotPatchable",
    "Option",
    "Plan",
    "Pool",
    "PoolFull",
    "Positions",
    "Reft",
    "ReftCollator",
    "ReftConfig",
    "ReftTrainer",
    "ScaleFold",
    "ScalePool",
    "Sequence",
    "Span",
    "backend",
    "current_backend",
    "functional",
    "make_plan",
    "patch",
    "register_method",
    "sae_features",
    "unpatch",
    "unregister_method",
]


def __getattr__(name: str) -> Any:
    """Training is imported when first asked for: transformers' Trainer takes seconds and accelerate."""
    if name in ("ReftCollator", "ReftTrainer"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What `dir` and completion show: the training classes too, and nothing of typing's."""
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING"})
