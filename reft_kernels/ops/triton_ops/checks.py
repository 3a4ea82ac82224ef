"""What the launch code asks of its arguments. Before anything is written.

Every launch pays for this, so a check is one chain of comparisons where the arguments are right, and another
function says what is wrong where they are not. Nothing is remembered from call to call: a tensor may be
resized in place, and an address handed on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..schema import TILE, Norm

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TWO, _THREE = torch.Size((2,)), torch.Size((3,))
_NORMS = int(Norm.CENTRED | Norm.PLUS_ONE | Norm.ROUND)


def row_stride(h: Tensor, name: str) -> int:
    """The one stride between the rows of h.view(-1, d); ValueError where there is none."""
    if h.dim() > 0 and h.shape[-1] > 0 and h.is_contiguous():
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


def check(
    h: Tensor, name: str, down: Tensor, up: Tensor, bias: Tensor, kind: Tensor, rows: Tensor, tiles: Tensor,
    spans: Tensor, offsets: Tensor | None = None,
) -> None:  # fmt: skip
    """Refuses what the kernels would misread; `name` is what the caller knows h by."""
    h_dtype, dtype, shape, device, ints = h.dtype, down.dtype, down.shape, h.get_device(), torch.int32
    if not (
        h_dtype in _DTYPES
        and (dtype is h_dtype or dtype is torch.float32)
        and up.dtype is dtype
        and bias.dtype is torch.float32
        and kind.dtype is ints
        and rows.dtype is ints
        and tiles.dtype is ints
        and spans.dtype is ints
        and h.dim() > 0
        and len(shape) == 2
        and (shape[0], h.shape[-1]) == shape == up.shape
        and shape[:1] == bias.shape == kind.shape
        and rows.dim() == 1
        and tiles.shape[1:] == _THREE
        and spans.shape[1:] == _TWO
        and down.is_contiguous()
        and up.is_contiguous()
        and bias.is_contiguous()
        and kind.is_contiguous()
        and rows.is_contiguous()
        and tiles.is_contiguous()
        and spans.is_contiguous()
        and device == down.get_device() == up.get_device() == bias.get_device() == kind.get_device()
        and device == rows.get_device() == tiles.get_device() == spans.get_device()
        and offsets is None
    ):
        plan = (rows, tiles, spans) if offsets is None else (rows, tiles, spans, offsets)
        _explain(h, name, (down, up, bias, kind), plan)


def _explain(h: Tensor, name: str, pool: tuple[Tensor, ...], plan: tuple[Tensor, ...]) -> None:
    """The checks one by one, each with its error."""
    down, up, bias, kind = pool
    rows, tiles, spans = plan[:3]
    d = h.shape[-1] if h.dim() else 0
    n_pool, n_tiles, n_segments = (t.shape[0] if t.dim() else 0 for t in (down, tiles, spans))
    if h.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: the triton backend takes {', '.join(map(str, _DTYPES))}, was {h.dtype}"
            + ("; the reference backend computes in float64" if h.dtype is torch.float64 else "")
        )
    if down.dtype is not h.dtype and down.dtype is not torch.float32 or up.dtype is not down.dtype:
        raise ValueError(
            f"down, up: one dtype, {name}'s ({h.dtype}) or torch.float32; were {down.dtype} and {up.dtype}"
        )
    for label, tensor, shape, dtype in (
        ("down", down, (n_pool, d), down.dtype),
        ("up", up, (n_pool, d), down.dtype),
        ("bias", bias, (n_pool,), torch.float32),
        ("kind", kind, (n_pool,), torch.int32),
        ("rows", rows, (rows.numel(),), torch.int32),
        ("tiles", tiles, (n_tiles, 3), torch.int32),
        ("spans", spans, (n_segments, 2), torch.int32),
        *(("offsets", tensor, (n_segments + 1,), torch.int32) for tensor in plan[3:]),
    ):
        if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{label}: must be a contiguous {list(shape)} of {dtype} beside {name} {list(h.shape)}; was "
                f"{list(tensor.shape)} of {tensor.dtype}, strides {tensor.stride()}"
            )
        if tensor.device != h.device:
            raise ValueError(f"{label}: is on {tensor.device}, but {name} is on {h.device}")


def check_norm(
    h: Tensor, rows: Tensor, tiles: Tensor, weight: Tensor, shift: Tensor | None, norm: int
) -> None:
    for label, tensor in (("weight", weight), ("shift", shift)):
        if tensor is None:
            continue
        if tensor.shape != h.shape[-1:] or tensor.dtype is not h.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{label}: must be a contiguous [{h.shape[-1]}] of {h.dtype}, as h is; was "
                f"{list(tensor.shape)} of {tensor.dtype}, strides {tensor.stride()}"
            )
        if tensor.device != h.device:
            raise ValueError(f"{label}: is on {tensor.device}, but h is on {h.device}")
    if norm & ~_NORMS:
        raise ValueError(f"norm: must be a sum of {', '.join(map(repr, Norm))}; was {norm}")
    n_rows, named = h.numel() // h.shape[-1], min(rows.shape[0], TILE * tiles.shape[0])
    if named < n_rows:
        raise ValueError(
            f"rows, tiles: must name each of the {n_rows} rows of h, since all are normed (see "
            f"reft_kernels.plan.cover); there is room for {named} in {rows.shape[0]} rows and "
            f"{tiles.shape[0]} tiles"
        )


def readable(grad: Tensor) -> Tensor:
    """grad, or a contiguous copy where autograd made one without rows (an expanded scalar, say)."""
    try:
        row_stride(grad, "grad")
    except ValueError:
        return grad.contiguous()
    return grad
