"""The reference backend of the elementwise op: plain torch in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Plan
from .reference import _segments, wide
from .scale_shift import ScaleRows, implement


def _edited(x: Tensor, scale_less_one: Tensor, shift: Tensor) -> Tensor:
    return torch.where(scale_less_one == -1, shift, x * (1 + scale_less_one) + shift)


def scale_shift_(h: Tensor, pool: ScaleRows, plan: Plan) -> None:
    flat, dtype = h.view(-1, h.shape[-1]), wide(h)
    edits = []
    for _, index, span in _segments(plan):
        scale_less_one, shift = (t[span.start].to(dtype) for t in pool)
        edits.append((index, _edited(flat[index].to(dtype), scale_less_one, shift).to(h.dtype)))
    for index, value in edits:
        flat[index] = value


def scale_shift(h: Tensor, pool: ScaleRows, plan: Plan) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    scale_shift_(out, pool, plan)
    return out


def scale_shift_backward(
    grad: Tensor, hs: Tensor, pool: ScaleRows, plan: Plan, need_h: bool, need_pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dh = s ⊙ g, ds = Σ g ⊙ h, dv = Σ g."""
    dtype, flat = wide(grad), grad.reshape(-1, grad.shape[-1])
    dh = grad.clone(memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    sums = [torch.zeros_like(t, dtype=dtype) if need_pool else t.new_empty(0) for t in pool]
    for places, index, span in _segments(plan):
        g = flat[index].to(dtype)
        if need_h:
            scale_less_one = pool.scale_less_one[span.start].to(dtype)
            value = torch.where(scale_less_one == -1, 0.0, g * (1 + scale_less_one))
            dh.view(-1, grad.shape[-1])[index] = value.to(grad.dtype)
        if need_pool:
            sums[0][span.start] += (g * hs[places].to(dtype)).sum(0)
            sums[1][span.start] += g.sum(0)
    return dh, sums[0].to(pool.shift.dtype), sums[1].to(pool.shift.dtype)


implement(
    "reference",
    "CompositeExplicitAutograd",
    {
        "scale_shift_": scale_shift_,
        "scale_shift": scale_shift,
        "scale_shift_backward": scale_shift_backward,
    },
)
