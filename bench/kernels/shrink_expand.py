"""The two Triton kernels of the shrink+expand peer; imported only where Triton can run."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Elements of d in one block of either kernel.
BLOCK_D = 512


@triton.jit
def _shrink(h, down, index, inner, width, rank: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """inner[row, :] += D h over one block of d. h [T, d], down [A, r, d], inner [T, r] fp32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.arange(0, RANK)
    inside = columns < width
    adapter = tl.load(index + row).to(tl.int64)
    x = tl.load(h + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    places = (adapter * rank + ranks[:, None]) * width + columns[None, :]
    d = tl.load(down + places, mask=(ranks[:, None] < rank) & inside[None, :], other=0.0).to(tl.float32)
    tl.atomic_add(inner + row * rank + ranks, tl.sum(d * x[None, :], axis=1), mask=ranks < rank)


@triton.jit
def _expand(h, up, bias, index, inner, width, rank: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """h[row, :] += Uᵀ (inner + c) for one block of d. up [A, r, d], bias [A, r]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ranks = tl.arange(0, RANK)
    inside = columns < width
    there = ranks < rank
    adapter = tl.load(index + row).to(tl.int64)
    v = tl.load(inner + row * rank + ranks, mask=there, other=0.0)
    v += tl.load(bias + adapter * rank + ranks, mask=there, other=0.0).to(tl.float32)
    places = (adapter * rank + ranks[:, None]) * width + columns[None, :]
    u = tl.load(up + places, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    x = tl.load(h + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = x + tl.sum(u * v[:, None], axis=0)
    tl.store(h + row * width + columns, y.to(h.dtype.element_ty), mask=inside)


def shrink_expand_(h: Tensor, down: Tensor, up: Tensor, bias: Tensor, index: Tensor, inner: Tensor) -> None:
    """h ← h + Uᵀ(D h + c) in place, each row with its own adapter.

    Args:
        h: [T, d] contiguous. down, up: [A, r, d]. bias: [A, r]. index: [T] int64.
        inner: [T, r] float32, overwritten.
    """
    rows, width = h.shape
    rank = down.shape[1]
    inner.zero_()
    grid = (rows, triton.cdiv(width, BLOCK_D))
    shape = {"rank": rank, "RANK": triton.next_power_of_2(rank), "BLOCK": BLOCK_D}
    _shrink[grid](h, down, index, inner, width, **shape)
    _expand[grid](h, up, bias, index, inner, width, **shape)
