"""This package: rk.patch with a backend, the norms apart or fused; a different adapter for each row."""

from __future__ import annotations

import reft_kernels as rk
from reft_kernels import ops

from . import models
from .base import Runner, Setup, System


def names_of(setup: Setup, single: bool = False) -> list[str]:
    """The adapter's name for each row of the batch."""
    return [f"a{0 if single else number}" for number in setup.adapter_of]


class OursRunner(Runner):
    def __init__(self, setup: Setup, backend: str, single: bool = False, fuse_norm: bool = False) -> None:
        super().__init__(setup, models.twin(setup.merged))
        self.backend = backend
        # With fused norms the patch does work of the model's own, and what that saves can't be timed apart.
        self.attributed = () if fuse_norm else ("reft_kernels",)
        reft = rk.patch(self.model, fuse_norm=fuse_norm)
        for number, adapter in enumerate(setup.adapters):
            reft.add_adapter(f"a{number}", adapter)
        self._arguments = {"adapter_names": names_of(setup, single)}

    def context(self):
        return rk.backend(self.backend)

    def arguments(self):
        return self._arguments


class Ours(System):
    def __init__(self, backend: str, fuse_norm: bool = False) -> None:
        self.backend, self.fuse_norm = backend, fuse_norm
        self.name = f"reft_kernels {backend}" + (" fused" if fuse_norm else "")

    def why_not(self, setup):
        return ops.why_not(self.backend, setup.device.type)

    def build(self, setup):
        return OursRunner(setup, self.backend, fuse_norm=self.fuse_norm)
