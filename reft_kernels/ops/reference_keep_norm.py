"""The reference backend of the ops that keep norms: plain torch in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import Plan
from .checks import check_norms
from .keep_norm import implement, norm_dtype
from .reference import _segments, wide


def row_norms(h: Tensor, plan: Plan) -> Tensor:
    flat = h.reshape(-1, h.shape[-1])
    norms = torch.zeros(plan.rows.shape, dtype=norm_dtype(h), device=h.device)
    for places, index, _ in _segments(plan):
        norms[places] = flat[index].to(wide(h)).square().sum(-1).sqrt().to(norms.dtype)
    return norms


def _scaled(
    flat: Tensor, hs: Tensor | None, norms: Tensor, plan: Plan
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(places, indices of rows, rows y in float64, ‖y‖, norm / ‖y‖) of each segment.

    The factor is 1 where a row stays as it is. hs: the rows if they are not those of `flat`.
    """
    dtype = wide(flat)
    for places, index, _ in _segments(plan):
        y = (flat[index] if hs is None else hs[places]).to(dtype)
        length, norm = y.square().sum(-1).sqrt(), norms[places]
        stays = (length == 0) | (length.to(norm.dtype) == norm)
        yield places, index, y, length, torch.where(stays, 1.0, norm.to(dtype) / length)


def restore_norms_(h: Tensor, norms: Tensor, plan: Plan) -> None:
    check_norms(h, norms, plan)
    flat = h.view(-1, h.shape[-1])
    edits = [
        (index[factor != 1], (y * factor[:, None]).to(h.dtype)[factor != 1])
        for _, index, y, _, factor in _scaled(flat, None, norms, plan)
    ]
    for index, value in edits:
        flat[index] = value


def restore_norms(h: Tensor, norms: Tensor, plan: Plan) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    restore_norms_(out, norms, plan)
    return out


def restore_norms_backward(grad: Tensor, hs: Tensor, norms: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """dh = norm / ‖y‖ · (g − y (y·g) / ‖y‖²) and dnorm = y·g / ‖y‖; both 0 where y is."""
    check_norms(grad, norms, plan)
    dh, dnorms = grad.clone(memory_format=torch.contiguous_format), torch.zeros_like(norms)
    flat = grad.reshape(-1, grad.shape[-1])
    for places, index, y, length, factor in _scaled(flat, hs, norms, plan):
        g, zero = flat[index].to(y.dtype), length == 0
        along = (y * g).sum(-1) / length
        value = factor[:, None] * (g - y * (along / length)[:, None])
        dh.view(flat.shape)[index] = value.masked_fill(zero[:, None], 0).to(grad.dtype)
        dnorms[places] = along.masked_fill(zero, 0).to(norms.dtype)
    return dh, dnorms


implement(
    "reference",
    "CompositeExplicitAutograd",
    {
        "row_norms": row_norms,
        "restore_norms_": restore_norms_,
        "restore_norms": restore_norms,
        "restore_norms_backward": restore_norms_backward,
    },
)
