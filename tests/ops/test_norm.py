"""intervene_norm_: the norm's values, the edit's bits, and that a row is its own affair.

Rows of h that nobody edits hold random bits in a case, also NaN and Inf. Where their norm is compared they
are made numbers first.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from support import oracle
from support.calls import NormOf, in_place, norm_of, normed_in_place
from support.cases import (
    DTYPES,
    USUAL,
    Case,
    Segment,
    bits,
    build,
    check,
    interpreted,
    ragged_tiles,
    same_bits,
)
from torch import Tensor

import reft_kernels as rk
from reft_kernels.ops import INTERVENE_NORM_, NO_PRODUCT, Norm


def tame(case: Case) -> Case:
    """The case with numbers in all rows of h that nobody edits, under a plan that names them."""
    keep = torch.ones(case.spec.count, dtype=torch.bool)
    keep[case.edited] = False
    generator = torch.Generator().manual_seed(case.spec.seed)
    values = torch.randn(int(keep.sum()), case.spec.d, generator=generator) * case.spec.scale
    case.flat[keep.to(case.h.device)] = values.to(case.h)
    return case.covered(ragged_tiles(random.Random(case.spec.seed)) if case.spec.ragged else None)


def rows_of(out: Tensor) -> Tensor:
    return out.reshape(-1, out.shape[-1])


def assert_equals_oracle(case: Case, backend: str, norm: NormOf) -> None:
    after, out = normed_in_place(case, backend, norm)
    assert out.shape == case.h.shape and out.dtype == case.h.dtype and out.is_contiguous()
    weight, shift = (None if t is None else oracle.wide(t) for t in norm[:2])
    for row, (x, y) in enumerate(zip(oracle.wide(after.flat), oracle.wide(rows_of(out)))):
        value, error = oracle.norm(x, weight, shift, norm.eps, norm.norm, case.h.dtype)
        excess = abs(y - value) - error
        assert (excess <= 0).all(), f"row {row}: {y} for {value}, {excess.max()} beyond {error.max()}"


def test_equals_the_formula(backend: str, device: str) -> None:
    """Of every row as it was written. An edited row has its bits from `intervene_`, see below."""
    check(lambda case: assert_equals_oracle(tame(case), backend, norm_of(case)), backend, device)


@pytest.mark.parametrize("norm", range(1 + sum(Norm)))
def test_every_norm_with_and_without_shift(backend: str, device: str, norm: int) -> None:
    for seed, dtypes in enumerate(DTYPES):
        case = tame(build(dataclasses.replace(USUAL, seed=seed, dtypes=dtypes), device))
        weight, shift = torch.randn(2, 24, generator=torch.Generator().manual_seed(9)).to(case.h)
        for it in (None, shift):
            assert_equals_oracle(case, backend, NormOf(weight, it, 1e-6, norm))


def test_h_is_what_intervene_in_place_makes_of_it(backend: str, device: str) -> None:
    """To the bit, random bits in other rows and between them included; pool, plan and weights untouched."""

    def holds(case: Case) -> None:
        case, norm = case.covered(), norm_of(case)
        constants = [*case.pool, *case.plan, norm.weight, norm.weight if norm.shift is None else norm.shift]
        before = [t.clone() for t in constants]
        after, _ = normed_in_place(case, backend, norm)
        assert same_bits(after.storage, in_place(_without_cover(case), backend).storage)
        for now, then in zip(constants, before):
            assert same_bits(now, then)

    check(holds, backend, device)


def _without_cover(case: Case) -> Case:
    return case.with_segments(case.segments)


def test_only_the_named_pool_rows_are_read(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        case = tame(case)
        used = torch.zeros(len(case.bias), dtype=torch.bool, device=device)
        for segment in case.segments:
            used[segment.first : segment.first + segment.rank] = True
        bare = (case.kind & NO_PRODUCT) != 0
        other = dataclasses.replace(
            case,
            down=torch.where((used & ~bare)[:, None], case.down, torch.zeros_like(case.down)),
            up=torch.where(used[:, None], case.up, torch.full_like(case.up, 3.0)),
            bias=torch.where(used, case.bias, torch.full_like(case.bias, -1.0)),
        )
        assert same_bits(normed_in_place(other, backend)[1], normed_in_place(case, backend)[1])

    check(holds, backend, device)


def test_what_one_row_holds_reaches_no_other(backend: str, device: str) -> None:
    """NaN or Inf, in edited rows and in others."""

    def holds(case: Case) -> None:
        case = tame(case)
        victims = list(range(case.spec.count))[::3]
        dirty = case.copy()
        dirty.flat[victims[::2]] = torch.nan
        dirty.flat[victims[1::2]] = torch.inf
        clean, out = rows_of(normed_in_place(case, backend)[1]), rows_of(normed_in_place(dirty, backend)[1])
        others = [row for row in range(case.spec.count) if row not in victims]
        assert same_bits(out[others], clean[others])
        assert out[victims].isnan().all()

    check(holds, backend, device)


# Batch invariance. The reference takes part in all but float64, see test_invariance.py.


def test_a_row_alone_is_the_row_in_a_batch(backend: str, device: str) -> None:
    """An h of that row and nothing else."""

    def holds(case: Case) -> None:
        case = tame(case)
        together = rows_of(normed_in_place(case, backend)[1])
        for row in random.Random(case.spec.seed).sample(range(case.spec.count), min(case.spec.count, 5)):
            h = case.flat[row : row + 1].clone()
            spec = dataclasses.replace(case.spec, count=1, offset=0)
            owners = [Segment(s.first, s.rank, (0,)) for s in case.segments if row in s.rows]
            alone = (
                dataclasses.replace(case, spec=spec, h=h, storage=h.view(-1)).with_segments(owners).covered()
            )
            assert same_bits(normed_in_place(alone, backend)[1][0], together[row]), f"row {row}"

    check(holds, backend, device, dtypes=DTYPES)


def test_any_order_and_any_tiles(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        case, rng = tame(case), random.Random(case.spec.seed)
        segments = [
            dataclasses.replace(segment, rows=tuple(rng.sample(segment.rows, len(segment.rows))))
            for segment in rng.sample(case.segments, len(case.segments))
        ]
        shuffled = case.with_segments(segments, ragged_tiles(rng)).covered(ragged_tiles(rng))
        assert same_bits(normed_in_place(shuffled, backend)[1], normed_in_place(case, backend)[1])

    check(holds, backend, device, dtypes=DTYPES)


def test_rows_permuted_in_memory(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        case = tame(case)
        order = list(range(case.spec.count))
        random.Random(case.spec.seed).shuffle(order)  # row i moves to order[i]
        moved = case.copy()
        moved.flat[order] = case.flat.clone()
        segments = [
            dataclasses.replace(s, rows=tuple(order[r] if r >= 0 else r for r in s.rows))
            for s in case.segments
        ]
        _, out = normed_in_place(moved.with_segments(segments).covered(), backend)
        assert same_bits(rows_of(out)[order], rows_of(normed_in_place(case, backend)[1]))

    check(holds, backend, device, dtypes=DTYPES)


def test_where_things_lie_does_not_matter(backend: str, device: str) -> None:
    """Another alignment and row stride of h, another alignment of the weights: the same bits."""

    def holds(case: Case) -> None:
        case, norm = tame(case), norm_of(case)
        h = torch.empty(case.h.shape, dtype=case.h.dtype, device=device).copy_(case.h)
        neat = dataclasses.replace(case.spec, row_pad=0, offset=0)
        other = dataclasses.replace(case, spec=neat, storage=h.view(-1), h=h)
        moved = norm._replace(
            weight=torch.cat([norm.weight[:1], norm.weight])[1:],
            shift=None if norm.shift is None else torch.cat([norm.shift[:1], norm.shift])[1:],
        )
        outs = [normed_in_place(it, backend, n)[1] for it, n in ((other, moved), (case, norm), (case, norm))]
        assert same_bits(outs[0], outs[1]) and same_bits(outs[1], outs[2])

    check(holds, backend, device, dtypes=DTYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_counts_give_the_same_bits(backend: str, device: str, dtype: torch.dtype) -> None:
    if device != "cpu" or interpreted(backend, device):
        pytest.skip("no thread of torch's takes part")
    spec = dataclasses.replace(USUAL, d=1024, count=600, lead=(600,), dtypes=(dtype, dtype))
    case, threads, outs = tame(build(spec, device)), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            outs.append(normed_in_place(case, backend)[1])
    finally:
        torch.set_num_threads(threads)
    assert same_bits(*outs)


# How a model's own norms are written, each step rounded to the dtype that torch gives it.


def _rms(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def llama(x: Tensor, weight: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    return weight * _rms(x, eps).to(x.dtype)


def gemma(x: Tensor, weight: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    wide = _rms(x, eps)
    return (wide * (1.0 + weight.to(wide.dtype))).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, shift, eps)


UNFUSED = {
    "llama": (llama, Norm.RMS | Norm.ROUND),
    "gemma": (gemma, Norm.RMS | Norm.PLUS_ONE),
    "layer_norm": (layer_norm, Norm.CENTRED),
}


def _covering(count: int, d: int, device: str) -> tuple[Tensor, ...]:
    """Pool and plan of an edit of no rows."""
    pool = rk.Pool(d, torch.float32, device, capacity=1)
    plan = rk.make_plan([], device, total_rows=count, cover=True)
    return (*pool.rows, *plan[:-1])


def _draw(seed: int, count: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x [count, d], weight and shift [d]; rows of x with scales and means of their own."""
    generator = torch.Generator().manual_seed(seed)
    scale, mean = torch.randn(2, count, 1, generator=generator)
    x = torch.randn(count, d, generator=generator) * scale.exp() + mean
    weight, shift = torch.randn(2, d, generator=generator)
    return tuple(t.to(device, dtype) for t in (x, weight, shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", UNFUSED)
def test_rms_error_beside_a_models_own_norm(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    """Promise: over many draws, at most 1.1x the error of the unfused sequence in the same dtypes."""
    unfused, norm = UNFUSED[name]
    ours = theirs = 0.0
    for seed in range(1 if interpreted(backend, device) else 8):
        for d in (64, 96, 1000, 4096):
            x, weight, shift = _draw(seed, 16, d, dtype, device)
            exact = unfused(x.double(), weight.double(), shift.double(), 1e-6)
            theirs += float((unfused(x, weight, shift, 1e-6).double() - exact).square().sum())
            bias = shift if norm is Norm.CENTRED else None
            out = INTERVENE_NORM_[backend](x, *_covering(16, d, device), weight, bias, 1e-6, norm)
            ours += float((out.double() - exact).square().sum())
    assert theirs > 0
    assert ours**0.5 <= 1.1 * theirs**0.5, f"{(ours / theirs) ** 0.5:.3f} times the unfused error"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_before_the_weight_is_llamas(backend: str, device: str, dtype: torch.dtype) -> None:
    """With ROUND nearly all bits are those of Llama's sequence, without it of Gemma's."""
    x, weight, _ = _draw(0, 24, 256, dtype, device)
    rest = _covering(24, 256, device)
    for sequence, right, wrong in (
        (llama, Norm.ROUND, Norm.RMS),
        (gemma, Norm.PLUS_ONE, Norm.PLUS_ONE | Norm.ROUND),
    ):
        expected = bits(sequence(x, weight, weight, 1e-6))
        outs = {norm: INTERVENE_NORM_[backend](x, *rest, weight, None, 1e-6, norm) for norm in (right, wrong)}
        share = {norm: float((bits(out) != expected).float().mean()) for norm, out in outs.items()}
        assert share[right] < 0.005 and share[wrong] > 0.1, share


def test_squares_beyond_float16(backend: str, device: str) -> None:
    """60000² is no float16; the sums are float32."""
    x = torch.full((2, 40), 6e4, dtype=torch.float16, device=device)
    weight = torch.ones(40, dtype=torch.float16, device=device)
    out = INTERVENE_NORM_[backend](x, *_covering(2, 40, device), weight, None, 0.0, Norm.RMS)
    assert (out == 1).all()


def test_a_mean_that_is_large_beside_the_deviation(backend: str, device: str) -> None:
    """mean(x²) − mean(x)² would lose everything here; the deviations are summed."""
    x = (1e4 + torch.tensor([-1.0, 1.0]).repeat(3, 32)).to(device)
    weight = torch.ones(64, device=device)
    out = INTERVENE_NORM_[backend](x, *_covering(3, 64, device), weight, None, 0.0, Norm.CENTRED)
    torch.testing.assert_close(out, x - 1e4, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(backend: str, device: str, shape: tuple[int, ...]) -> None:
    h, weight = torch.empty(shape, device=device), torch.ones(8, device=device)
    out = INTERVENE_NORM_[backend](h, *_covering(0, 8, device), weight, None, 1e-6, Norm.RMS)
    assert out.shape == h.shape and out.dtype == h.dtype and out.is_contiguous()


@pytest.mark.parametrize("d", [1, 24])
def test_a_row_of_zeros(backend: str, device: str, d: int) -> None:
    """eps keeps the root from 0; with CENTRED any row of one element is such a row."""
    h, weight = torch.zeros(3, d, device=device), torch.ones(d, device=device)
    for norm in (Norm.RMS, Norm.CENTRED):
        out = INTERVENE_NORM_[backend](h, *_covering(3, d, device), weight, weight * 2, 1e-6, norm)
        assert (out == 2).all()


@pytest.mark.slow
def test_rows_that_lie_beyond_two_to_the_31(backend: str, device: str) -> None:
    """A row stride of 2³⁰ elements: the last rows begin beyond what an int32 counts."""
    if interpreted(backend, device):
        pytest.skip("the interpreter checks each pointer against every tensor: minutes")
    d, stride = 40, 2**30
    try:
        storage = torch.empty(3 * stride + d, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:  # out of memory, or no overcommitment
        pytest.skip(f"no 6 GiB of address space: {error}")
    x, weight, _ = _draw(0, 4, d, torch.bfloat16, device)
    h = storage.as_strided((4, d), (stride, 1))
    h.copy_(x)
    far, near = (
        INTERVENE_NORM_[backend](it, *_covering(4, d, device), weight, None, 1e-6, Norm.RMS) for it in (h, x)
    )
    assert same_bits(far, near)
