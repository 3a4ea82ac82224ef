"""Launches: streams, devices, memory beyond 2³¹ elements, sizes of real models, arguments that don't fit."""

from __future__ import annotations

import concurrent.futures
import ctypes
import json
import pathlib

import pytest
import torch
from support.cases import same_bits

import reft_kernels as rk
from reft_kernels.ops import INTERVENE_, INTERVENE_NORM_, Norm
from reft_kernels.ops.arguments import PoolRows

pytestmark = pytest.mark.gpu


def _pool(width: int, ranks: tuple[int, ...], dtype=torch.bfloat16, device: str = "cuda"):
    generator = torch.Generator().manual_seed(len(ranks))
    pool = rk.Pool(width, dtype, device, capacity=sum(ranks))
    spans = []
    for rank in ranks:
        down, up = torch.randn(2, rank, width, generator=generator) / width**0.5
        bias, kind = torch.randn(rank, generator=generator), torch.zeros(rank, dtype=torch.int32)
        spans.append(pool.add(rk.Fold(down, up, bias, kind)))
    return pool, spans


def _random(rows: int, width: int, dtype=torch.bfloat16, device: str = "cuda") -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


def test_the_current_stream_orders_the_launch(fused: str) -> None:
    """The edit waits for work before it on a side stream, and for nothing on others."""
    pool, (span,) = _pool(256, (4,))
    plan = rk.make_plan([(span, range(16))], "cuda")
    source = _random(16, 256)
    expected = rk.functional.intervene_(source.clone(), pool, plan)
    h = torch.zeros_like(source)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        h.copy_(source)
        rk.functional.intervene_(h, pool, plan)
        result = h.clone()
    side.synchronize()
    assert same_bits(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_tensors_on_another_device_than_the_current_one(fused: str) -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        pool, (span,) = _pool(256, (4,), device=device)
        plan = rk.make_plan([(span, range(16))], device)
        results.append(rk.functional.intervene_(_random(16, 256, device=device), pool, plan).cpu())
        assert torch.cuda.current_device() == 0
    assert same_bits(*results)


def test_native_is_launched_side_by_side_with_other_sizes() -> None:
    """By threads, for rows so wide that a block asks for 57 KB of shared memory, and for 90: neither launch
    takes the other's away."""
    reason = rk.ops.why_not("native", "cuda")
    if reason is not None:
        pytest.skip(f"native: {reason}")
    batches = []
    for width in (131072, 262144):
        pool, spans = _pool(width, (8, 8))
        plan = rk.make_plan([(span, range(i, 64, 2)) for i, span in enumerate(spans)], "cuda")
        with rk.backend("native"):
            h = _random(64, width)
            batches.append((pool, plan, h, rk.functional.intervene_(h.clone(), pool, plan)))

    def work(number: int) -> bool:
        pool, plan, h, expected = batches[number % 2]
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [rk.functional.intervene_(h.clone(), pool, plan) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return all(same_bits(result, expected) for result in results)

    torch.cuda.synchronize()
    with rk.backend("native"), concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def test_offsets_beyond_31_bits(fused: str) -> None:
    width, rows = 4096, 2**31 // 4096 + 40
    if torch.cuda.mem_get_info()[0] < 3 * rows * width * 2:
        pytest.skip("needs 13 GB of GPU memory")
    pool, (span,) = _pool(width, (4,))
    h = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    ends = [0, 1, rows - 2, rows - 1]
    h[ends] = _random(4, width)
    expected = rk.functional.intervene_(h[ends], pool, rk.make_plan([(span, range(4))], "cuda"))
    rk.functional.intervene_(h, pool, rk.make_plan([(span, ends)], "cuda"))
    assert same_bits(h[ends], expected)
    assert not h[2:-2].any()


@pytest.mark.parametrize("pool_dtype", [None, torch.float32], ids=["own", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [3584, 4096, 8192, 20480])
def test_sizes_of_models(fused: str, width: int, dtype: torch.dtype, pool_dtype) -> None:
    """Against the float64 reference, within the rounding of the result and of float32 sums."""
    ranks = (8, 64, 1, 300)
    pool, spans = _pool(width, ranks, pool_dtype or dtype)
    entries = [(span, range(start, 200, 4)) for start, span in enumerate(spans)]
    plan = rk.make_plan(entries, "cuda")
    h = _random(200, width, dtype)
    got = rk.functional.intervene_(h.clone(), pool, plan).double()
    with rk.backend("reference"):
        want = rk.functional.intervene_(h.double(), rk_wide(pool), plan)
    unit = torch.finfo(dtype).eps / 2
    # Terms of an edit are of order 1 or less; sums of 300 of them and of `width` products.
    limit = unit * want.abs() + 2**-24 * 64 * (want.abs() + 4) + torch.finfo(dtype).tiny
    if fused == "triton" and dtype is not torch.float32:
        limit = limit + unit * 4 * (want - h).abs().amax(1, keepdim=True)  # v in h's dtype
    assert ((got - want).abs() <= limit).all(), ((got - want).abs() - limit).max()


def rk_wide(pool: rk.Pool) -> rk.Pool:
    """The same pool in float64."""
    wide = rk.Pool(pool.width, torch.float64, pool.device, capacity=pool.capacity)
    wide.rows = PoolRows(pool.down.double(), pool.up.double(), pool.bias.double(), pool.kind)
    return wide


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [8, 16, 40])
@pytest.mark.parametrize("rows", [1, 17, 300, 4096])
def test_a_row_has_its_bits_in_any_batch(
    fused: str, rows: int, rank: int, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    """Decode and prefill, one adapter and many: the same row, the same range, the same bits."""
    pool, spans = _pool(4096, (rank,) * 64, pool_dtype)
    h = _random(rows, 4096, dtype)
    alone = rk.functional.intervene_(h[:1].clone(), pool, rk.make_plan([(spans[0], [0])], "cuda"))
    for count in (1, 64):
        entries = [(spans[i], range(i, rows, count)) for i in range(min(count, rows))]
        after = rk.functional.intervene_(h.clone(), pool, rk.make_plan(entries, "cuda"))
        assert same_bits(after[:1], alone)


def _normed(h: torch.Tensor, pool: rk.Pool, entries: list, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """(h as edited, its norm), on a copy of h."""
    plan = rk.make_plan(entries, "cuda", total_rows=len(h), cover=True)
    h, weight = h.clone(), torch.linspace(0.5, 1.5, h.shape[-1]).to(h)
    shift = weight.flip(0) if norm & Norm.CENTRED else None
    return h, rk.functional.intervene_norm_(h, pool, plan, weight, shift, 1e-6, norm)


@pytest.mark.parametrize("norm", [Norm.ROUND, Norm.PLUS_ONE, Norm.CENTRED], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 300, 4096])
def test_a_row_has_its_norms_bits_in_any_batch(fused: str, rows: int, norm: Norm) -> None:
    """Also in rows that nobody edits; and the edit has the bits that it has without the norm."""
    pool, spans = _pool(4096, (8,) * 64)
    h = _random(rows, 4096)
    edited, of_edited = _normed(h[:1], pool, [(spans[0], [0])], norm)
    bare, of_bare = _normed(h[:1], pool, [], norm)
    assert same_bits(bare, h[:1])
    for count in (1, 64):
        entries = [(spans[i], range(i, rows, count)) for i in range(min(count, rows))]
        after, out = _normed(h, pool, entries, norm)
        plain = rk.functional.intervene_(h.clone(), pool, rk.make_plan(entries, "cuda"))
        assert same_bits(after, plain) and same_bits(after[:1], edited)
        assert same_bits(out[:1], of_edited)
    untouched, out = _normed(h, pool, entries[1:], norm)
    assert same_bits(untouched[:1], bare) and same_bits(out[:1], of_bare)


@pytest.mark.parametrize("norm", [Norm.ROUND, Norm.CENTRED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [3584, 4096, 20480])
def test_norms_of_models(fused: str, width: int, dtype: torch.dtype, norm: Norm) -> None:
    """Against the float64 norm of the rows as they were written."""
    pool, spans = _pool(width, (8, 64, 1), dtype)
    entries = [(span, range(start, 150, 4)) for start, span in enumerate(spans)]
    after, out = _normed(_random(200, width, dtype), pool, entries, norm)
    weight = torch.linspace(0.5, 1.5, width).to(after).double()
    x = after.double()
    if norm & Norm.CENTRED:
        x = x - x.mean(1, keepdim=True)
    x = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    want = x * weight + (weight.flip(0) if norm & Norm.CENTRED else 0)
    unit = torch.finfo(dtype).eps / 2
    steps = 2 if norm & Norm.ROUND else 1
    limit = unit * 1.01 * (steps * (x * weight).abs() + want.abs()) + 2**-24 * 64 * (want.abs() + 4)
    assert ((out.double() - want).abs() <= limit).all(), ((out.double() - want).abs() - limit).max()


def test_occupancy_of_every_form() -> None:
    """What the kernels' launch bounds count on: blocks a multiprocessor, and clusters on the whole chip."""
    reason = rk.ops.why_not("native", "cuda")
    if reason is not None:
        pytest.skip(f"native: {reason}")
    (path,) = pathlib.Path(rk.__file__).parent.glob("lib/reft_kernels_cuda.so")
    occupancy = ctypes.CDLL(str(path)).reft_kernels_cuda_occupancy
    occupancy.restype = ctypes.c_char_p
    forms = json.loads(occupancy().decode())
    assert {form["kernel"].split()[0] for form in forms} == {
        "forward_tiles", "forward_rows", "forward_push", "forward_ring", "backward_rows", "backward_pool"
    }  # fmt: skip
    clusters = torch.cuda.get_device_capability()[0] >= 9
    for form in forms:
        assert "error" not in form and form["local_bytes"] == 0, form
        assert form["launches"] or not clusters, form
        for launch in form["launches"]:
            assert launch["blocks_per_multiprocessor"] >= 1, form
            assert launch["cluster"] == 1 or launch["clusters_at_once"] >= 1, form


def test_bad_arguments_name_themselves_and_write_nothing(fused: str) -> None:
    pool, (span,) = _pool(64, (4,))
    plan = rk.make_plan([(span, [0, 1])], "cuda")
    h = _random(4, 64)
    before = h.clone()
    good = [h, *pool.rows, *plan[:-1]]
    bad = {
        "h": (0, h.float().double()),
        "down": (1, pool.down.half()),
        "up": (2, pool.up[:, :32]),
        "bias": (3, pool.bias.half()),
        "kind": (4, pool.kind.long()),
        "rows": (5, plan.rows.cpu()),
        "tiles": (6, plan.tiles[:, :2]),
        "spans": (7, plan.spans.long()),
    }
    for name, (place, value) in bad.items():
        arguments = [*good]
        arguments[place] = value
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=name):
            INTERVENE_[fused](*arguments)
    if fused != "native":
        return  # the others' norm is checked in rk.functional
    every = rk.make_plan([(span, [0, 1])], "cuda", total_rows=4, cover=True)
    weight = torch.ones_like(h[0])
    good = [h, *pool.rows, *every[:-1], weight, weight, 1e-6, 0]
    bad = {
        "rows": (5, plan.rows),  # two rows of four
        "weight": (8, weight[:32]),
        "shift": (9, weight.float()),
        "eps": (10, -1.0),
        "norm": (11, 8),
    }
    for name, (place, value) in bad.items():
        arguments = [*good]
        arguments[place] = value
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=name):
            INTERVENE_NORM_[fused](*arguments)
    assert same_bits(h, before)
