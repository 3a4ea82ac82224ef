"""The ops that give edited rows their old norm back: h' = y · ‖x‖ / ‖y‖, for x before the edits and y behind.

Steering that keeps the norm (`normalize` of RepE, repeng and EasySteer) stands behind an edit of any kind, so
it is two ops around the edits, in place of a variant of each. They have an overload for every backend::

    row_norms               ‖h[row]‖ of the rows that a plan names          before the edits, differentiable
    restore_norms_          h[row] ← h[row] · norm / ‖h[row]‖                behind them, in place, inference
    restore_norms           out of place, differentiable
    restore_norms_backward  gradients of `restore_norms`

==================  ===========  =====================================================================
argument            shape        meaning
==================  ===========  =====================================================================
h                   [..., d]     hidden states, as `ops.schema` has them
norms               [n]          ‖x‖, in the order of `rows`; float32 (float64 where h is float64)
rows, tiles, spans  int32        a plan, as `ops.schema` has it, without a pool: a span's rank says whether
                                 its segment keeps the norm (more than 0) or not (0); its first is not read
==================  ===========  =====================================================================

Rules for every backend, beside those of `ops.schema`: a norm is the Euclidean one of the row as it was
written, so of values rounded to h's dtype. It is summed so that no square overflows or vanishes, in an order
that d alone decides, and then rounded to the dtype of `norms`. It is 0 for padding and for rows that keep no
norm.

A row is not written where ‖y‖ equals its norm or is 0. So an edit that changes nothing leaves a row's bits. A
row of zeros has no direction to be scaled along: it stays one, and gives no gradient. Where both norms are
infinite the edited row stays as it is. Elsewhere Inf and NaN follow from the formula: NaN in x or y makes the
whole row NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import Plan, declared
from .autograd import selected
from .families import define, fake, fake_in_place, flattened, overloads, trace_as
from .schema import BACKENDS, NAMESPACE, _library

_TABLES = declared(Plan)

_SCHEMAS = {
    "row_norms": f"(Tensor h, {_TABLES}) -> Tensor",
    "restore_norms_": f"(Tensor(a!) h, Tensor norms, {_TABLES}) -> ()",
    "restore_norms": f"(Tensor h, Tensor norms, {_TABLES}) -> Tensor",
    # grad like h; hs [n, d]: the rows of h before they were scaled, in the order of `rows` (rows < 0:
    # anything). Returns (dh like grad, dnorms [n]).
    "restore_norms_backward": f"(Tensor grad, Tensor hs, Tensor norms, {_TABLES}) -> (Tensor, Tensor)",
}

define(_SCHEMAS)

ROW_NORMS = overloads("row_norms")
RESTORE_NORMS_ = overloads("restore_norms_")
RESTORE_NORMS = overloads("restore_norms")
RESTORE_NORMS_BACKWARD = overloads("restore_norms_backward")

#: How many arguments each op takes before the plan's.
_BEFORE = {"row_norms": 1, "restore_norms_": 2, "restore_norms": 2, "restore_norms_backward": 3}


def implement(backend: str, key: str, functions: dict[str, Any]) -> None:
    """Adds a backend in Python: functions by the ops' names, which take a `Plan`."""
    for name, function in functions.items():
        flat = flattened(function, _BEFORE[name], in_place=True)  # none of them takes offsets
        _library.impl(f"{name}.{backend}", flat, key)


def norm_dtype(h: Tensor) -> torch.dtype:
    """The dtype of norms of the rows of h."""
    return torch.float64 if h.dtype is torch.float64 else torch.float32


def _fake_norms(h: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return h.new_empty(rows.shape, dtype=norm_dtype(h))


def _fake_backward(grad: Tensor, hs: Tensor, norms: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad, memory_format=torch.contiguous_format), torch.empty_like(norms)


def _save_for_norms(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    h, rows, *_ = inputs
    ctx.shape = h.shape
    ctx.save_for_backward(selected(h, rows), rows, output)


def _norms_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = dnorm · x / norm; 0 where the norm is, as of rows of zeros, of padding, of rows that keep none."""
    hs, rows, norms = ctx.saved_tensors
    factor = torch.where(norms == 0, 0, grad / norms)[:, None]
    parts = torch.where(factor == 0, 0, hs.to(norms.dtype) * factor).to(hs.dtype)
    d = ctx.shape[-1]
    dh = hs.new_zeros(ctx.shape.numel() // d if d else 0, d)
    if len(dh):
        # Each row is the sum of one part and of zeros, so no order is asked for.
        dh = dh.index_add(0, rows.clamp(0, len(dh) - 1), parts)
    return dh.view(ctx.shape), None, None, None


def _save_for_restoring(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    h, norms, rows, *rest = inputs
    ctx.save_for_backward(selected(h, rows), norms, rows, *rest)


class RestoreNormsInPlace(torch.autograd.Function):
    """`restore_norms` that edits h itself, under the conditions of `autograd.InterveneInPlace`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, *arguments: Any) -> Tensor:
        """h, its norms, the tensors of a `Plan` without offsets, and the backend's name."""
        norms, rows, tiles, spans, ctx.backend = arguments
        ctx.save_for_backward(selected(h, rows), norms, rows, tiles, spans)
        RESTORE_NORMS_[ctx.backend](h, norms, rows, tiles, spans)
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*RESTORE_NORMS_BACKWARD[ctx.backend](grad, *ctx.saved_tensors), None, None, None, None)


def _register(backend: str) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*RESTORE_NORMS_BACKWARD[backend](grad, *ctx.saved_tensors), None, None, None)

    for name, formula, save in (
        ("row_norms", _norms_backward, _save_for_norms),
        ("restore_norms", backward, _save_for_restoring),
    ):
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}.{backend}", formula, setup_context=save, lib=_library
        )
    trace_as(
        backend,
        {
            "row_norms": _fake_norms,
            "restore_norms_": fake_in_place,
            "restore_norms": fake,
            "restore_norms_backward": _fake_backward,
        },
    )


for _backend in BACKENDS:
    _register(_backend)
