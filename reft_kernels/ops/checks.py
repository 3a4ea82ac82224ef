"""What the arguments of ops must be, for those who ask in Python. Before anything is written.

Every call pays for this, so a check is one chain of comparisons where the arguments are right, and another
function says what is wrong where they are not. Nothing is remembered from call to call: a tensor may be
resized in place, and an address handed on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import Plan, PoolRows
from .scale_shift import ScaleRows
from .schema import Norm

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TWO, _THREE = torch.Size((2,)), torch.Size((3,))
_NORM_BITS = int(Norm.CENTRED | Norm.PLUS_ONE | Norm.ROUND)


def check_tables(h: Tensor, pool: PoolRows, plan: Plan, backend: str, name: str = "h") -> None:
    """Refuses tensors that kernels would misread, which have no float64.

    backend, name: what the error calls the backend, and h [..., d].

    Raises ValueError that begins with the argument's name.
    """
    down, up, bias, kind = pool
    rows, tiles, spans, offsets = plan
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
        _explain(h, pool, plan, backend, name)


def _explain(h: Tensor, pool: PoolRows, plan: Plan, backend: str, name: str) -> None:
    """The checks one by one, each with its error."""
    down, up, bias, kind = pool
    rows, tiles, spans, offsets = plan
    d = h.shape[-1] if h.dim() else 0
    n_pool, n_tiles, n_segments = (t.shape[0] if t.dim() else 0 for t in (down, tiles, spans))
    _check_dtype(h, backend, name)
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
        ("offsets", offsets, (n_segments + 1,), torch.int32),
    ):
        _check_tensor(label, tensor, shape, dtype, h, name)


def _check_dtype(h: Tensor, backend: str, name: str) -> None:
    if h.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: the {backend} backend takes {', '.join(map(str, _DTYPES))}, was {h.dtype}"
            + ("; the reference backend computes in float64" if h.dtype is torch.float64 else "")
        )


def _check_tensor(
    label: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, h: Tensor, name: str
) -> None:
    """Refuses a tensor that is not this, beside h; None is what an op does not take."""
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{label}: must be a contiguous {list(shape)} of {dtype} beside {name} {list(h.shape)}; was "
            f"{list(tensor.shape)} of {tensor.dtype}, strides {tensor.stride()}"
        )
    if tensor.device != h.device:
        raise ValueError(f"{label}: is on {tensor.device}, but {name} is on {h.device}")


def check_scales(h: Tensor, pool: ScaleRows, plan: Plan, backend: str, name: str = "h") -> None:
    """`check_tables` of an elementwise pool.

    Raises ValueError that begins with the argument's name.
    """
    _check_dtype(h, backend, name)
    d, count = h.shape[-1] if h.dim() else 0, pool.shift.shape[0] if pool.shift.dim() else 0
    n_tiles, n_segments = (t.shape[0] if t.dim() else 0 for t in (plan.tiles, plan.spans))
    for label, tensor, shape, dtype in (
        ("scale_less_one", pool.scale_less_one, (count, d), torch.float32),
        ("shift", pool.shift, (count, d), torch.float32),
        ("rows", plan.rows, (plan.rows.numel(),), torch.int32),
        ("tiles", plan.tiles, (n_tiles, 3), torch.int32),
        ("spans", plan.spans, (n_segments, 2), torch.int32),
        ("offsets", plan.offsets, (n_segments + 1,), torch.int32),
    ):
        _check_tensor(label, tensor, shape, dtype, h, name)


def check_source(source: Tensor, pool: PoolRows, plan: Plan) -> None:
    """Refuses a source that does not lie beside the plan's rows as `ops.source` says. Ranks are not read."""
    n, dtype, device = plan.rows.numel(), pool.bias.dtype, pool.bias.device
    if source.dim() != 2 or source.shape[0] != n or source.dtype is not dtype or not source.is_contiguous():
        raise ValueError(
            f"source: must be a contiguous [{n}, s] of {dtype}, was {list(source.shape)} of {source.dtype}, "
            f"strides {source.stride()}"
        )
    if source.device != device:
        raise ValueError(f"source: is on {source.device}, but the pool is on {device}")


def check_norms(h: Tensor, norms: Tensor, plan: Plan, backend: str | None = None, name: str = "h") -> None:
    """`check_tables` of a plan without a pool, and of the norms [n] of its rows.

    backend: None for one that computes in float64, too.

    Raises ValueError that begins with the argument's name.
    """
    if backend is not None:
        _check_dtype(h, backend, name)
    if h.dim() < 1:
        raise ValueError(f"{name}: must be [..., d], had no dimension")
    n_tiles, n_segments = (t.shape[0] if t.dim() else 0 for t in (plan.tiles, plan.spans))
    dtype = torch.float64 if h.dtype is torch.float64 else torch.float32
    for label, tensor, shape, wanted in (
        ("norms", norms, (plan.rows.numel(),), dtype),
        ("rows", plan.rows, (plan.rows.numel(),), torch.int32),
        ("tiles", plan.tiles, (n_tiles, 3), torch.int32),
        ("spans", plan.spans, (n_segments, 2), torch.int32),
    ):
        _check_tensor(label, tensor, shape, wanted, h, name)


def check_norm(h: Tensor, weight: Tensor, shift: Tensor | None, eps: float, norm: int) -> None:
    """Refuses what `intervene_norm_` takes beside h [..., d], pool and plan, where it does not fit h.

    Raises ValueError that begins with the argument's name.
    """
    for name, tensor in (("weight", weight), ("shift", shift)):
        if tensor is None:
            continue
        if tensor.shape != h.shape[-1:]:
            raise ValueError(f"{name}: must be [{h.shape[-1]}] to fit h, was {list(tensor.shape)}")
        if tensor.dtype is not h.dtype:
            raise ValueError(f"{name}: its dtype must be h's ({h.dtype}), was {tensor.dtype}")
        if tensor.device != h.device:
            raise ValueError(f"{name}: is on {tensor.device}, but h is on {h.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, had a stride of {tensor.stride(0)}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: must be finite and 0 or more, was {eps}")
    if norm & ~_NORM_BITS:
        raise ValueError(f"norm: must be a sum of ops.Norm's RMS, CENTRED, PLUS_ONE and ROUND, was {norm}")


def check_addend(h: Tensor, addend: Tensor) -> None:
    """Refuses an addend that is not like h, or that is h."""
    if addend.shape != h.shape or addend.dtype is not h.dtype or addend.device != h.device:
        raise ValueError(
            f"addend: must be {list(h.shape)} of {h.dtype} on {h.device}, as h is; was "
            f"{list(addend.shape)} of {addend.dtype} on {addend.device}"
        )
    if h.numel() and addend.data_ptr() == h.data_ptr():
        raise ValueError("addend: is h itself; both are written")
