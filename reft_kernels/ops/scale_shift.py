"""The elementwise op family: h[rows] ← s ⊙ h[rows] + v, with a pool of its own.

RED (Wu et al. 2024, arXiv 2402.15179), IA3 and JoLA are of this form, which has no low-rank fold. There are
three members, each with an overload for every backend::

    scale_shift_          h[rows] ← s ⊙ h[rows] + v        in place, inference
    scale_shift           out of place, differentiable
    scale_shift_backward  gradients of `scale_shift`

===============  =============  ==================================================================
argument         shape, dtype   meaning
===============  =============  ==================================================================
h                [..., d]       hidden states, as `ops.schema` has them
scale_less_one   [P, d]         s − 1, so that a scale near 1 keeps its digits; float32 (float64 in a
                                float64 pool), contiguous
shift            [P, d]         v; the same dtype, contiguous
rows, tiles,     int32          a plan, as `ops.schema` has it; a span is (pool row, 1), or has rank 0
spans, offsets                  where its segment has nothing to do
===============  =============  ==================================================================

Rules for every backend, beside those of `ops.schema`: what is computed is (1 + scale_less_one) · h + shift in
float32 or wider, rounded once. Where scale_less_one is −1, s is 0, and the element becomes v whatever it was:
h is not multiplied, so Inf and NaN go, too (and dh is 0 there, whatever grad is). ds = Σ g ⊙ h and dv = Σ g
are summed in an order that the plan alone decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Plan, declared
from .autograd import selected
from .families import define, fake, fake_in_place, flattened, overloads, trace_as
from .schema import BACKENDS, NAMESPACE, _library


class ScaleRows(NamedTuple):
    """Rows of an elementwise pool: s − 1 and v of s ⊙ h + v, each [P, d]."""

    scale_less_one: Tensor
    shift: Tensor


_TABLES = f"{', '.join(f'Tensor {name}' for name in ScaleRows._fields)}, {declared(Plan)}"

_SCHEMAS = {
    "scale_shift_": f"(Tensor(a!) h, {_TABLES}) -> ()",
    "scale_shift": f"(Tensor h, {_TABLES}, Tensor offsets) -> Tensor",
    # grad like h; hs [n, d]: the rows of h before the edit, in the order of `rows` (rows < 0: anything).
    # Returns (dh like grad, dscale_less_one [P, d], dshift [P, d]); what is not needed has no elements.
    # Pool rows that no row used get zeros.
    "scale_shift_backward": (
        f"(Tensor grad, Tensor hs, {_TABLES}, Tensor offsets, bool need_h, bool need_pool)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}

define(_SCHEMAS)

SCALE_SHIFT_ = overloads("scale_shift_")
SCALE_SHIFT = overloads("scale_shift")
SCALE_SHIFT_BACKWARD = overloads("scale_shift_backward")


def _flat(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    before = 2 if name == "scale_shift_backward" else 1
    return flattened(function, before, ScaleRows, in_place=name == "scale_shift_")


def implement(backend: str, key: str, functions: dict[str, Callable[..., Any]]) -> None:
    """Adds a backend in Python: functions by the ops' names, which take `ScaleRows` and `Plan`."""
    for name, function in functions.items():
        _library.impl(f"{name}.{backend}", _flat(name, function), key)


def _fake_backward(
    grad: Tensor, hs: Tensor, pool: ScaleRows, plan: Plan, need_h: bool, need_pool: bool
) -> tuple[Tensor, ...]:
    dh = torch.empty_like(grad, memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    return (dh, *(torch.empty_like(t) if need_pool else t.new_empty(0) for t in pool))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    h, scale_less_one, shift, rows, *rest = inputs
    ctx.save_for_backward(selected(h, rows), scale_less_one, shift, rows, *rest)


def _register(backend: str) -> None:
    backward_op = SCALE_SHIFT_BACKWARD[backend]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        found = backward_op(grad, *ctx.saved_tensors, need[0], need[1] or need[2])
        return (*(it if wanted else None for it, wanted in zip(found, need)), *(None,) * (len(need) - 3))

    torch.library.register_autograd(
        f"{NAMESPACE}::scale_shift.{backend}", backward, setup_context=_save, lib=_library
    )
    backward_fake = _flat("scale_shift_backward", _fake_backward)
    trace_as(
        backend, {"scale_shift_": fake_in_place, "scale_shift": fake, "scale_shift_backward": backward_fake}
    )


for _backend in BACKENDS:
    _register(_backend)


class ScaleShiftInPlace(torch.autograd.Function):
    """`scale_shift` that edits h itself, as `InterveneInPlace` does and for the same h."""

    @staticmethod
    def forward(ctx, h, *tables_and_backend):
        """h, the tensors of a `ScaleRows` and a `Plan`, and the backend's name."""
        *tables, ctx.backend = tables_and_backend
        ctx.save_for_backward(selected(h, tables[len(ScaleRows._fields)]), *tables)
        SCALE_SHIFT_[ctx.backend](h, *tables[:-1])
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx, grad):
        need = ctx.needs_input_grad
        found = SCALE_SHIFT_BACKWARD[ctx.backend](grad, *ctx.saved_tensors, need[0], need[1] or need[2])
        return (*(it if wanted else None for it, wanted in zip(found, need)), *(None,) * (len(need) - 3))
