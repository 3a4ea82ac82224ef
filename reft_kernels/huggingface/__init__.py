"""The front door for Hugging Face models: `patch` lets a model run adapters."""

from .blocks import NotPatchable
from .patching import patch, unpatch
from .reft import Reft

__all__ = ["NotPatchable", "Reft", "patch", "unpatch"]
