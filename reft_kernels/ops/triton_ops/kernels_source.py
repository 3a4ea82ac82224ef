"""The kernels of the low-rank edit with a source for each row.

source_rows_kernel    v = φ(D h + source + c) of 16 pool rows and the rows of a tile; for the backward p, too
source_expand_kernel  h + v U, or dh = g + p D: the rows of a tile, and a block of d
source_pool_kernel    gradients of 16 pool rows and a block of d

In between v and p lie in memory, [n, s] each: so one form serves every rank, and the edit without a source,
which decode steps take, keeps its own forms and registers. Every sum is float32 in an order fixed by d, the
rank and the plan.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    _NO_PRODUCT,
    _TILE,
    BATCH_SIZES,
    BATCH_TABLES,
    activated,
    pool_range,
    pre_activation,
    product,
    rounded,
    tile_rows,
)
from .kernels_backward import _both_products, _slope_times
from .kernels_forward import tile_entry

#: Arguments of which no kernel is compiled anew.
SIZES = (*BATCH_SIZES, "source_width")
TABLES = (*BATCH_TABLES, "source", "v_kept", "p_kept")

_CHUNK = tl.constexpr(16)  # pool rows of a program


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def source_rows_kernel(
    h,  # [n_rows, D], rows row_stride apart: the hidden states, or (BACKWARD) their gradient
    hs,  # [n, D] contiguous, the hidden states of the plan's rows (BACKWARD alone)
    source,  # [n, source_width] float32
    down, up,  # [P, D]
    bias, kind,  # [P]
    v_kept, p_kept,  # [n, source_width] float32 out; p of BACKWARD alone
    rows, tiles, spans, n_rows, row_stride, source_width,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    segment, start, count = tile_entry(tiles, tl.program_id(0))
    live = (segment >= 0) & (count > 0)
    first = tl.load(spans + 2 * segment, mask=live, other=0).to(tl.int64)
    rank = tl.load(spans + 2 * segment + 1, mask=live, other=0)
    lane = tl.program_id(1) * _CHUNK + tl.arange(0, _CHUNK)  # of the span's pool rows, [R]
    if tl.program_id(1) * _CHUNK < rank:
        row, valid = tile_rows(rows, start, count, n_rows, HEIGHT=_TILE)  # [T]
        mine = lane < rank
        has_down, c, code = pool_range(bias, kind, first + lane, mine)
        pool_rows = ((first + lane) * D)[:, None]
        place = (start + tl.arange(0, _TILE)).to(tl.int64)[:, None]
        h_rows = h + (row * row_stride)[:, None]
        z = tl.zeros((_TILE, _CHUNK), tl.float32)
        w = z
        if BACKWARD:
            z, w = _both_products(
                hs + place * D, h_rows, valid, down + pool_rows, up + pool_rows, has_down, mine,
                ROWS=_TILE, RANK=_CHUNK, D=D, BLOCK=BLOCK, STAGES=STAGES, FULL=FULL,
            )  # fmt: skip
        else:
            for begin in tl.range(0, D, BLOCK, num_stages=STAGES):
                col = begin + tl.arange(0, BLOCK)[None, :]
                x = tl.load(h_rows + col, mask=valid[:, None] & (col < D), other=0.0)
                d = tl.load(down + pool_rows + col, mask=has_down[:, None] & (col < D), other=0.0)
                z = product(x, tl.trans(d), z, FULL=FULL)
        at = place * source_width + lane[None, :]
        inside = valid[:, None] & (mine & (lane < source_width))[None, :]
        s = tl.load(source + at, mask=inside, other=0.0)
        z = pre_activation(tl.where(has_down[None, :], z, 0.0) + s, mine, c)
        tl.store(v_kept + at, activated(z, code, mine), mask=inside)
        if BACKWARD:
            tl.store(p_kept + at, _slope_times(z, w, code, mine), mask=inside)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def source_expand_kernel(
    h,  # [n_rows, D], rows row_stride apart
    out,  # [n_rows, D], rows out_stride apart; may be h
    factors,  # U or D, [P, D]
    kind,  # [P]
    kept,  # v or p, [n, source_width]
    rows, tiles, spans, n_rows, row_stride, out_stride, source_width,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr,
    PRODUCTS: tl.constexpr,  # whether only pool rows that have a D take part
):  # fmt: skip
    segment, start, count = tile_entry(tiles, tl.program_id(0))
    live = (segment >= 0) & (count > 0)
    first = tl.load(spans + 2 * segment, mask=live, other=0).to(tl.int64)
    rank = tl.load(spans + 2 * segment + 1, mask=live, other=0)
    if rank > 0:
        row, valid = tile_rows(rows, start, count, n_rows, HEIGHT=_TILE)
        place = (start + tl.arange(0, _TILE)).to(tl.int64)[:, None]
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = valid[:, None] & (col < D)
        total = tl.zeros((_TILE, BLOCK), tl.float32)
        for begin in tl.range(0, rank, _CHUNK, num_stages=STAGES):
            lane = begin + tl.arange(0, _CHUNK)
            mine = lane < rank
            if PRODUCTS:
                k = tl.load(kind + first + lane, mask=mine, other=_NO_PRODUCT)
                mine = mine & ((k & _NO_PRODUCT) == 0)
            known = valid[:, None] & (mine & (lane < source_width))[None, :]
            v = tl.load(kept + place * source_width + lane[None, :], mask=known, other=0.0)
            factor_rows = factors + ((first + lane) * D)[:, None]
            u = tl.load(factor_rows + col, mask=mine[:, None] & (col < D), other=0.0)
            total = product(v, u, total, FULL=FULL)
        x = tl.load(h + (row * row_stride)[:, None] + col, mask=inside, other=0.0)
        value = rounded(x.to(tl.float32) + total, x.dtype)
        tl.store(out + (row * out_stride)[:, None] + col, value, mask=inside)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def source_pool_kernel(
    grad,  # [n_rows, D], rows row_stride apart
    hs,  # [n, D] contiguous
    kind,  # [P]
    v_kept, p_kept,  # [n, source_width]
    ddown, dup,  # [P, D] out
    dbias,  # [P] out
    rows, spans, offsets, n_rows, n_pool, n_segments, row_stride, source_width,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    pool_first = tl.program_id(0).to(tl.int64) * _CHUNK
    pool_row = pool_first + tl.arange(0, _CHUNK)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total_d = tl.zeros((_CHUNK, BLOCK), tl.float32)
    total_u = tl.zeros((_CHUNK, BLOCK), tl.float32)
    total_c = tl.zeros((_CHUNK,), tl.float32)
    for segment in range(n_segments):
        first = tl.load(spans + 2 * segment).to(tl.int64)
        rank = tl.load(spans + 2 * segment + 1)
        if (first < pool_first + _CHUNK) & (first + rank > pool_first) & (rank > 0):
            lane = pool_row - first
            mine = (lane >= 0) & (lane < rank)
            sum_d = tl.zeros((_CHUNK, BLOCK), tl.float32)
            sum_u = tl.zeros((_CHUNK, BLOCK), tl.float32)
            end = tl.load(offsets + segment + 1)
            for begin in range(tl.load(offsets + segment), end, ROWS):
                place = begin + tl.arange(0, ROWS)
                row = tl.load(rows + place, mask=place < end, other=-1).to(tl.int64)
                valid = (row >= 0) & (row < n_rows)
                place = place.to(tl.int64)[:, None]
                inside = valid[:, None] & (col < D)
                kept = place * source_width + lane[None, :]
                known = valid[:, None] & (mine & (lane < source_width))[None, :]
                p = tl.load(p_kept + kept, mask=known, other=0.0)  # [ROWS, 16]
                v = tl.load(v_kept + kept, mask=known, other=0.0)
                x = tl.load(hs + place * D + col, mask=inside, other=0.0)  # [ROWS, B]
                g = tl.load(grad + (row * row_stride)[:, None] + col, mask=inside, other=0.0)
                sum_d = product(tl.trans(p), x, sum_d, FULL=FULL)
                sum_u = product(tl.trans(v), g, sum_u, FULL=FULL)
                total_c += tl.sum(p, 0)
            # Select, since 0 · Inf of another segment's h must not reach this one's pool rows.
            total_d = tl.where(mine[:, None], total_d + sum_d, total_d)
            total_u = tl.where(mine[:, None], total_u + sum_u, total_u)
    out = (pool_row * D)[:, None] + col
    inside = (pool_row < n_pool)[:, None] & (col < D)
    k = tl.load(kind + pool_row, mask=pool_row < n_pool, other=_NO_PRODUCT)
    total_d = tl.where(((k & _NO_PRODUCT) == 0)[:, None], total_d, 0.0)
    tl.store(ddown + out, rounded(total_d, ddown.dtype.element_ty), mask=inside)
    tl.store(dup + out, rounded(total_u, dup.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(dbias + pool_row, total_c, mask=pool_row < n_pool)
