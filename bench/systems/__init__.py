"""Whole models: the systems that `reft-bench overhead` and `train` compare, one file each."""

from __future__ import annotations

from .base import BASELINE, CONTROL, Runner, Setup, System, Unable
from .registry import all_systems

__all__ = ["BASELINE", "CONTROL", "Runner", "Setup", "System", "Unable", "all_systems"]
