"""The ops with a source for each row: checks and launches, through Triton's own way each time."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..arguments import Plan, PoolRows
from ..checks import check_source, check_tables
from . import options
from .checks import readable, row_stride
from .kernels_source import source_expand_kernel, source_pool_kernel, source_rows_kernel
from .launcher import on

_CHUNK = 16  # pool rows of a program


def pool_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int) -> dict[str, Any]:
    """Meta-parameters of `source_pool_kernel`: `backward_pool_kernel`'s, with blocks that don't spill."""
    found = options.pool_options(h_dtype, pool_dtype, d)
    return found | {"BLOCK": 32} if found["FULL"] else found


def _options(of: Any, h: Tensor, pool: PoolRows, *names: str) -> dict[str, Any]:
    """Those of another kernel's meta-parameters that are asked for."""
    known = of(h.dtype, pool.down.dtype, h.shape[-1])
    return {name: known[name] for name in ("D", "FULL", "num_warps", "enable_fp_fusion", *names)}


def _grid(plan: Plan, many: int, block: int) -> tuple[int, int]:
    """A program for each tile, and for each block of `many`."""
    return plan.tiles.shape[0], triton.cdiv(many, block)


def _coefficients(
    h: Tensor, hs: Tensor, source: Tensor, pool: PoolRows, plan: Plan, backward: bool
) -> tuple[Tensor, Tensor]:
    """v and, for the backward, p; [n, s] each, of which what is not edited is undefined in v and 0 in p."""
    width = source.shape[1]
    v, p = torch.empty_like(source), torch.zeros_like(source) if backward else source.new_empty(0)
    found = _options(options.rows_options, h, pool, "DOWN_BLOCK", "STAGES")
    block = found.pop("DOWN_BLOCK")
    source_rows_kernel[_grid(plan, width, _CHUNK)](
        h, hs, source, *pool, v, p, *plan[:-1], h.numel() // h.shape[-1], row_stride(h, "h"), width,
        BLOCK=block, BACKWARD=backward, **found,
    )  # fmt: skip
    return v, p


def _expand(
    h: Tensor, out: Tensor, factors: Tensor, kept: Tensor, pool: PoolRows, plan: Plan, products: bool
) -> None:
    """Writes the rows of `out` that the plan names: those of h, and the kept numbers times the factors."""
    found = _options(options.rows_options, h, pool, "UP_BLOCK", "STAGES")
    block = found.pop("UP_BLOCK")
    source_expand_kernel[_grid(plan, h.shape[-1], block)](
        h, out, factors, pool.kind, kept, *plan[:-1], h.numel() // h.shape[-1], row_stride(h, "h"),
        row_stride(out, "h"), kept.shape[1], BLOCK=block, PRODUCTS=products, **found,
    )  # fmt: skip


def _idle(h: Tensor, source: Tensor, pool: PoolRows, plan: Plan) -> bool:
    return plan.tiles.shape[0] == 0 or h.numel() == 0 or pool.down.shape[0] == 0 or source.numel() == 0


def intervene_source_(h: Tensor, source: Tensor, pool: PoolRows, plan: Plan) -> None:
    check_tables(h, pool, plan, "triton")
    check_source(source, pool, plan)
    row_stride(h, "h")
    if _idle(h, source, pool, plan):
        return
    with on(h.device):
        v, _ = _coefficients(h, h, source, pool, plan, backward=False)
        _expand(h, h, pool.up, v, pool, plan, products=False)


def intervene_source(h: Tensor, source: Tensor, pool: PoolRows, plan: Plan) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    intervene_source_(out, source, pool, plan._replace(offsets=None))
    return out


def intervene_source_backward(
    grad: Tensor, hs: Tensor, source: Tensor, pool: PoolRows, plan: Plan, need_h: bool, need_pool: bool
) -> tuple[Tensor, ...]:
    check_tables(grad, pool, plan, "triton", "grad")
    check_source(source, pool, plan)
    d, n, n_pool = grad.shape[-1], plan.rows.shape[0], pool.down.shape[0]
    if hs.shape != (n, d) or hs.dtype is not grad.dtype or not hs.is_contiguous():
        raise ValueError(
            f"hs: must be a contiguous [{n}, {d}] of {grad.dtype}, was {list(hs.shape)} of {hs.dtype}, "
            f"strides {hs.stride()}"
        )
    dh = grad.clone(memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    sums = tuple(torch.zeros_like(t) if need_pool else t.new_empty(0) for t in pool[:3])
    if _idle(grad, source, pool, plan):
        return dh, *sums, torch.zeros_like(source)
    grad = readable(grad)
    with on(grad.device):
        v, p = _coefficients(grad, hs, source, pool, plan, backward=True)
        if need_h:
            _expand(grad, dh, pool.down, p, pool, plan, products=True)
        if need_pool:
            found = _options(pool_options, grad, pool, "ROWS", "BLOCK")
            source_pool_kernel[triton.cdiv(n_pool, _CHUNK), triton.cdiv(d, found["BLOCK"])](
                grad, hs, pool.kind, v, p, *sums, plan.rows, plan.spans, plan.offsets, grad.numel() // d,
                n_pool, plan.spans.shape[0], row_stride(grad, "grad"), source.shape[1], **found,
            )  # fmt: skip
    return dh, *sums, p
