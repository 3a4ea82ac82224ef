"""The forward kernel: h[rows] += Uᵀ φ(D h[rows] + c), in place, one program for each tile of a plan.

Two forms, chosen by the rank of the pool range and by nothing else, so that a row's result does not
depend on what shares its tile or batch:

matrix products (rank ≤ 64)  z [16, R] = h Dᵀ over d in blocks, v = φ(z + c), then h += v U over d in
                             blocks. A tile with fewer rows masks the rest: they cost no bytes, and the
                             tensor cores' idle lanes cost nothing where bytes and latency bind. h is
                             read twice (the second time from L2), the pool rows once.
rows (any rank)              one row of h at a time, kept in registers with the float32 sum, while the
                             pool rows pass by. All z of a row need h before the edit, and the sum must
                             be rounded once: without room for rank-many v this is what is left. Slower,
                             since a tile's rows share no load of the pool.

Every sum is float32 in an order fixed by d and the rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate
from .blocks import (
    _TILE,
    BATCH_SIZES,
    BATCH_TABLES,
    activated,
    pool_range,
    pre_activation,
    product,
    rounded,
    scalar_kind,
    tile_rows,
)


@triton.jit
def _edit_by_products(
    h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
    D: tl.constexpr, RANK: tl.constexpr, DOWN_BLOCK: tl.constexpr, UP_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    row, valid = tile_rows(rows, start, count, n_rows)  # [16]
    live = tl.arange(0, RANK) < rank
    pool_row = first + tl.arange(0, RANK)
    has_down, c, code = pool_range(bias, kind, pool_row, live)  # [R]
    h_rows = h + (row * row_stride)[:, None]
    pool_rows = (pool_row * D)[:, None]

    z = tl.zeros((_TILE, RANK), tl.float32)
    for begin in tl.range(0, D, DOWN_BLOCK, num_stages=STAGES):
        col = begin + tl.arange(0, DOWN_BLOCK)[None, :]
        x = tl.load(h_rows + col, mask=valid[:, None] & (col < D), other=0.0)  # [16, B]
        d = tl.load(down + pool_rows + col, mask=has_down[:, None] & (col < D), other=0.0)  # [R, B]
        z = product(x, tl.trans(d), z, FULL)
    v = activated(pre_activation(z, has_down, c), code, live)  # [16, R]

    for begin in tl.range(0, D, UP_BLOCK, num_stages=STAGES):
        col = begin + tl.arange(0, UP_BLOCK)[None, :]
        inside = valid[:, None] & (col < D)
        x = tl.load(h_rows + col, mask=inside, other=0.0)  # [16, B]
        u = tl.load(up + pool_rows + col, mask=live[:, None] & (col < D), other=0.0)  # [R, B]
        delta = product(v, u, tl.zeros((_TILE, UP_BLOCK), tl.float32), FULL)
        tl.store(h_rows + col, rounded(x.to(tl.float32) + delta, x.dtype), mask=inside)


@triton.jit
def _edit_by_rows(
    h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
    D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, WHOLE)  # all of d
    inside = col < D
    for i in range(count):
        row = tl.load(rows + start + i).to(tl.int64)
        if (row >= 0) & (row < n_rows):
            x = tl.load(h + row * row_stride + col, mask=inside, other=0.0)
            total = x.to(tl.float32)
            for r in range(rank):
                c, code, has_down = scalar_kind(bias, kind, first + r)
                z = c
                if has_down:
                    d = tl.load(down + (first + r) * D + col, mask=inside, other=0.0)
                    z += tl.sum(x.to(tl.float32) * d.to(tl.float32), 0)
                u = tl.load(up + (first + r) * D + col, mask=inside, other=0.0)
                total += activate(z, code) * u.to(tl.float32)
            tl.store(h + row * row_stride + col, rounded(total, x.dtype), mask=inside)


@triton.jit
def tile_entry(tiles, tile):
    """(segment, start, count) of a tile."""
    entry = tiles + 3 * tile
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def edit_tile(
    h, down, up, bias, kind, rows, spans, segment, start, count, n_rows, row_stride,
    D: tl.constexpr, WHOLE: tl.constexpr, DOWN_BLOCK: tl.constexpr, UP_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Edits the rows of one tile. Both kernels come here, so an edited row has the same bits from either."""
    first = tl.load(spans + 2 * segment).to(tl.int64)
    rank = tl.load(spans + 2 * segment + 1)
    if rank > 64:
        _edit_by_rows(h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride, D, WHOLE)
    elif rank > 16:
        _edit_by_products(
            h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
            D, 64, DOWN_BLOCK // 2, UP_BLOCK // 2, STAGES, FULL,
        )  # fmt: skip
    elif rank > 0:
        _edit_by_products(
            h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
            D, 16, DOWN_BLOCK, UP_BLOCK, STAGES, FULL,
        )  # fmt: skip


@triton.jit(do_not_specialize=BATCH_SIZES, do_not_specialize_on_alignment=BATCH_TABLES)
def intervene_kernel(
    h,  # [n_rows, D], rows row_stride apart; edited
    down, up,  # [P, D]
    bias, kind,  # [P]
    rows,  # [n]
    tiles,  # [n_tiles, 3]
    spans,  # [S, 2]
    n_rows,
    row_stride,
    D: tl.constexpr,
    WHOLE: tl.constexpr,  # D rounded up to a power of two
    DOWN_BLOCK: tl.constexpr,  # columns of d at a time in D h, at rank ≤ 16; half of it at rank ≤ 64
    UP_BLOCK: tl.constexpr,  # the same in v U
    STAGES: tl.constexpr,  # loads in flight, in blocks
    FULL: tl.constexpr,
):  # fmt: skip
    segment, start, count = tile_entry(tiles, tl.program_id(0))
    if (count > 0) & (segment >= 0):
        edit_tile(
            h, down, up, bias, kind, rows, spans, segment, start, count, n_rows, row_stride,
            D, WHOLE, DOWN_BLOCK, UP_BLOCK, STAGES, FULL,
        )  # fmt: skip
