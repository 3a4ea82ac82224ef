"""The reference backend of the edit with a source for each row: plain torch in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Plan, PoolRows
from .checks import check_source
from .reference import edit_rows, gradients
from .source import implement


def intervene_source_(h: Tensor, source: Tensor, pool: PoolRows, plan: Plan) -> None:
    check_source(source, pool, plan)
    edit_rows(h, pool, plan, source)


def intervene_source(h: Tensor, source: Tensor, pool: PoolRows, plan: Plan) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    intervene_source_(out, source, pool, plan)
    return out


def intervene_source_backward(
    grad: Tensor, hs: Tensor, source: Tensor, pool: PoolRows, plan: Plan, need_h: bool, need_pool: bool
) -> tuple[Tensor, ...]:
    """As `reference.intervene_backward`, and dsource = p."""
    check_source(source, pool, plan)
    return gradients(grad, hs, pool, plan, need_h, need_pool, source)


implement(
    "reference",
    "CompositeExplicitAutograd",
    {
        "intervene_source_": intervene_source_,
        "intervene_source": intervene_source,
        "intervene_source_backward": intervene_source_backward,
    },
)
