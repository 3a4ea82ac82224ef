"""The ops: checks, launches, what lies between. Nothing here reads a device tensor back to the host."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..arguments import Plan, PoolRows
from ..checks import check_addend, check_norm, check_tables
from ..schema import Norm
from . import options
from .blocks import LOW_RANK
from .checks import check_cover, readable, row_stride
from .kernels_backward import backward_add_kernel, backward_pool_kernel, backward_rows_kernel
from .kernels_forward import fold_kernel, intervene_kernel
from .kernels_norm import intervene_norm_kernel
from .launcher import Launcher, on

_CENTRED = int(Norm.CENTRED)


_edit = Launcher(intervene_kernel, options.forward_options, ("n_rows", "row_stride"))
_fold = Launcher(fold_kernel, options.fold_options, ("n_rows", "row_stride", "addend_stride"))
_edit_and_norm = Launcher(
    intervene_norm_kernel, options.norm_options, ("n_rows", "row_stride", "eps", "norm")
)
_rows = Launcher(backward_rows_kernel, options.rows_options, ("n_rows", "grad_stride", "need_h", "need_pool"))
_pool = Launcher(
    backward_pool_kernel, options.pool_options, ("n_rows", "grad_stride", "n_pool", "n_segments")
)
_add = Launcher(backward_add_kernel, options.add_options, ("n_pool", "n_segments", "n_splits"))


def intervene_(h: Tensor, pool: PoolRows, plan: Plan) -> None:
    check_tables(h, pool, plan, "triton")
    stride = row_stride(h, "h")
    entries, n_tiles = h.numel(), plan.tiles.shape[0]
    n_pool, d = pool.down.shape
    if n_tiles == 0 or entries == 0 or n_pool == 0:
        return
    with on(h.device):
        _edit.launch(
            (n_tiles, 1, 1),
            (h.dtype, pool.down.dtype),
            d,
            (h, *pool, *plan[:-1]),
            (entries // d, stride),
        )


def intervene_sum_(h: Tensor, addend: Tensor, pool: PoolRows, plan: Plan) -> None:
    check_tables(h, pool, plan, "triton")
    check_addend(h, addend)
    stride, other = row_stride(h, "h"), row_stride(addend, "addend")
    entries, n_tiles = h.numel(), plan.tiles.shape[0]
    n_pool, d = pool.down.shape
    if n_tiles == 0 or entries == 0 or n_pool == 0:
        return
    with on(h.device):
        _fold.launch(
            (n_tiles, 1, 1),
            (h.dtype, pool.down.dtype),
            d,
            (h, addend, plan.rows, plan.tiles, plan.spans),
            (entries // d, stride, other),
        )
    intervene_(h, pool, plan)


def intervene_norm_(
    h: Tensor, pool: PoolRows, plan: Plan, weight: Tensor, shift: Tensor | None, eps: float, norm: int
) -> Tensor:
    check_tables(h, pool, plan, "triton")
    stride = row_stride(h, "h")
    check_norm(h, weight, shift, eps, norm)
    check_cover(h, plan)
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    d = h.shape[-1]
    if h.numel() == 0:
        return out
    if h.data_ptr() % 16 or (stride % 16 == 0) != (d % 16 == 0):
        # Triton compiles for what addresses are divisible by, and so may sum a row in another order.
        copy = h.clone(memory_format=torch.contiguous_format)
        out = intervene_norm_(copy, pool, plan, weight, shift, eps, norm)
        h.copy_(copy)
        return out
    with on(h.device):
        _edit_and_norm.launch(
            (plan.tiles.shape[0], 1, 1),
            (h.dtype, pool.down.dtype),
            d,
            (h, out, weight, shift, *pool, *plan[:-1]),
            (h.numel() // d, stride, eps, norm),
            {"CENTRED": bool(norm & _CENTRED)},
        )
    return out


def intervene(h: Tensor, pool: PoolRows, plan: Plan) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    intervene_(out, pool, plan._replace(offsets=None))
    return out


def intervene_backward(
    grad: Tensor, hs: Tensor, pool: PoolRows, plan: Plan, need_h: bool, need_pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_tables(grad, pool, plan, "triton", "grad")
    d, n, n_pool = grad.shape[-1], plan.rows.shape[0], pool.down.shape[0]
    if hs.shape != (n, d) or hs.dtype is not grad.dtype or not hs.is_contiguous():
        raise ValueError(
            f"hs: must be a contiguous [{n}, {d}] of {grad.dtype}, was {list(hs.shape)} of {hs.dtype}, "
            f"strides {hs.stride()}"
        )
    dh = grad.clone(memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    ddown, dup, dbias = (torch.empty_like(t) if need_pool else t.new_empty(0) for t in pool[:3])
    if n_pool == 0 or not (need_h or need_pool):
        return dh, ddown, dup, dbias
    if plan.tiles.shape[0] == 0 or grad.numel() == 0:
        if need_pool:
            ddown.zero_(), dup.zero_(), dbias.zero_()
        return dh, ddown, dup, dbias

    grad = readable(grad)
    stride, n_rows, dtypes = row_stride(grad, "grad"), grad.numel() // d, (grad.dtype, pool.down.dtype)
    kept = torch.empty((2, n if need_pool else 0, LOW_RANK), dtype=torch.float32, device=grad.device)
    with on(grad.device):
        _rows.launch(
            (plan.tiles.shape[0], 1, 1),
            dtypes,
            d,
            (grad, dh, hs, *pool, kept[0], kept[1], *plan[:-1]),
            (n_rows, stride, int(need_h), int(need_pool)),
        )
        if need_pool:
            _sum_of_pool(grad, hs, pool, plan, kept, (ddown, dup, dbias), stride)
    return dh, ddown, dup, dbias


def _sum_of_pool(
    grad: Tensor, hs: Tensor, pool: PoolRows, plan: Plan, kept: Tensor, sums: tuple[Tensor, ...], stride: int
) -> None:
    """Writes the gradients of down, up and bias to `sums`. kept: p and v [2, n, 64]; stride: of grad."""
    d, n, n_pool = grad.shape[-1], plan.rows.shape[0], pool.down.shape[0]
    dtypes, n_segments = (grad.dtype, pool.down.dtype), plan.spans.shape[0]
    block = options.pool_options(*dtypes, d)["BLOCK"]
    splits = options.pool_splits(n, n_pool, d)
    parts = sums if splits == 1 else tuple(pool.bias.new_empty(splits, *t.shape) for t in sums)
    _pool.launch(
        (triton.cdiv(n_pool, 16), triton.cdiv(d, block), splits),
        dtypes,
        d,
        (grad, hs, *pool, kept[0], kept[1], *parts, plan.rows, plan.spans, plan.offsets),
        (grad.numel() // d, stride, n_pool, n_segments),
        {"in_float32": splits > 1},
    )
    if splits > 1:
        columns = options.add_options(*dtypes, d)["BLOCK"]
        _add.launch(
            (n_pool, triton.cdiv(d, columns), 1),
            dtypes,
            d,
            (*parts, *sums, plan.spans),
            (n_pool, n_segments, splits),
        )
