"""The kernels that keep norms: a row's norm, a row scaled to a norm, and the gradients of that.

One program for each place in a tile, which holds its row in registers; the grid is [tiles, TILE]. The order
of a sum follows from how Triton lays a row out over threads. So nothing is compiled anew for what addresses
and strides are divisible by, which leaves d to decide it. And products are not fused with sums, so that norms
before and behind an edit are the same sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import rounded
from .kernels_forward import tile_entry

#: Arguments of which no kernel is compiled anew.
SIZES = ("n_rows", "row_stride")
TABLES = ("h", "grad", "dh", "hs", "norms", "dnorms", "rows", "tiles", "spans")

_ONE = tl.constexpr(127 << 23)  # 1.0 as bits; a power of two adds to the exponent
_EXPONENT = tl.constexpr(0x7F800000)
_PLAIN = tl.constexpr(40 << 23)  # between 2⁻⁴⁰ and 2⁴⁰ squares and their sums stay within float32
_MOST = tl.constexpr(100 << 23)  # and a row scaled by this does, whatever it holds


@triton.jit
def _place(rows, tiles, spans, n_rows):
    """(place in the plan, row of h) of this program, and whether it has a row that keeps its norm."""
    segment, start, count = tile_entry(tiles, tl.program_id(0))
    live = (segment >= 0) & (tl.program_id(1) < count)
    rank = tl.load(spans + 2 * segment + 1, mask=live, other=0)
    place = start + tl.program_id(1)
    row = tl.load(rows + place, mask=live & (rank > 0), other=-1).to(tl.int64)
    return place.to(tl.int64), row, (row >= 0) & (row < n_rows)


@triton.jit
def _scale_of(x):
    """2ᵏ and 2⁻ᵏ for a row x in float32: about its largest element where squares would overflow or vanish.

    Elsewhere they are 1.
    """
    largest = tl.max(x.to(tl.int32, bitcast=True) & _EXPONENT, 0)
    held = tl.minimum(tl.maximum(largest, _ONE - _MOST), _ONE + _MOST)
    bits = tl.where((largest >= _ONE - _PLAIN) & (largest <= _ONE + _PLAIN), _ONE, held)
    inverse = bits * -1 + 2 * _ONE
    return bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def row_norms_kernel(
    h,  # [n_rows, D], rows row_stride apart
    norms,  # [n] float32, zeros before
    rows, tiles, spans, n_rows, row_stride,
    D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    place, row, live = _place(rows, tiles, spans, n_rows)
    if live:
        col = tl.arange(0, WHOLE)
        x = tl.load(h + row * row_stride + col, mask=col < D, other=0.0).to(tl.float32)
        scale, inverse = _scale_of(x)
        x *= inverse
        tl.store(norms + place, scale * tl.sqrt_rn(tl.sum(x * x, 0)))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def restore_norms_kernel(
    h,  # [n_rows, D], rows row_stride apart; scaled
    norms,  # [n] float32
    rows, tiles, spans, n_rows, row_stride,
    D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    place, row, live = _place(rows, tiles, spans, n_rows)
    if live:
        col = tl.arange(0, WHOLE)
        at = h + row * row_stride + col
        y = tl.load(at, mask=col < D, other=0.0)
        scale, inverse = _scale_of(y.to(tl.float32))
        x = y.to(tl.float32) * inverse
        length = tl.sqrt_rn(tl.sum(x * x, 0))
        norm = tl.load(norms + place)
        if (length != 0.0) & (scale * length != norm):
            tl.store(at, rounded(x * (norm / length), y.dtype), mask=col < D)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TABLES)
def restore_norms_backward_kernel(
    grad,  # [n_rows, D], rows row_stride apart
    dh,  # [n_rows, D] contiguous, a copy of grad; its scaled rows are written
    hs,  # [n, D] contiguous
    norms,  # [n] float32
    dnorms,  # [n] float32, zeros before
    rows, tiles, spans, n_rows, row_stride,
    D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    place, row, live = _place(rows, tiles, spans, n_rows)
    if live:
        col = tl.arange(0, WHOLE)
        x = tl.load(hs + place * D + col, mask=col < D, other=0.0).to(tl.float32)
        scale, inverse = _scale_of(x)
        x *= inverse
        g = tl.load(grad + row * row_stride + col, mask=col < D, other=0.0)
        norm = tl.load(norms + place)
        length = tl.sqrt_rn(tl.sum(x * x, 0))
        along = tl.sum(x * g.to(tl.float32), 0) / length
        factor = tl.where(scale * length == norm, 1.0, norm / length * inverse)
        value = factor * (g.to(tl.float32) - x * (along / length))
        zero = length == 0.0
        tl.store(dh + row * D + col, rounded(tl.where(zero, 0.0, value), g.dtype), mask=col < D)
        tl.store(dnorms + place, tl.where(zero, 0.0, along))
