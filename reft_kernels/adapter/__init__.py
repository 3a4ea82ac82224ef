"""Adapters: interventions with their parameters, before anything is laid into a pool."""

from ..checkpoint import BaseModel
from .adapter import Adapter
from .autoencoder import sae_features
from .config import SUBSPACE_MARK, ReftConfig
from .convert import convert
from .intervention import Drawn, Intervention
from .method import Method, Option, register_method, unregister_method
from .saved_modules import SavedModules
from .subspaces import Subspace

__all__ = [
    "SUBSPACE_MARK",
    "Adapter",
    "BaseModel",
    "Drawn",
    "Intervention",
    "Method",
    "Option",
    "ReftConfig",
    "SavedModules",
    "Subspace",
    "convert",
    "register_method",
    "sae_features",
    "unregister_method",
]
