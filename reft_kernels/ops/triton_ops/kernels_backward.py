"""The backward kernels, from g = grad and the saved rows hs (h before the edit).

backward_rows_kernel  dh, and p and v [n, 64] for the next; one program for each tile
backward_pool_kernel  gradients of 16 pool rows and a block of d, over a share of the rows
backward_add_kernel   adds the shares, in order

With p = φ′(z) ⊙ w and v = φ(z), where z = D h + c and w = U g. docs/kernels.md derives what is summed, and
docs/triton.md says which program does. Every sum is float32 in an order fixed by d, the rank and the plan; no
atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import slope
from .blocks import (
    _TILE,
    BATCH_SIZES,
    BATCH_TABLES,
    LOW_RANK,
    activated,
    pool_range,
    pre_activation,
    product,
    rounded,
    scalar_kind,
    tile_rows,
)

_POOL_BLOCK = tl.constexpr(16)
_KEPT = tl.constexpr(LOW_RANK)  # columns of the kept p and v


@triton.jit
def _both_products(
    hs_rows, g_rows, valid, down_rows, up_rows, has_down, live,
    ROWS: tl.constexpr, RANK: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """D h and U g, both [ROWS, RANK], for pointers to rows [ROWS, 1] and pool rows [RANK, 1]."""
    z = tl.zeros((ROWS, RANK), tl.float32)
    w = tl.zeros((ROWS, RANK), tl.float32)
    for begin in tl.range(0, D, BLOCK, num_stages=STAGES):
        col = begin + tl.arange(0, BLOCK)[None, :]
        x = tl.load(hs_rows + col, mask=valid[:, None] & (col < D), other=0.0)  # [ROWS, B]
        d = tl.load(down_rows + col, mask=has_down[:, None] & (col < D), other=0.0)  # [RANK, B]
        z = product(x, tl.trans(d), z, FULL=FULL)
        g = tl.load(g_rows + col, mask=valid[:, None] & (col < D), other=0.0)
        u = tl.load(up_rows + col, mask=live[:, None] & (col < D), other=0.0)
        w = product(g, tl.trans(u), w, FULL=FULL)
    return z, w


@triton.jit
def _slope_times(z, w, code, live):
    """p = φ′(z) ⊙ w, 0 outside of the range."""
    p = w
    if tl.max(code, 0) > 0:
        p = slope(z, code[None, :]) * w
    return tl.where(live[None, :], p, 0.0)


@triton.jit
def _rows_by_products(
    grad, dh, hs, down, up, bias, kind, p_kept, v_kept, rows, start, count, first, rank, n_rows, grad_stride,
    need_h, need_pool, D: tl.constexpr, RANK: tl.constexpr, DOWN_BLOCK: tl.constexpr, UP_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    row, valid = tile_rows(rows, start, count, n_rows, HEIGHT=_TILE)  # [16]
    r = tl.arange(0, RANK)
    live = r < rank
    has_down, c, code = pool_range(bias, kind, first + r, live)  # [R]
    pool_rows = ((first + r) * D)[:, None]
    place = (start + tl.arange(0, _TILE)).to(tl.int64)[:, None]  # of a row in the plan, hence in hs
    g_rows = grad + (row * grad_stride)[:, None]

    z, w = _both_products(
        hs + place * D, g_rows, valid, down + pool_rows, up + pool_rows, has_down, live,
        ROWS=_TILE, RANK=RANK, D=D, BLOCK=DOWN_BLOCK, STAGES=STAGES, FULL=FULL,
    )  # fmt: skip
    z = pre_activation(z, has_down, c)
    p = _slope_times(z, w, code, live)
    if need_pool != 0:
        kept = place * _KEPT + r[None, :]
        keep = valid[:, None] & live[None, :]
        tl.store(p_kept + kept, p, mask=keep)
        tl.store(v_kept + kept, activated(z, code, live), mask=keep)
    if need_h != 0:
        p = tl.where(has_down[None, :], p, 0.0)
        dh_rows = dh + (row * D)[:, None]
        for begin in tl.range(0, D, UP_BLOCK, num_stages=STAGES):
            col = begin + tl.arange(0, UP_BLOCK)[None, :]
            inside = valid[:, None] & (col < D)
            g = tl.load(g_rows + col, mask=inside, other=0.0)  # [16, B]
            d = tl.load(down + pool_rows + col, mask=has_down[:, None] & (col < D), other=0.0)  # [R, B]
            delta = product(p, d, tl.zeros((_TILE, UP_BLOCK), tl.float32), FULL=FULL)
            tl.store(dh_rows + col, rounded(g.to(tl.float32) + delta, g.dtype), mask=inside)


@triton.jit
def _rows_by_rows(
    grad, dh, hs, down, up, bias, kind, rows, start, count, first, rank, n_rows, grad_stride,
    D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, WHOLE)  # all of d
    inside = col < D
    for i in range(count):
        row = tl.load(rows + start + i).to(tl.int64)
        if (row >= 0) & (row < n_rows):
            x = tl.load(hs + (start + i).to(tl.int64) * D + col, mask=inside, other=0.0)
            g = tl.load(grad + row * grad_stride + col, mask=inside, other=0.0)
            total = g.to(tl.float32)
            for r in range(rank):
                c, code, has_down = scalar_kind(bias, kind, first + r)
                if has_down:
                    d = tl.load(down + (first + r) * D + col, mask=inside, other=0.0).to(tl.float32)
                    u = tl.load(up + (first + r) * D + col, mask=inside, other=0.0).to(tl.float32)
                    z = tl.sum(x.to(tl.float32) * d, 0) + c
                    p = slope(z, code) * tl.sum(g.to(tl.float32) * u, 0)
                    total += p * d
            tl.store(dh + row * D + col, rounded(total, g.dtype), mask=inside)


@triton.jit(
    do_not_specialize=(*BATCH_SIZES, "need_h", "need_pool"), do_not_specialize_on_alignment=BATCH_TABLES
)
def backward_rows_kernel(
    grad,  # [n_rows, D], rows grad_stride apart
    dh,  # [n_rows, D] contiguous, a copy of grad; its edited rows are written
    hs,  # [n, D] contiguous
    down, up,  # [P, D]
    bias, kind,  # [P]
    p_kept, v_kept,  # [n, 64] float32
    rows,  # [n]
    tiles,  # [n_tiles, 3]
    spans,  # [S, 2]
    n_rows,
    grad_stride,
    need_h,  # 0 or 1
    need_pool,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
    DOWN_BLOCK: tl.constexpr,  # columns of d at a time in D h and U g, at rank ≤ 16; half (≥ 16) at rank ≤ 64
    UP_BLOCK: tl.constexpr,  # the same in p D
    STAGES: tl.constexpr,  # loads in flight, in blocks
    FULL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    segment = tl.load(tiles + 3 * tile)
    start = tl.load(tiles + 3 * tile + 1)
    count = tl.load(tiles + 3 * tile + 2)
    if (count <= 0) | (segment < 0):
        return
    first = tl.load(spans + 2 * segment).to(tl.int64)
    rank = tl.load(spans + 2 * segment + 1)
    if rank <= 0:
        return
    if rank <= 16:
        _rows_by_products(
            grad, dh, hs, down, up, bias, kind, p_kept, v_kept, rows, start, count, first, rank, n_rows,
            grad_stride, need_h, need_pool,
            D=D, RANK=16, DOWN_BLOCK=DOWN_BLOCK, UP_BLOCK=UP_BLOCK, STAGES=STAGES, FULL=FULL,
        )  # fmt: skip
    elif rank <= _KEPT:
        _rows_by_products(
            grad, dh, hs, down, up, bias, kind, p_kept, v_kept, rows, start, count, first, rank, n_rows,
            grad_stride, need_h, need_pool,
            D=D, RANK=64, DOWN_BLOCK=max(DOWN_BLOCK // 2, 16), UP_BLOCK=UP_BLOCK // 2, STAGES=STAGES,
            FULL=FULL,
        )  # fmt: skip
    elif need_h != 0:
        _rows_by_rows(
            grad, dh, hs, down, up, bias, kind, rows, start, count, first, rank, n_rows, grad_stride,
            D=D, WHOLE=WHOLE,
        )  # fmt: skip


@triton.jit(do_not_specialize=BATCH_SIZES, do_not_specialize_on_alignment=BATCH_TABLES)
def backward_pool_kernel(
    grad,  # [n_rows, D], rows grad_stride apart
    hs,  # [n, D] contiguous
    down, up,  # [P, D]
    bias, kind,  # [P]
    p_kept, v_kept,  # [n, 64] float32, of ranks up to 64
    ddown, dup,  # [P, D] out, or [splits, P, D] float32
    dbias,  # [P] out, or [splits, P]
    rows,  # [n]
    spans,  # [S, 2]
    offsets,  # [S + 1]
    n_rows,
    grad_stride,
    n_pool,
    n_segments,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # rows of hs at a time
    BLOCK: tl.constexpr,  # columns of d that a program sums
    AGAIN: tl.constexpr,  # columns at a time where z and w are computed again
    FULL: tl.constexpr,
):  # fmt: skip
    pool_first = tl.program_id(0).to(tl.int64) * _POOL_BLOCK
    pool_row = pool_first + tl.arange(0, _POOL_BLOCK)  # [16]
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total_d = tl.zeros((_POOL_BLOCK, BLOCK), tl.float32)
    total_u = tl.zeros((_POOL_BLOCK, BLOCK), tl.float32)
    total_c = tl.zeros((_POOL_BLOCK,), tl.float32)
    split, splits = tl.program_id(2), tl.num_programs(2)
    used = 0

    for segment in range(n_segments):
        first = tl.load(spans + 2 * segment).to(tl.int64)
        rank = tl.load(spans + 2 * segment + 1)
        if (first < pool_first + _POOL_BLOCK) & (first + rank > pool_first) & (rank > 0):
            used += 1
            within = pool_row - first
            live = (within >= 0) & (within < rank)
            has_down, c, code = pool_range(bias, kind, pool_row, live)
            sum_d = tl.zeros((_POOL_BLOCK, BLOCK), tl.float32)
            sum_u = tl.zeros((_POOL_BLOCK, BLOCK), tl.float32)
            sum_c = tl.zeros((_POOL_BLOCK,), tl.float32)
            end = tl.load(offsets + segment + 1)
            for begin in range(tl.load(offsets + segment) + split * ROWS, end, splits * ROWS):
                place = begin + tl.arange(0, ROWS)
                row = tl.load(rows + place, mask=place < end, other=-1).to(tl.int64)
                valid = (row >= 0) & (row < n_rows)
                place = place.to(tl.int64)[:, None]
                inside = valid[:, None] & (col < D)
                if rank <= _KEPT:
                    kept = place * _KEPT + within[None, :]
                    mask = valid[:, None] & live[None, :]
                    p = tl.load(p_kept + kept, mask=mask, other=0.0)  # [ROWS, 16]
                    v = tl.load(v_kept + kept, mask=mask, other=0.0)
                else:
                    z, w = _both_products(
                        hs + place * D, grad + (row * grad_stride)[:, None], valid,
                        down + (pool_row * D)[:, None], up + (pool_row * D)[:, None], has_down, live,
                        ROWS=ROWS, RANK=_POOL_BLOCK, D=D, BLOCK=AGAIN, STAGES=2, FULL=FULL,
                    )  # fmt: skip
                    z = pre_activation(z, has_down, c)
                    p = tl.where(valid[:, None], _slope_times(z, w, code, live), 0.0)
                    v = tl.where(valid[:, None], activated(z, code, live), 0.0)
                x = tl.load(hs + place * D + col, mask=inside, other=0.0)  # [ROWS, B]
                g = tl.load(grad + (row * grad_stride)[:, None] + col, mask=inside, other=0.0)
                sum_d = product(tl.trans(p), x, sum_d, FULL=FULL)
                sum_u = product(tl.trans(v), g, sum_u, FULL=FULL)
                sum_c += tl.sum(p, 0)
            # Select, since 0 · Inf of another segment's h must not reach this one's pool rows.
            total_d = tl.where(has_down[:, None], total_d + sum_d, total_d)
            total_u = tl.where(live[:, None], total_u + sum_u, total_u)
            total_c += sum_c

    if (used > 0) | (splits == 1):
        own = split * n_pool + pool_row
        out = (own * D)[:, None] + col
        inside = (pool_row < n_pool)[:, None] & (col < D)
        tl.store(ddown + out, rounded(total_d, ddown.dtype.element_ty), mask=inside)
        tl.store(dup + out, rounded(total_u, dup.dtype.element_ty), mask=inside)
        if tl.program_id(1) == 0:
            tl.store(dbias + own, total_c, mask=pool_row < n_pool)


@triton.jit(do_not_specialize=BATCH_SIZES, do_not_specialize_on_alignment=BATCH_TABLES)
def backward_add_kernel(
    parts_d, parts_u,  # [splits, P, D] float32
    parts_c,  # [splits, P]
    ddown, dup,  # [P, D] out
    dbias,  # [P] out
    spans,  # [S, 2]
    n_pool,
    n_segments,
    n_splits,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum over splits, in order, of one pool row and block of d; 0 where no segment names the row."""
    pool_row = tl.program_id(0).to(tl.int64)
    used = 0
    for segment in range(n_segments):
        first = tl.load(spans + 2 * segment)
        if (pool_row >= first) & (pool_row < first + tl.load(spans + 2 * segment + 1)):
            used = 1
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < D
    sum_d = tl.zeros((BLOCK,), tl.float32)
    sum_u = tl.zeros((BLOCK,), tl.float32)
    sum_c = 0.0
    for split in range(n_splits * used):
        own = split * n_pool + pool_row
        sum_d += tl.load(parts_d + own * D + col, mask=inside, other=0.0)
        sum_u += tl.load(parts_u + own * D + col, mask=inside, other=0.0)
        sum_c += tl.load(parts_c + own)
    tl.store(ddown + pool_row * D + col, rounded(sum_d, ddown.dtype.element_ty), mask=inside)
    tl.store(dup + pool_row * D + col, rounded(sum_u, dup.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(dbias + pool_row, sum_c)
