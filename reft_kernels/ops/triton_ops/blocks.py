"""Loads and products that the forward and backward kernels share.

Shapes: T = 16 rows of h (a tile), R pool rows, B columns of d.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from ..schema import ACT_MASK, NO_PRODUCT, TILE
from .activations import activate

#: Whether kernels are interpreted on the CPU; fixed when this module is imported.
INTERPRETING: bool = bool(knobs.runtime.interpret)

#: Largest rank whose p and v the backward keeps between its two kernels.
LOW_RANK: int = 64

#: Arguments that differ from batch to batch. Triton would compile anew for sizes of 1 or divisible by 16 and
#: for addresses that are: a stall, and another kernel for the same row.
BATCH_SIZES = ("n_rows", "n_pool", "n_segments", "n_splits")
BATCH_TABLES = ("rows", "tiles", "spans", "offsets")

_INTERPRETING = tl.constexpr(INTERPRETING)
_ACT_MASK = tl.constexpr(ACT_MASK)
_NO_PRODUCT = tl.constexpr(NO_PRODUCT)
_TILE = tl.constexpr(TILE)


@triton.jit
def split(a):
    """a = high + low in float32: high with the 11 significant bits that TF32 holds, low with the next.

    Inf and NaN are high's, and high stays a NaN in TF32, which drops the last 13 bits. Where a half would be
    0 and a is not, it is the least normal number of a's sign: 0 times an Inf of the other operand would be
    NaN, where a times it is Inf. Any sum loses a number that small.
    """
    bits = a.to(tl.int32, bitcast=True)
    high = tl.where(a == a, bits & -8192, bits | 0x400000).to(tl.float32, bitcast=True)
    low = a - high
    least = tl.where(a == 0.0, 0, 0x800000 | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(high == 0.0, least, high), tl.where(tl.abs(low) > 0.0, low, least)


@triton.jit
def product(a, b, acc, FULL: tl.constexpr):
    """acc + a @ b, summed in float32 in an order that depends on the shapes only.

    16-bit operands of one dtype multiply exactly, and so does one of them with both TF32 halves of a
    float32 operand (21 bits or more). Two float32 operands: in full if FULL (for rows of h in float32),
    otherwise to 21 bits, where a 16-bit result has 11 at most.
    """
    if _INTERPRETING:
        # Its tl.dot multiplies the bits of a bfloat16 as integers, and is a BLAS whose order of summation
        # depends on where in the tile a row stands.
        if len(a.shape) == 3:
            acc += tl.sum(a.to(tl.float32)[:, :, :, None] * b.to(tl.float32)[:, None, :, :], 2)
        else:
            acc += tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    elif FULL:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == b.dtype and a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    elif a.dtype == b.dtype:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    elif a.dtype == tl.float32:
        high, low = split(a)
        acc = tl.dot(low, b.to(tl.float32), acc, input_precision="tf32")
        acc = tl.dot(high, b.to(tl.float32), acc, input_precision="tf32")
    else:
        high, low = split(b)
        acc = tl.dot(a.to(tl.float32), low, acc, input_precision="tf32")
        acc = tl.dot(a.to(tl.float32), high, acc, input_precision="tf32")
    return acc


@triton.jit
def _paired(x):
    """[..., 2 n] as two of [..., n]: what lies at even places, and at odd ones."""
    return tl.split(tl.reshape(x, _in_pairs(x.shape)))


@triton.jit
def sum_in_pairs(x):
    """The sum over the first axis of x [N, T, R], N a power of two: neighbours, then neighbouring sums, …

    The order is the same wherever Triton keeps the numbers. `tl.sum` adds first what a thread holds, then
    what a warp holds; and a tile of another height is held by other threads.
    """
    x = tl.permute(x, (1, 2, 0))
    for _ in tl.static_range(_doublings(x.shape[-1])):
        even, odd = _paired(x)
        x = even + odd
    return tl.reshape(x, _without_the_last(x.shape))


@triton.jit
def chosen(x, i):
    """x[i] of x [N, T, R], N a power of two, for an i that is known when the kernel runs; NaN and −0 too."""
    x = tl.permute(x, (1, 2, 0))
    for bit in tl.static_range(_doublings(x.shape[-1])):
        even, odd = _paired(x)
        x = tl.where((i >> bit) % 2 == 0, even, odd)
    return tl.reshape(x, _without_the_last(x.shape))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest, ties to even."""
    if _INTERPRETING and DTYPE == tl.bfloat16:
        # The interpreter truncates, and gets subnormals wrong: round by the bits. NaN stays a NaN.
        bits = x.to(tl.int32, bitcast=True)
        carried = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, carried, bits | 0x400000)
        out = (bits >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        out = x.to(DTYPE)
    return out


@triton.constexpr_function
def _doublings(size):
    return size.bit_length() - 1


@triton.constexpr_function
def _in_pairs(shape):
    return [*shape[:-1], shape[-1] // 2, 2]


@triton.constexpr_function
def _without_the_last(shape):
    return [*shape[:-1]]


@triton.constexpr_function
def bytes_of(pointer):
    """Size of what a pointer points to."""
    return pointer.type.element_ty.primitive_bitwidth // 8


@triton.constexpr_function
def stages(budget, width, block, bytes_of_a_column, most):
    """Stages of a loop over `width` columns: one more than blocks in flight, which fill `budget` bytes.

    Each stage holds registers, so there are `most` blocks at most; all of `width`, and at least two.
    """
    return 1 + max(2, min(most, triton.cdiv(width, block), budget // (block * bytes_of_a_column)))


@triton.constexpr_function
def least_height(columns, bytes_of_an_entry, threads):
    """Rows of a tile that give each thread, `columns` at a time, the 4 bytes of an asynchronous copy.

    Rows that the tile lacks are masked and read nothing. Every thread would wait for a load of 2 bytes.
    """
    return 1 if bytes_of_an_entry >= 4 else max(1, 2 * threads // columns)


@triton.jit
def tile_rows(rows, start, count, n_rows, HEIGHT: tl.constexpr, COPIES: tl.constexpr = 1):
    """The first HEIGHT rows of a tile, COPIES times, and which are real (not padding, not beyond h)."""
    lane = tl.arange(0, HEIGHT * COPIES) % HEIGHT
    row = tl.load(rows + start + lane, mask=lane < count, other=-1)
    return row.to(tl.int64), (row >= 0) & (row < n_rows)


@triton.jit
def pool_range(bias, kind, pool_row, live):
    """Of pool rows [R]: which have a D, c and activation code; nothing is read where `live` is false."""
    k = tl.load(kind + pool_row, mask=live, other=0)
    c = tl.load(bias + pool_row, mask=live, other=0.0)
    return live & ((k & _NO_PRODUCT) == 0), c, k & _ACT_MASK


@triton.jit
def pre_activation(z, has_down, c):
    """D h + c, and c alone where there is no D (a product that was not read is 0, but 0 · Inf is not)."""
    return tl.where(has_down[None, :], z, 0.0) + c[None, :]


@triton.jit
def activated(z, code, live):
    """φ(z) [T, R], 0 outside of the range: Inf in a row of h must not meet a U that is not there."""
    v = z
    if tl.max(code, 0) > 0:
        v = activate(z, code[None, :])
    return tl.where(live[None, :], v, 0.0)


@triton.jit
def scalar_kind(bias, kind, r):
    """(c, activation code, whether it has a D) of one pool row."""
    k = tl.load(kind + r)
    return tl.load(bias + r), k & _ACT_MASK, (k & _NO_PRODUCT) == 0
