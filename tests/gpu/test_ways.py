"""The CUDA kernels' other ways: the bits of the usual one, on a GPU whose schedules no test chooses."""

from __future__ import annotations

import pytest
import torch
from reft_bench.kernels.ways import in_way
from support.cases import same_bits

import reft_kernels as rk
from reft_kernels import ops

pytestmark = pytest.mark.gpu

PUSH, RING = 1, 2

#: A block has one unit or several, tiles few rows or many; whether the norm follows.
CASES = [
    (PUSH, 1, 4096, 8, False),
    (PUSH, 64, 4096, 8, False),
    (PUSH, 64, 4096, 8, True),
    (PUSH, 3, 3584, 20, True),
    (PUSH, 3, 3072, 40, False),  # two of eight blocks have no unit
    (RING, 256, 4096, 8, False),
    (RING, 3, 5120, 20, False),
    (RING, 4096, 4096, 8, False),
]


@pytest.mark.parametrize(("way", "count", "width", "rank", "normed"), CASES)
def test_native_in_another_way(way: int, count: int, width: int, rank: int, normed: bool) -> None:
    """Again and again: a wait that is missing shows now and then only."""
    reason = ops.why_not("native", "cuda")
    if reason is not None:
        pytest.skip(f"native: {reason}")
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters and bulk copies begin with sm_90")
    generator = torch.Generator().manual_seed(count)
    adapters = 1 if count == 4096 else count
    pool = rk.Pool(width, torch.bfloat16, "cuda", capacity=adapters * rank)
    entries = []
    for adapter in range(adapters):
        down, up = torch.randn(2, rank, width, generator=generator) / width**0.5
        fold = rk.Fold(down, up, torch.randn(rank, generator=generator), torch.zeros(rank, dtype=torch.int32))
        entries.append((pool.add(fold), range(adapter, count, adapters)))
    plan = rk.make_plan(entries, "cuda", total_rows=count)
    h = torch.randn(count, width, generator=generator).to("cuda", torch.bfloat16)
    weight = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    tables = (pool.down, pool.up, pool.bias, pool.kind, plan.rows, plan.tiles, plan.spans)

    def run() -> list[torch.Tensor]:
        edited = h.clone()
        if normed:
            return [edited, ops.INTERVENE_NORM_["native"](edited, *tables, weight, None, 1e-6, 0)]
        ops.INTERVENE_["native"](edited, *tables)
        return [edited]

    usual = run()
    with in_way(way):
        for _ in range(50):
            for one, it in zip(usual, run()):
                assert same_bits(one, it)
