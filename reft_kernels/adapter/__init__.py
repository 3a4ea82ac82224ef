"""Adapters: interventions with their parameters, before anything is laid into a pool."""

from .adapter import Adapter
from .config import ReftConfig
from .heads import Heads
from .intervention import Intervention

__all__ = ["Adapter", "Heads", "Intervention", "ReftConfig"]
