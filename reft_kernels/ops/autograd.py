"""The autograd formula of `intervene`, one for all backends, and its in-place form for training.

Kept for backward are the selected rows of h (before the edit) and nothing else of h's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import PoolRows
from .schema import BACKENDS, INTERVENE_, INTERVENE_BACKWARD, NAMESPACE, _library

#: Where a plan's rows stand among the tensors of pool and plan.
_ROWS = len(PoolRows._fields)


def selected(h: Tensor, rows: Tensor) -> Tensor:
    """The rows of h [..., d] that a plan names, [n, d]; anything where they are padding."""
    flat = h.reshape(-1, h.shape[-1])
    if flat.shape[0] == 0:  # only padding can name rows of an empty h
        return flat.new_zeros(rows.shape[0], flat.shape[1])
    return flat.index_select(0, rows.clamp(0, flat.shape[0] - 1))


def _register(backend: str) -> None:
    backward_op = INTERVENE_BACKWARD[backend]

    def setup_context(ctx, inputs, output) -> None:
        h, *tables = inputs
        ctx.save_for_backward(selected(h, tables[_ROWS]), *tables)

    def backward(ctx, grad):
        need = ctx.needs_input_grad
        dh, ddown, dup, dbias = backward_op(grad, *ctx.saved_tensors, need[0], need[1] or need[2] or need[3])
        return (
            dh if need[0] else None,
            ddown if need[1] else None,
            dup if need[2] else None,
            dbias if need[3] else None,
            *(None,) * (len(need) - 4),
        )

    torch.library.register_autograd(
        f"{NAMESPACE}::intervene.{backend}", backward, setup_context=setup_context, lib=_library
    )


for _backend in BACKENDS:
    _register(_backend)


class InterveneInPlace(torch.autograd.Function):
    """`intervene` that edits h itself: autograd sees h change, and no second h is made.

    For h that is not a view and that nobody saved for backward, such as a decoder block's fresh output.
    """

    @staticmethod
    def forward(ctx, h, *tables_and_backend):
        """h, the tensors of a `PoolRows` and a `Plan`, and the backend's name."""
        *tables, ctx.backend = tables_and_backend
        ctx.save_for_backward(selected(h, tables[_ROWS]), *tables)
        INTERVENE_[ctx.backend](h, *tables[:-1])
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx, grad):
        need = ctx.needs_input_grad
        dh, ddown, dup, dbias = INTERVENE_BACKWARD[ctx.backend](
            grad, *ctx.saved_tensors, need[0], need[1] or need[2] or need[3]
        )
        return (
            dh if need[0] else None,
            ddown if need[1] else None,
            dup if need[2] else None,
            dbias if need[3] else None,
            *(None,) * (len(need) - 4),
        )
