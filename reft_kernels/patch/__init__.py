"""Patching Hugging Face models. The only part of the package that knows transformers."""

from .blocks import NotPatchable
from .reft import Reft, patch, unpatch

__all__ = ["NotPatchable", "Reft", "patch", "unpatch"]
