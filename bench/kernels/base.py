"""What a system is that does the op: a name, what it can't do, and the call that is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import KernelCase, Problem

EPS = 1e-6


def rms_norm(h: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as Llama's module has it: in float32, rounded, then times the weight."""
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)


class System:
    """A way of doing the op.

    `single`: it serves one adapter only, so it is checked with all rows on that one.
    `only_named`: it is measured where it is named, not where all systems are.
    """

    name = ""
    single = False
    only_named = False

    def why_not(self, case: KernelCase, device: str) -> str | None:
        """Why it can't do a case on a device, or None."""
        return None

    def start(self) -> None:
        """Called once before the first use in a case."""

    def context(self) -> contextlib.AbstractContextManager:
        """Entered around every use."""
        return contextlib.nullcontext()

    def forward(self, problem: Problem) -> Callable[[], Any]:
        """The call that is timed; edits problem.h in place or makes a new one, as the system does."""
        raise NotImplementedError

    def norm(self, problem: Problem) -> Callable[[], Tensor]:
        """The same with the norm of all rows after it, which the call returns; torch's own sequence here."""
        edit, weight = self.forward(problem), problem.weight

        def call() -> Tensor:
            edited = edit()
            return rms_norm(problem.h if edited is None else edited, weight)

        return call

    def differentiable(self, problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(output, leaves): a forward with autograd; the leaves are h and the adapters' D, U and c."""
        raise NotImplementedError

    def output(self, problem: Problem) -> Tensor:
        """[T, d] of a forward or norm, computed without changing problem.h."""
        kept = problem.h
        problem.h = kept.clone()
        try:
            with self.context(), torch.no_grad():
                result = getattr(self, problem.case.direction)(problem)()
            return problem.h if result is None else result
        finally:
            problem.h = kept

    def backward(self, problem: Problem) -> Callable[[], Any]:
        with self.context():
            out, leaves = self.differentiable(problem)
        return lambda: torch.autograd.grad(out, leaves, problem.gradient, retain_graph=True)

    def backward_ops(self, problem: Problem) -> Callable[[], Any]:
        """The same as a graph is to hold it: where a system can, the ops themselves, without autograd."""
        return self.backward(problem)
