"""The elementwise ops: checks and launches, through Triton's own way each time."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..arguments import Plan
from ..checks import check_scales
from ..scale_shift import ScaleRows
from .checks import readable, row_stride
from .kernels_scale_shift import scale_rows_kernel, scale_sums_kernel
from .launcher import on

#: Columns of a program, at most.
ROWS_BLOCK, SUMS_BLOCK = 256, 128

#: Of the compiler, for both kernels. FMA is asked for: where it is not, Triton 3.9 warns, and 3.10 has none.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _block(d: int, most: int) -> int:
    return min(triton.next_power_of_2(d), most)


def _scale_rows(source: Tensor, out: Tensor, pool: ScaleRows, plan: Plan, shifted: bool) -> None:
    """Writes the rows of `out` that the plan names, of those of `source`."""
    d, n_tiles = out.shape[-1], plan.tiles.shape[0]
    if n_tiles == 0 or out.numel() == 0 or pool.shift.shape[0] == 0:
        return
    block = _block(d, ROWS_BLOCK)
    with on(out.device):
        scale_rows_kernel[n_tiles, triton.cdiv(d, block)](
            source, out, *pool, plan.rows, plan.tiles, plan.spans, out.numel() // d,
            row_stride(source, "grad"), row_stride(out, "h"),
            D=d, BLOCK=block, SHIFTED=shifted, **OPTIONS,
        )  # fmt: skip


def scale_shift_(h: Tensor, pool: ScaleRows, plan: Plan) -> None:
    check_scales(h, pool, plan, "triton")
    row_stride(h, "h")
    _scale_rows(h, h, pool, plan, shifted=True)


def scale_shift(h: Tensor, pool: ScaleRows, plan: Plan) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    scale_shift_(out, pool, plan._replace(offsets=None))
    return out


def scale_shift_backward(
    grad: Tensor, hs: Tensor, pool: ScaleRows, plan: Plan, need_h: bool, need_pool: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_scales(grad, pool, plan, "triton", "grad")
    d, n = grad.shape[-1], plan.rows.shape[0]
    if hs.shape != (n, d) or hs.dtype is not grad.dtype or not hs.is_contiguous():
        raise ValueError(
            f"hs: must be a contiguous [{n}, {d}] of {grad.dtype}, was {list(hs.shape)} of {hs.dtype}, "
            f"strides {hs.stride()}"
        )
    dh = grad.clone(memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    dscale, dshift = (torch.zeros_like(t) if need_pool else t.new_empty(0) for t in pool)
    grad = readable(grad)
    if need_h:
        _scale_rows(grad, dh, pool, plan, shifted=False)
    if need_pool and plan.tiles.shape[0] and grad.numel() and dshift.numel():
        block = _block(d, SUMS_BLOCK)
        with on(grad.device):
            scale_sums_kernel[dshift.shape[0], triton.cdiv(d, block)](
                grad, hs, dscale, dshift, plan.rows, plan.spans, plan.offsets, grad.numel() // d,
                row_stride(grad, "grad"), plan.spans.shape[0], D=d, BLOCK=block, **OPTIONS,
            )  # fmt: skip
    return dh, dscale, dshift
