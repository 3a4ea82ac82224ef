"""The forward kernel with the norm that follows: edits a tile's rows, then norms all of them.

The norm is a pass of its own, one row at a time, and the only form that a norm takes: whether a row was
edited, at which rank, and what shares its tile make no difference to it. docs/triton.md says why the sums
are not taken during the edit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..schema import Norm
from .blocks import BATCH_SIZES, BATCH_TABLES, rounded
from .kernels_forward import edit_tile, tile_entry

_PLUS_ONE = tl.constexpr(int(Norm.PLUS_ONE))
_ROUND = tl.constexpr(int(Norm.ROUND))


@triton.jit
def _normed(x, weight, eps, norm, inside, D: tl.constexpr, CENTRED: tl.constexpr):
    """x / sqrt(mean(x²) + eps) · weight in float32, for a whole row x, 0 where not `inside`."""
    y = x.to(tl.float32)
    if CENTRED:
        y = tl.where(inside, y - tl.sum(y, 0) / D, 0.0)
    y *= tl.rsqrt(tl.sum(y * y, 0) / D + eps)
    return tl.where((norm & _ROUND) != 0, rounded(y, x.dtype).to(tl.float32), y) * weight


@triton.jit(do_not_specialize=(*BATCH_SIZES, "norm"), do_not_specialize_on_alignment=BATCH_TABLES)
def intervene_norm_kernel(
    h,  # [n_rows, D], rows row_stride apart; edited
    out,  # [n_rows, D] contiguous, h's dtype
    weight,  # [D], h's dtype
    shift,  # [D], h's dtype, or None
    down, up,  # [P, D]
    bias, kind,  # [P]
    rows,  # [n]
    tiles,  # [n_tiles, 3]; segment −1 edits nothing
    spans,  # [S, 2]
    n_rows,
    row_stride,
    eps,
    norm,  # of its flags CENTRED is known when compiled: without it there is one sum less to wait for
    CENTRED: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,  # D rounded up to a power of two
    BLOCK: tl.constexpr,  # as in intervene_kernel, for the same bits
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    ALONE: tl.constexpr,
    SHARED: tl.constexpr,
    NORM_STAGES: tl.constexpr,  # rows of the norm in flight
    FULL: tl.constexpr,
):  # fmt: skip
    segment, start, count = tile_entry(tiles, tl.program_id(0))
    if count > 0:
        if segment >= 0:
            edit_tile(
                h, down, up, bias, kind, rows, spans, segment, start, count, n_rows, row_stride,
                D=D, WHOLE=WHOLE, BLOCK=BLOCK, PARTS=PARTS, SLICES=SLICES, ALONE=ALONE, SHARED=SHARED,
                FULL=FULL,
            )  # fmt: skip
        col = tl.arange(0, WHOLE)
        inside = col < D
        scale = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
        scale += tl.where((norm & _PLUS_ONE) != 0, 1.0, 0.0)
        # Below, threads read what other threads of the block wrote above. The barrier orders a block's
        # accesses to global memory too, and no load moves above it; Triton by itself sets barriers for shared
        # memory only. (Within the edit none is needed: what a thread stores to a place is made of what was
        # loaded from there, by whichever thread.)
        tl.debug_barrier()
        for i in tl.range(0, count, num_stages=NORM_STAGES):
            row = tl.load(rows + start + i).to(tl.int64)
            valid = col < tl.where((row >= 0) & (row < n_rows), D, 0)
            x = tl.load(h + row * row_stride + col, mask=valid, other=0.0)
            y = _normed(x, scale, eps, norm, inside, D=D, CENTRED=CENTRED)
            if shift is not None:
                y += tl.load(shift + col, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + row * D + col, rounded(y, x.dtype), mask=valid)
