"""The elementwise kernels: h[rows] ← s ⊙ h[rows] + v in place, dh, and the gradients of the pool.

One program for each tile of a plan and block of d; nothing is summed along a row. The pool's gradients are
summed by one program for each pool row and block of d, over the segments in order, TILE rows at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import _TILE, rounded


@triton.jit
def scale_rows_kernel(
    source, out, scale_less_one, shift, rows, tiles, spans, n_rows, source_stride, out_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """out[rows] = s ⊙ source[rows] + v; without SHIFTED s ⊙ source[rows], which is dh of grad."""
    tile = tiles + 3 * tl.program_id(0)
    segment, start, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    idle = (segment < 0) | (count <= 0)
    first = tl.load(spans + 2 * segment, mask=~idle, other=0)
    rank = tl.load(spans + 2 * segment + 1, mask=~idle, other=0)
    if rank > 0:
        place = tl.arange(0, _TILE)
        row = tl.load(rows + start + place, mask=place < count, other=-1).to(tl.int64)
        valid = (row >= 0) & (row < n_rows)
        row = tl.where(valid, row, 0)[:, None]
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = col < D
        at = first.to(tl.int64) * D + col
        m = tl.load(scale_less_one + at, mask=inside, other=0.0)[None, :]
        mask = valid[:, None] & inside[None, :]
        x = tl.load(source + row * source_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        y = (1.0 + m) * x
        zero = tl.zeros_like(y)
        if SHIFTED:
            v = tl.load(shift + at, mask=inside, other=0.0)[None, :]
            y += v
            zero += v
        # s = 0 assigns: h is not multiplied, for it may be Inf or NaN.
        y = tl.where(m == -1.0, zero, y)
        tl.store(out + row * out_stride + col[None, :], rounded(y, out.dtype.element_ty), mask=mask)


@triton.jit
def scale_sums_kernel(
    grad, hs, dscale, dshift, rows, spans, offsets, n_rows, grad_stride, n_segments,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pool_row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    place = tl.arange(0, _TILE)
    ds = tl.zeros((_TILE, BLOCK), tl.float32)
    dv = tl.zeros((_TILE, BLOCK), tl.float32)
    for segment in range(n_segments):
        first, rank = tl.load(spans + 2 * segment), tl.load(spans + 2 * segment + 1)
        if (first == pool_row) & (rank > 0):
            end = tl.load(offsets + segment + 1)
            for start in range(tl.load(offsets + segment), end, _TILE):
                at = start + place
                row = tl.load(rows + at, mask=at < end, other=-1).to(tl.int64)
                valid = (row >= 0) & (row < n_rows)
                mask = valid[:, None] & inside[None, :]
                row = tl.where(valid, row, 0)[:, None]
                g = tl.load(grad + row * grad_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
                x_at = at.to(tl.int64)[:, None] * D + col[None, :]
                x = tl.load(hs + x_at, mask=mask, other=0.0).to(tl.float32)
                ds += g * x
                dv += g
    out = pool_row.to(tl.int64) * D + col
    tl.store(dscale + out, tl.sum(ds, 0), mask=inside)
    tl.store(dshift + out, tl.sum(dv, 0), mask=inside)
