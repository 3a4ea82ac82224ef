"""What the launch code asks of its arguments beside `ops.checks`. Before anything is written."""

from __future__ import annotations

from torch import Tensor

from ..arguments import Plan
from ..schema import TILE


def row_stride(h: Tensor, name: str) -> int:
    """The one stride between the rows of h.view(-1, d); ValueError where there is none."""
    if h.is_contiguous() and h.dim() and h.numel():
        return h.shape[-1]
    if h.dim() < 1 or h.shape[-1] < 1:
        raise ValueError(f"{name}: must be [..., d] with d ≥ 1, shape was {list(h.shape)}")
    if h.shape[-1] > 1 and h.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, strides were {h.stride()}")
    if not h.numel():
        return h.shape[-1]
    outer = [(size, stride) for size, stride in zip(h.shape[:-1], h.stride()[:-1]) if size != 1]
    for (_, stride), (inner_size, inner_stride) in zip(outer, outer[1:]):
        if stride != inner_size * inner_stride:
            raise ValueError(
                f"{name}: its leading dimensions must collapse to rows with one stride; shape "
                f"{list(h.shape)} with strides {h.stride()} does not"
            )
    return outer[-1][1] if outer else h.shape[-1]


def check_cover(h: Tensor, plan: Plan) -> None:
    """Refuses a plan that can't name every row of h. It is not read back."""
    n_rows, rows, tiles = h.numel() // h.shape[-1], plan.rows.shape[0], plan.tiles.shape[0]
    named = min(rows, TILE * tiles)
    if named < n_rows:
        raise ValueError(
            f"rows, tiles: must name each of the {n_rows} rows of h, since all are normed (see "
            f"reft_kernels.plan.cover); there is room for {named} in {rows} rows and {tiles} tiles"
        )


def readable(grad: Tensor) -> Tensor:
    """grad, or a contiguous copy where autograd made one without rows (an expanded scalar, say)."""
    try:
        row_stride(grad, "grad")
    except ValueError:
        return grad.contiguous()
    return grad
