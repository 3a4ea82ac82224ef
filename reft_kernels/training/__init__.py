"""Training with Hugging Face's Trainer: a collator that knows prompts, and a Trainer that saves adapters."""

from .collator import ReftCollator
from .trainer import ReftTrainer

__all__ = ["ReftCollator", "ReftTrainer"]
