"""A pool of two small adapters, plans for it, and random tensors, for tests of `rk.functional`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import reft_kernels as rk


def draw(
    seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


def pool_and_plan(
    device: str = "cpu", dtype: torch.dtype = torch.float32, cover: bool = False
) -> tuple[rk.Pool, rk.Plan]:
    """Ranks 2 and 3 at width 8, and a plan of an h of six rows that takes them."""
    pool, spans = rk.Pool(8, dtype, device, capacity=8), []
    for rank in (2, 3):
        down, up, bias = draw(rank, (rank, 8), (rank, 8), (rank,), device=device)
        spans.append(pool.add(rk.Fold(down, up, bias, torch.zeros(rank, dtype=torch.int32))))
    return pool, plan_of(device, cover, spans)


def plan_of(
    device: str = "cpu", cover: bool = False, spans: Sequence[rk.Span] = (rk.Span(0, 2), rk.Span(2, 3))
) -> rk.Plan:
    """By default one for every pool of `pool_and_plan`."""
    return rk.make_plan([(spans[0], [1, 5]), (spans[1], [0])], device, total_rows=6, cover=cover)
