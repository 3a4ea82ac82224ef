"""The forward kernel: h[rows] += Uᵀ φ(D h[rows] + c), in place, one program for each tile of a plan.

Chosen by the rank of the pool range, so that a row's result does not depend on its batch:

products (rank ≤ 256)  z = h Dᵀ over d in blocks, v = φ(z + c), then h += v U over d in blocks, by tensor
                       cores. Pool rows are taken eight at a time at rank ≤ 8, else 16.
rows (any rank)        one row of h at a time, kept in registers, while the pool rows pass by.

A row alone in its tile (a decode step) takes the products at the least height whose loads of h are
asynchronous, 1, 2 or 4 in place of 16, with the same bits. docs/triton.md has the reasons for each form, for
slices and for parts. Every sum is float32 in an order fixed by d and the rank.
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
    bytes_of,
    chosen,
    least_height,
    pool_range,
    pre_activation,
    product,
    rounded,
    scalar_kind,
    stages,
    sum_in_pairs,
    tile_rows,
)

_NARROW = tl.constexpr(8)  # the rank of most adapters
_CHUNK = tl.constexpr(16)
_CHUNKS = tl.constexpr(16)


@triton.jit
def _on_the_diagonal(v, PARTS: tl.constexpr):
    """v [T, R] to [PARTS T, PARTS R]: (v 0; 0 v)."""
    part = tl.arange(0, PARTS)
    same = part[:, None, None, None] == part[None, None, :, None]
    return tl.reshape(tl.where(same, v[None, :, None, :], 0.0), (PARTS * v.shape[0], PARTS * v.shape[1]))


@triton.jit
def _edit_by_products(
    h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
    D: tl.constexpr, HEIGHT: tl.constexpr, RANK: tl.constexpr, CHUNKS: tl.constexpr, DOWN_BLOCK: tl.constexpr,
    UP_BLOCK: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr, SHARED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    row, valid = tile_rows(rows, start, count, n_rows, HEIGHT=HEIGHT)  # [T]
    h_rows = h + (row * row_stride)[:, None]
    lane = tl.arange(0, RANK)
    chunks = 1 if CHUNKS == 1 else tl.cdiv(rank, RANK)
    number = tl.arange(0, CHUNKS)[:, None, None]
    COLUMN: tl.constexpr = HEIGHT * bytes_of(h) + RANK * bytes_of(down)
    MOST: tl.constexpr = 8 if CHUNKS == 1 else 6
    DOWN_STAGES: tl.constexpr = stages(SHARED, D, DOWN_BLOCK, COLUMN, MOST)
    UP_STAGES: tl.constexpr = stages(SHARED, D, UP_BLOCK, COLUMN, MOST)

    vs = tl.zeros((CHUNKS, HEIGHT, RANK), tl.float32)
    WIDTH: tl.constexpr = DOWN_BLOCK // SLICES
    slices = tl.arange(0, SLICES)[:, None, None] * WIDTH
    x_col = slices + tl.arange(0, WIDTH)[None, None, :]  # [S, 1, B / S]
    d_col = slices + tl.arange(0, WIDTH)[None, :, None]  # [S, B / S, 1]
    for chunk in range(chunks):
        pool_row = first + chunk * RANK + lane
        live = chunk * RANK + lane < rank
        has_down, c, code = pool_range(bias, kind, pool_row, live)  # [R]
        down_rows = down + (pool_row * D)[None, None, :]
        z = tl.zeros((SLICES, HEIGHT, RANK), tl.float32)
        end = D
        if bytes_of(down) == 2:
            # Nothing to read where no row has a D. And LLVM unrolls a loop of known length, which at the 128
            # registers of 16-bit pools (of float32 ones it does no harm) spills.
            end = D * tl.max(has_down.to(tl.int32), 0)
        for begin in tl.range(0, end, DOWN_BLOCK, num_stages=DOWN_STAGES):
            inside = valid[None, :, None] & (begin + x_col < D)
            x = tl.load(h_rows[None] + begin + x_col, mask=inside, other=0.0)  # [S, T, B / S]
            there = has_down[None, None, :] & (begin + d_col < D)
            d = tl.load(down_rows + begin + d_col, mask=there, other=0.0)  # [S, B / S, R]
            z = product(x, d, z, FULL=FULL)
        v = activated(pre_activation(sum_in_pairs(z), has_down, c), code, live)  # [T, R]
        vs = tl.where(number == chunk, v[None], vs)

    # The parts of a block lie below each other, h [parts T, B / parts] and U [parts R, B / parts].
    if PARTS > 1:
        row, valid = tile_rows(rows, start, count, n_rows, HEIGHT=HEIGHT, COPIES=PARTS)
        h_rows = h + (row * row_stride)[:, None]
    PART: tl.constexpr = UP_BLOCK // PARTS
    h_col = (tl.arange(0, PARTS * HEIGHT) // HEIGHT * PART)[:, None] + tl.arange(0, PART)[None, :]
    u_lane = tl.arange(0, PARTS * RANK) % RANK
    u_col = (tl.arange(0, PARTS * RANK) // RANK * PART)[:, None] + tl.arange(0, PART)[None, :]
    # One loop over blocks and the chunks of each, so that loads never wait for a block to end.
    total = tl.zeros((PARTS * HEIGHT, PART), tl.float32)
    for step in tl.range(0, tl.cdiv(D, UP_BLOCK) * chunks, num_stages=UP_STAGES):
        chunk = step % chunks
        is_last = chunk == chunks - 1
        begin = step // chunks * UP_BLOCK
        inside = valid[:, None] & (begin + h_col < tl.where(is_last, D, 0))
        x = tl.load(h_rows + begin + h_col, mask=inside, other=0.0)
        up_rows = up + ((first + chunk * RANK + u_lane) * D)[:, None]
        live = chunk * RANK + u_lane < rank
        u = tl.load(up_rows + begin + u_col, mask=live[:, None] & (begin + u_col < D), other=0.0)
        v = chosen(vs, chunk)
        if PARTS > 1:
            v = _on_the_diagonal(v, PARTS=PARTS)
        total = product(v, u, total, FULL=FULL)
        tl.store(h_rows + begin + h_col, rounded(x.to(tl.float32) + total, x.dtype), mask=inside)
        total = tl.where(is_last, 0.0, total)


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
    D: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
    ALONE: tl.constexpr, SHARED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Edits the rows of one tile. Both kernels come here, so an edited row has the same bits from either."""
    first = tl.load(spans + 2 * segment).to(tl.int64)
    rank = tl.load(spans + 2 * segment + 1)
    HALF: tl.constexpr = BLOCK // 2
    # The least heights for blocks of that many columns.
    LOW: tl.constexpr = least_height(BLOCK, bytes_of(h), 32 * SLICES)
    LOW_OF_HALF: tl.constexpr = least_height(HALF, bytes_of(h), 32 * SLICES)
    if rank > _CHUNK * _CHUNKS:
        _edit_by_rows(
            h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride, D=D, WHOLE=WHOLE
        )
    elif rank > _CHUNK:
        if (count == 1) & ALONE:
            _edit_by_products(
                h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
                D=D, HEIGHT=LOW_OF_HALF, RANK=_CHUNK, CHUNKS=_CHUNKS, DOWN_BLOCK=HALF, UP_BLOCK=HALF,
                PARTS=1, SLICES=SLICES, SHARED=SHARED, FULL=FULL,
            )  # fmt: skip
        else:
            _edit_by_products(
                h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
                D=D, HEIGHT=_TILE, RANK=_CHUNK, CHUNKS=_CHUNKS, DOWN_BLOCK=HALF, UP_BLOCK=HALF // 2,
                PARTS=1, SLICES=SLICES, SHARED=SHARED, FULL=FULL,
            )  # fmt: skip
    elif rank > _NARROW:
        if (count == 1) & ALONE:
            _edit_by_products(
                h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
                D=D, HEIGHT=LOW_OF_HALF, RANK=_CHUNK, CHUNKS=1, DOWN_BLOCK=HALF, UP_BLOCK=HALF,
                PARTS=1, SLICES=SLICES, SHARED=SHARED, FULL=FULL,
            )  # fmt: skip
        else:
            _edit_by_products(
                h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
                D=D, HEIGHT=_TILE, RANK=_CHUNK, CHUNKS=1, DOWN_BLOCK=HALF, UP_BLOCK=HALF // 2,
                PARTS=1, SLICES=SLICES, SHARED=SHARED, FULL=FULL,
            )  # fmt: skip
    elif rank > 0:
        if (count == 1) & ALONE:
            _edit_by_products(
                h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
                D=D, HEIGHT=LOW, RANK=_NARROW, CHUNKS=1, DOWN_BLOCK=BLOCK, UP_BLOCK=BLOCK,
                PARTS=PARTS, SLICES=SLICES, SHARED=SHARED, FULL=FULL,
            )  # fmt: skip
        else:
            _edit_by_products(
                h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
                D=D, HEIGHT=_TILE, RANK=_NARROW, CHUNKS=1, DOWN_BLOCK=BLOCK, UP_BLOCK=BLOCK,
                PARTS=PARTS, SLICES=SLICES, SHARED=SHARED, FULL=FULL,
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
    BLOCK: tl.constexpr,  # columns of d at a time at rank ≤ 8, a part of it beyond
    PARTS: tl.constexpr,  # of a block in v U at rank ≤ 8, one product for all
    SLICES: tl.constexpr,  # of a block in D h, one for each warp
    ALONE: tl.constexpr,  # whether a row alone in its tile has a form of its own
    SHARED: tl.constexpr,  # bytes of blocks in flight
    FULL: tl.constexpr,
):  # fmt: skip
    segment, start, count = tile_entry(tiles, tl.program_id(0))
    if (count > 0) & (segment >= 0):
        edit_tile(
            h, down, up, bias, kind, rows, spans, segment, start, count, n_rows, row_stride,
            D=D, WHOLE=WHOLE, BLOCK=BLOCK, PARTS=PARTS, SLICES=SLICES, ALONE=ALONE, SHARED=SHARED, FULL=FULL,
        )  # fmt: skip


@triton.jit(do_not_specialize=BATCH_SIZES, do_not_specialize_on_alignment=BATCH_TABLES)
def fold_kernel(
    h,  # [n_rows, D], rows row_stride apart; becomes h + addend where a tile has an edit
    addend,  # [n_rows, D], rows addend_stride apart; becomes 0 there
    rows,  # [n]
    tiles,  # [n_tiles, 3]
    spans,  # [S, 2]
    n_rows,
    row_stride,
    addend_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment, start, count = tile_entry(tiles, tl.program_id(0))
    if (count > 0) & (segment >= 0):
        if tl.load(spans + 2 * segment + 1) > 0:
            for i in range(count):
                row = tl.load(rows + start + i).to(tl.int64)
                end = tl.where((row >= 0) & (row < n_rows), D, 0)
                for begin in range(0, D, BLOCK):
                    col = begin + tl.arange(0, BLOCK)
                    inside = col < end
                    to, other = h + row * row_stride + col, addend + row * addend_stride + col
                    x = tl.load(to, mask=inside, other=0.0)
                    y = tl.load(other, mask=inside, other=0.0)
                    tl.store(to, rounded(x.to(tl.float32) + y.to(tl.float32), x.dtype), mask=inside)
                    tl.store(other, tl.zeros_like(y), mask=inside)
