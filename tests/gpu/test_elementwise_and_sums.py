"""The elementwise edit, and the edit of a sum of two tensors, at the sizes of models and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cases import same_bits

import reft_kernels as rk
from reft_kernels import ops
from reft_kernels.ops import INTERVENE_, INTERVENE_SUM_, SCALE_SHIFT_BACKWARD

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ADAPTERS, ROWS = 5, 200


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _scales(width: int):
    """A pool of elementwise edits, in each of which every seventh element is assigned; and their spans."""
    pool = rk.ScalePool(width, device=DEVICE, capacity=ADAPTERS)
    spans = []
    for seed in range(ADAPTERS):
        scale, shift = _random(2, width, seed=seed)
        scale[::7] = 0
        spans.append(pool.add(rk.ScaleFold.of(scale, shift)))
    return pool, spans


def _dealt(spans: list, rows: int = ROWS):
    """A plan in which the adapters take rows by turns, and every sixth row is nobody's."""
    turns = len(spans) + 1
    return rk.make_plan([(span, range(i, rows, turns)) for i, span in enumerate(spans)], DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [3584, 4096, 20480])
def test_the_elementwise_edit_at_sizes_of_models(fused: str, width: int, dtype: torch.dtype) -> None:
    """Against float64, within a rounding of the result; rows of nobody to the bit; and the gradients."""
    pool, spans = _scales(width)
    plan = _dealt(spans)
    h = _random(ROWS, width, dtype=dtype, seed=9)
    got = rk.functional.intervene_(h.clone(), pool, plan)
    scale, shift = pool.rows.scale_less_one.double() + 1, pool.rows.shift.double()
    owner = torch.arange(ROWS, device=DEVICE) % (ADAPTERS + 1)
    mine = owner < ADAPTERS
    chosen = owner[mine]
    want = scale[chosen] * h[mine].double() + shift[chosen]
    terms = (scale[chosen] * h[mine].double()).abs() + shift[chosen].abs()
    unit = torch.finfo(dtype).eps / 2
    limit = unit * want.abs() + 2**-21 * terms + torch.finfo(dtype).tiny
    assert ((got[mine].double() - want).abs() <= limit).all()
    assert same_bits(got[~mine], h[~mine])

    grad = _random(ROWS, width, dtype=dtype, seed=10)
    hs = h[plan.rows.long()]
    given = (grad, hs, *pool.rows, *plan, True, True)
    found = SCALE_SHIFT_BACKWARD[fused](*given)
    for one, it in zip(found, SCALE_SHIFT_BACKWARD["reference"](*given)):
        torch.testing.assert_close(one, it, rtol=max(2 * unit, 1e-4), atol=1e-3)
    for one, it in zip(found, SCALE_SHIFT_BACKWARD[fused](*given)):
        assert same_bits(one, it)


def _replayed(run: Callable[[], object]) -> Callable[[], None]:
    """`run`, captured in a graph after a call that compiles and loads what it needs: its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def test_a_captured_elementwise_edit_takes_what_its_tables_have_now(fused: str) -> None:
    pool, spans = _scales(512)
    plan, h = _dealt(spans), torch.zeros(ROWS, 512, dtype=torch.bfloat16, device=DEVICE)
    replay = _replayed(lambda: rk.functional.intervene_(h, pool, plan))
    plan.rows.copy_(plan.rows.flip(0).contiguous())
    pool.write(spans[1], rk.ScaleFold.of(*_random(2, 512, seed=77)))
    before = _random(ROWS, 512, dtype=torch.bfloat16, seed=3)
    h.copy_(before)
    replay()
    assert same_bits(h, rk.functional.intervene_(before.clone(), pool, plan))
    assert not same_bits(h, before)


def _low_rank(width: int, dtype: torch.dtype):
    """A pool with every activation that there is, and pool rows without a D."""
    generator = torch.Generator().manual_seed(width)
    rank = 2 * len(ops.Act)
    pool = rk.Pool(width, dtype, DEVICE, capacity=ADAPTERS * rank)
    kind = torch.arange(rank, dtype=torch.int32) % len(ops.Act)
    kind[len(ops.Act) + 1 :: 3] |= ops.NO_PRODUCT
    spans = []
    for _ in range(ADAPTERS):
        down, up = torch.randn(2, rank, width, generator=generator) / width**0.5
        spans.append(pool.add(rk.Fold(down, up, torch.randn(rank, generator=generator), kind)))
    return pool, spans


def _summed(fused: str, h: torch.Tensor, addend: torch.Tensor, pool: rk.Pool, plan) -> None:
    INTERVENE_SUM_[fused](h, addend, *pool.rows, *plan[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1031, 4096, 20480])
def test_the_edit_of_a_sum_is_the_sum_and_then_the_edit(fused: str, width: int, dtype: torch.dtype) -> None:
    """To the bit, with rows of the addend further apart; and nothing else is written."""
    pool, spans = _low_rank(width, dtype)
    plan = _dealt(spans)
    h = _random(ROWS, width, dtype=dtype, seed=1)
    addend = _random(ROWS, width + 8, dtype=dtype, seed=2)[:, :width]
    after, rest = h.clone(), addend.clone()
    _summed(fused, after, rest, pool, plan)
    mine = torch.arange(ROWS, device=DEVICE) % (ADAPTERS + 1) < ADAPTERS
    want = torch.where(mine[:, None], h + addend, h)
    INTERVENE_[fused](want, *pool.rows, *plan[:-1])
    assert same_bits(after, want)
    assert not rest[mine].any() and same_bits(rest[~mine], addend[~mine])


def test_the_edit_of_a_sum_with_every_activation_is_the_references(fused: str) -> None:
    pool, spans = _low_rank(512, torch.float32)
    plan, h, addend = _dealt(spans), _random(ROWS, 512, seed=1), _random(ROWS, 512, seed=2)
    results = []
    for backend in (fused, "reference"):
        results.append((h.clone(), addend.clone()))
        _summed(backend, *results[-1], pool, plan)
    for one, it in zip(*results):
        torch.testing.assert_close(one, it, rtol=1e-4, atol=1e-4)


def test_a_captured_edit_of_a_sum_takes_what_its_tables_have_now(fused: str) -> None:
    pool, spans = _low_rank(512, torch.bfloat16)
    plan = _dealt(spans)
    h, addend = torch.zeros(2, ROWS, 512, dtype=torch.bfloat16, device=DEVICE)
    replay = _replayed(lambda: _summed(fused, h, addend, pool, plan))
    plan.rows.copy_(plan.rows.flip(0).contiguous())
    before, other = _random(2, ROWS, 512, dtype=torch.bfloat16, seed=3)
    h.copy_(before), addend.copy_(other)
    replay()
    _summed(fused, before, other, pool, plan)
    assert same_bits(h, before) and same_bits(addend, other)
