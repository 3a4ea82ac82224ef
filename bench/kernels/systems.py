"""The systems that do the op, each as a function of a case's problem, and how far each is from the reference.

What is checked is h after the edit, or the gradients (dh, dD, dU, dc) of all adapters, flat, in fp64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

import reft_kernels as rk
from reft_kernels import ops

from .base import EPS, System, rms_norm
from .cases import DTYPES, KernelCase, Problem
from .peers import ShrinkExpand, VllmLora
from .ways import WAYS, in_way

#: Largest distance to the reference's output over the size of the reference's edit (or gradient). A system
#: that does nothing stands at 1. What bf16 and fp16 allow is the rounding of h itself.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


class Ours(System):
    """This package with one backend: the in-place op for inference, as the patch calls it; the functional one
    for training."""

    def __init__(self, backend: str) -> None:
        self.name = self.backend = backend

    def why_not(self, case, device):
        return ops.why_not(self.backend, torch.device(device).type)

    def context(self):
        return rk.backend(self.backend)

    def forward(self, problem):
        op, plan = ops.INTERVENE_[self.backend], problem.plan
        arguments = (problem.h, *problem.pool_tensors(), *plan[:-1])
        return lambda: op(*arguments)

    def norm(self, problem):
        op, plan = ops.INTERVENE_NORM_[self.backend], problem.plan  # which names all rows
        arguments = (problem.h, *problem.pool_tensors(), *plan[:-1])
        arguments += (problem.weight, None, EPS, int(ops.Norm.ROUND))
        return lambda: op(*arguments)

    def backward_ops(self, problem):
        """The op, with h's selected rows as the forward keeps them."""
        op, (rows, *rest) = ops.INTERVENE_BACKWARD[self.backend], problem.plan_tensors()
        arguments = (problem.gradient, problem.h[rows.long()], *problem.pool_tensors(), rows, *rest)
        return lambda: op(*arguments, True, True)

    def differentiable(self, problem, single=False):
        *floats, kind = problem.pool_tensors()
        leaves = tuple(t.detach().clone().requires_grad_() for t in (problem.h, *floats))
        op = ops.INTERVENE[self.backend]
        return op(*leaves, kind, *problem.plan_tensors(single)), leaves


class Way(Ours):
    """The native backend in another way than its usual one, to find out which is the faster."""

    only_named = True

    def __init__(self, way: str) -> None:
        super().__init__("native")
        self.name = f"native {way}"
        self.number, self.directions = WAYS[way]

    def why_not(self, case, device):
        if torch.device(device).type != "cuda":
            return "only the CUDA kernels have other ways than the usual one"
        if case.direction not in self.directions:
            return f"is for {' and '.join(self.directions)}, not for {case.direction}"
        return super().why_not(case, device)

    @contextlib.contextmanager
    def context(self):
        with super().context(), in_way(self.number):
            yield


class Functional(Ours):
    """The best backend through rk.functional.intervene_: the op, and the Python of a public call.

    With a norm: torch's own after it, beside the op that does both.
    """

    def __init__(self) -> None:
        self.name = "rk.functional"

    def why_not(self, case, device):
        return "times the in-place call only" if case.direction == "backward" else None

    def context(self):
        return contextlib.nullcontext()

    def forward(self, problem):
        h, pool, plan = problem.h, problem.pool, problem.plan
        return lambda: rk.functional.intervene_(h, pool, plan)

    def norm(self, problem):
        return System.norm(self, problem)


def _eager(h: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    return h + (h @ down.T + bias) @ up


def _eager_norm(h: Tensor, down: Tensor, up: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(_eager(h, down, up, bias), weight)


class Eager(System):
    """torch's own sequence with a single adapter: what the edit costs where there is nothing to choose."""

    name, single = "eager", True
    function: Callable[..., Tensor] = staticmethod(_eager)
    norm_function: Callable[..., Tensor] = staticmethod(_eager_norm)

    def _weights(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        return problem.down[0], problem.up[0], problem.bias[0]

    def forward(self, problem):
        h, weights, function = problem.h, self._weights(problem), self.function
        return lambda: function(h, *weights)

    def norm(self, problem):
        h, weights, function = problem.h, (*self._weights(problem), problem.weight), self.norm_function
        return lambda: function(h, *weights)

    def differentiable(self, problem):
        leaves = tuple(t.detach().clone().requires_grad_() for t in (problem.h, *self._weights(problem)))
        return self.function(*leaves), leaves

    def backward_ops(self, problem):
        """Four products and a sum, with the inner values as the forward keeps them."""
        if type(self) is not Eager:
            return self.backward(problem)
        h, grad, (down, up, bias) = problem.h, problem.gradient, self._weights(problem)
        inner = h @ down.T + bias

        def call() -> tuple[Tensor, ...]:
            of_inner = grad @ up.T
            return grad + of_inner @ down, of_inner.T @ h, inner.T @ grad, of_inner.sum(0)

        return call


class Compiled(Eager):
    """The same sequence under torch.compile, for the case's own shape."""

    name = "compiled"

    def start(self):
        # Donated buffers forbid a second backward through one forward, which is what is timed.
        functorch_config.donated_buffer = False
        torch._dynamo.reset()
        self.function = torch.compile(_eager, dynamic=False)
        self.norm_function = torch.compile(_eager_norm, dynamic=False)


def _gathered(h: Tensor, down: Tensor, up: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    inner = torch.baddbmm(bias[index].unsqueeze(1), h.unsqueeze(1), down[index].transpose(1, 2))
    return h + torch.bmm(inner, up[index]).squeeze(1)


class Gather(System):
    """Gather and bmm: every row fetches its adapter's D, U and c, then two batched products."""

    name = "gather+bmm"

    def forward(self, problem):
        arguments = (problem.h, problem.down, problem.up, problem.bias, problem.index)
        return lambda: _gathered(*arguments)

    def differentiable(self, problem):
        floats = (problem.h, problem.down, problem.up, problem.bias)
        leaves = tuple(t.detach().clone().requires_grad_() for t in floats)
        return _gathered(*leaves, problem.index), leaves


def all_systems() -> dict[str, System]:
    """Name → system, the baseline first."""
    found = [
        Eager(),
        *(Ours(name) for name in ops.BACKENDS),
        *(Way(name) for name in WAYS),
        Functional(),
        Compiled(),
        Gather(),
        ShrinkExpand(),
        VllmLora(),
    ]
    return {system.name: system for system in found}


BASELINE, CONTROL, GATHER = "eager", "eager (A/A)", Gather.name


def _distance(got: Tensor, wanted: Tensor, origin: Tensor | float) -> float:
    """‖got − wanted‖ / ‖wanted − origin‖ in fp64; Inf where got is not finite."""
    got, wanted = got.double(), wanted.double()
    if not torch.isfinite(got).all():
        return float("inf")
    size = (wanted - origin).norm().item()
    return (got - wanted).norm().item() / max(size, 1e-300)


def check(system: System, problem: Problem) -> float:
    """The system's error against the reference backend: of the edit, or the worst of the four gradients."""
    reference = Ours("reference")
    case = problem.case
    if case.direction != "backward":
        h, plan = problem.h.clone(), problem.single_plan if system.single else problem.plan
        with reference.context():
            rk.functional.intervene_(h, problem.pool, plan)
        wanted, origin = h, problem.h
        if case.direction == "norm":
            wanted, origin = rms_norm(h, problem.weight), rms_norm(origin, problem.weight)
        return _distance(system.output(problem), wanted, origin.double())
    out, leaves = reference.differentiable(problem, single=system.single)
    wanted = torch.autograd.grad(out, leaves, problem.gradient)
    errors = []
    for got in (system.backward(problem)(), system.backward_ops(problem)()):
        errors.append(_distance(got[0], wanted[0], problem.gradient.double()))
        for mine, theirs in zip(got[1:], wanted[1:]):
            # A single adapter's gradients are those of the pool's first rows.
            theirs = theirs[: case.rank] if system.single else theirs
            errors.append(_distance(mine.reshape(theirs.shape), theirs, 0.0))
    return max(errors)


def tolerance(case: KernelCase) -> float:
    assert case.dtype in DTYPES
    return TOLERANCE[case.dtype]
