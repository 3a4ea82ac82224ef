"""The systems by name, in the order of the tables."""

from __future__ import annotations

from reft_kernels import ops

from .base import System
from .eager_hooks import EagerHooks
from .lora import BareModel, MergedLora, MixedLora, UnmergedLora
from .ours import Ours
from .pyreft import Pyreft


def all_systems() -> dict[str, System]:
    """Name → system, the baseline first."""
    found: list[System] = [MergedLora(), BareModel()]
    for backend in ops.BACKENDS:
        found.append(Ours(backend))
        if backend != "reference":
            found.append(Ours(backend, fuse_norm=True))
    found += [EagerHooks(), Pyreft(), UnmergedLora(), MixedLora()]
    return {system.name: system for system in found}
