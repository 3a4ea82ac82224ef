"""row_norms, restore_norms_, restore_norms and its backward: values against float64, bits, extremes."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from support.calls import gradient_like, in_place
from support.cases import (
    DTYPES,
    DTYPES_WIDE,
    USUAL,
    Case,
    Segment,
    bits,
    build,
    check,
    ragged_tiles,
    same_bits,
)
from support.norm_cases import backward, kept, lengths, norms_of, out_of_place, restored, some_norms
from support.oracle import FLOOR, UNIT, wide

from reft_kernels.ops import RESTORE_NORMS, RESTORE_NORMS_, RESTORE_NORMS_BACKWARD, ROW_NORMS

#: What a norm may lose beside its rounding, in units of its sums.
LOSS = 40


def _sums(case: Case) -> float:
    return UNIT[torch.float64 if case.h.dtype is torch.float64 else torch.float32]


def test_norms_are_those_of_the_rows(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        norms = norms_of(case, backend)
        assert norms.dtype is (torch.float64 if case.h.dtype is torch.float64 else torch.float32)
        want = np.zeros(len(case.rows))
        for place, row in kept(case):
            want[place] = lengths(case.flat[row])
        assert norms.shape == case.rows.shape
        assert (np.abs(wide(norms) - want) <= LOSS * _sums(case) * want).all()
        assert (wide(norms)[want == 0] == 0).all()
        assert same_bits(case.storage, build(case.spec, device).storage)

    check(holds, backend, device)


def test_rows_are_scaled_to_the_norms(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        norms = some_norms(case)
        after, before, unit = restored(case, norms, backend), wide(case.flat), UNIT[case.h.dtype]
        for place, row in kept(case):
            length = lengths(case.flat[row])
            want = before[row] * (wide(norms)[place] / length if length else 1.0)
            limit = (unit + LOSS * _sums(case)) * np.abs(want) + FLOOR[case.h.dtype]
            assert (np.abs(wide(after.flat)[row] - want) <= limit).all(), f"row {row}"

    check(holds, backend, device)


def test_out_of_place_has_its_bits_and_all_else_keeps_its_own(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        norms = some_norms(case)
        after, result = restored(case, norms, backend), out_of_place(case, norms, backend)
        assert result.is_contiguous() and result.shape == case.h.shape
        assert same_bits(result, after.h)
        untouched = torch.ones_like(case.storage, dtype=torch.bool)
        mine = untouched.as_strided((case.spec.count, case.spec.d), case.flat.stride(), case.spec.offset)
        mine[case.edited] = False
        assert torch.equal(bits(after.storage)[untouched], bits(case.storage)[untouched])
        assert same_bits(case.storage, build(case.spec, device).storage)

    check(holds, backend, device)


def test_an_edit_has_the_norm_that_was_read(backend: str, device: str) -> None:
    """Around an edit of the pool's: its direction, and the length of before."""

    def holds(case: Case) -> None:
        norms, edited = norms_of(case, backend), in_place(case, backend)
        after = restored(edited, norms, backend)
        unit = (UNIT[case.h.dtype] + LOSS * _sums(case)) * 1.01
        for _, row in kept(case):
            x, y, out = (wide(it.flat)[row] for it in (case, edited, after))
            old, length = np.linalg.norm(x), np.linalg.norm(y)
            if length:
                floor = FLOOR[case.h.dtype] * np.sqrt(case.spec.d)
                assert np.linalg.norm(out - y * (old / length)) <= unit * old + floor

    check(holds, backend, device)


def test_rows_of_their_norm_keep_their_bits(backend: str, device: str) -> None:
    """As behind an edit that changes nothing; Inf, −0 and rows of zeros included."""

    def holds(case: Case) -> None:
        for place, row in kept(case):
            if place % 3 == 0:
                case.flat[row] = 0
                case.flat[row, 0] = -0.0
            elif place % 3 == 1:
                case.flat[row, -1] = -torch.inf
        after = restored(case, norms_of(case, backend), backend)
        assert same_bits(after.storage, case.storage)

    check(holds, backend, device)


def test_rows_of_zeros_stay_whatever_their_norm(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        norms, grad = some_norms(case), gradient_like(case)
        case.flat[case.edited] = 0
        assert same_bits(restored(case, norms, backend).storage, case.storage)
        dh, dnorms = backward(case, grad, norms, backend)
        assert not dh.view(-1, case.spec.d)[case.edited].any() and not dnorms.any()

    check(holds, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e15, 1e25, 1e36])
def test_squares_neither_overflow_nor_vanish(backend: str, device: str, dtype: torch.dtype, size) -> None:
    generator = torch.Generator().manual_seed(3)
    h = (torch.randn(4, 33, generator=generator) * size).to(dtype).to(device)
    plan = [
        torch.tensor(it, dtype=torch.int32, device=device) for it in ([0, 1, 2, 3], [[0, 0, 4]], [[0, 1]])
    ]
    norms = ROW_NORMS[backend](h, *plan)
    np.testing.assert_allclose(wide(norms), lengths(h), rtol=1e-5)
    other = torch.full_like(norms, 3.0)
    scaled = RESTORE_NORMS[backend](h, other, *plan)
    np.testing.assert_allclose(lengths(scaled), 3.0, rtol=2 * UNIT[dtype] + 1e-5)
    back = RESTORE_NORMS[backend](scaled, norms, *plan)
    np.testing.assert_allclose(wide(back), wide(h), rtol=3 * UNIT[dtype] + 1e-5)
    dh, dnorms = RESTORE_NORMS_BACKWARD[backend](torch.ones_like(h), h, norms * 2, *plan)
    x = wide(h) / lengths(h)[:, None]
    np.testing.assert_allclose(wide(dnorms), x.sum(-1), rtol=1e-5, atol=1e-5)
    want = 2 * (1 - x * x.sum(-1, keepdims=True))
    np.testing.assert_allclose(wide(dh), want, rtol=2 * UNIT[dtype] + 1e-5, atol=1e-5)


def test_inf_and_nan_follow_from_the_formula(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        norms, special = some_norms(case), (torch.inf, torch.nan, -torch.inf)
        for place, row in kept(case):
            if place % 2:
                case.flat[row, place % case.spec.d] = special[place % 3]
            else:
                norms[place] = special[place % 3]
        got, want = (restored(case, norms, name).flat[case.edited] for name in (backend, "reference"))
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())

    check(holds, backend, device)


def test_a_row_does_not_know_its_batch(backend: str, device: str) -> None:
    """Alone, and in shuffled segments with other tiles: the same bits."""

    def holds(case: Case) -> None:
        rng = random.Random(case.spec.seed)
        segments = [
            Segment(s.first, s.rank, tuple(rng.sample(s.rows, len(s.rows))))
            for s in rng.sample(case.segments, len(case.segments))
        ]
        shuffled = case.with_segments(segments, ragged_tiles(rng))
        norms, again = norms_of(case, backend), norms_of(shuffled, backend)
        by_row = {row: place for place, row in kept(case)}
        wanted = [by_row[row] for _, row in kept(shuffled)]
        assert same_bits(again[[place for place, _ in kept(shuffled)]], norms[wanted])
        norms = some_norms(case)
        again = torch.full_like(again, torch.nan)
        again[[place for place, _ in kept(shuffled)]] = norms[wanted]
        together = restored(case, norms, backend)
        assert same_bits(restored(shuffled, again, backend).storage, together.storage)
        for place, row in kept(case)[:4]:
            alone = case.with_segments([Segment(0, 1, (row,))])
            assert same_bits(restored(alone, norms[[place]], backend).flat[row], together.flat[row])

    check(holds, backend, device, dtypes=DTYPES)


def test_where_rows_lie_does_not_matter(backend: str, device: str) -> None:
    """Another alignment and another stride between rows: the same bits, of norms, rows and gradients."""

    def holds(case: Case) -> None:
        h = torch.empty(case.h.shape, dtype=case.h.dtype, device=device).copy_(case.h)
        spec = dataclasses.replace(case.spec, row_pad=0, offset=0)
        neat = dataclasses.replace(case, spec=spec, storage=h.view(-1), h=h)
        norms, grad = some_norms(case), gradient_like(case)
        assert same_bits(norms_of(neat, backend), norms_of(case, backend))
        assert same_bits(restored(neat, norms, backend).flat, restored(case, norms, backend).flat)
        for mine, theirs in zip(backward(neat, grad, norms, backend), backward(case, grad, norms, backend)):
            assert same_bits(mine, theirs)

    check(holds, backend, device, dtypes=DTYPES)


def test_gradients_are_the_analytic_ones(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        norms, grad = some_norms(case), gradient_like(case)
        dh, dnorms = backward(case, grad, norms, backend)
        g, y = wide(grad.view(-1, case.spec.d)), wide(case.flat)
        got = wide(dh.view(-1, case.spec.d))
        for place, row in kept(case):
            length = np.linalg.norm(y[row])
            if length == 0:
                continue
            unit, factor = y[row] / length, wide(norms)[place] / length
            want = factor * (g[row] - unit * (unit @ g[row]))
            terms = factor * (np.abs(g[row]) + np.abs(unit) * (np.abs(unit) @ np.abs(g[row])))
            limit = UNIT[dh.dtype] * np.abs(want) + 2 * LOSS * _sums(case) * terms + FLOOR[dh.dtype]
            assert (np.abs(got[row] - want) <= limit).all(), f"dh of row {row}"
            limit = 2 * LOSS * _sums(case) * (np.abs(unit) @ np.abs(g[row]))
            assert abs(wide(dnorms)[place] - unit @ g[row]) <= limit, f"dnorm of row {row}"
        others = [place for place in range(len(case.rows)) if place not in dict(kept(case))]
        assert not dnorms[others].any()
        keep = torch.ones(case.spec.count, dtype=torch.bool, device=device)
        keep[case.edited] = False
        assert same_bits(dh.view(-1, case.spec.d)[keep], grad.view(-1, case.spec.d)[keep])
        for again, first in zip(backward(case, grad, norms, backend), (dh, dnorms)):
            assert same_bits(again, first)

    check(holds, backend, device, dtypes=DTYPES_WIDE if backend == "reference" else None)


def test_the_dispatcher_knows_the_ops(backend: str, device: str) -> None:
    case = build(USUAL, device)
    case.storage.nan_to_num_(0.5, 0.5, 0.5)
    norms, grad = norms_of(case, backend) * 2 + 1, gradient_like(case)
    leaf = case.h.clone().requires_grad_()
    torch.library.opcheck(ROW_NORMS[backend], (leaf, *case.plan))
    torch.library.opcheck(RESTORE_NORMS_[backend], (case.copy().h, norms, *case.plan))
    leaves = [leaf, norms.clone().requires_grad_()]
    torch.library.opcheck(RESTORE_NORMS[backend], (*leaves, *case.plan))
    hs = case.flat[case.rows.clamp(min=0).long()]
    torch.library.opcheck(RESTORE_NORMS_BACKWARD[backend], (grad, hs, norms, *case.plan))
    out = RESTORE_NORMS[backend](*leaves, *case.plan)
    for mine, theirs in zip(torch.autograd.grad(out, leaves, grad), backward(case, grad, norms, backend)):
        assert same_bits(mine, theirs)


def test_the_gradient_of_a_norm_is_the_direction(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        h = case.h.clone().requires_grad_()
        norms = ROW_NORMS[backend](h, *case.plan)
        weights = torch.arange(1.0, len(norms) + 1, dtype=norms.dtype, device=device)
        (dh,) = torch.autograd.grad((norms * weights).sum(), h)
        want = np.zeros((case.spec.count, case.spec.d))
        for place, row in kept(case):
            length = lengths(case.flat[row])
            want[row] = wide(case.flat)[row] * (place + 1) / length if length else 0
        limit = (UNIT[dh.dtype] + LOSS * _sums(case)) * np.abs(want) * 1.01 + FLOOR[dh.dtype]
        assert (np.abs(wide(dh.view(want.shape)) - want) <= limit).all()

    check(holds, backend, device)


def test_bad_input_is_refused_before_anything_is_written(backend: str, device: str) -> None:
    case = build(USUAL, device)
    norms, after = some_norms(case), case.copy()
    rows, tiles, spans = case.plan
    for message, arguments in (
        ("norms", (after.h, norms[:-1], rows, tiles, spans)),
        ("norms", (after.h, norms.half(), rows, tiles, spans)),
        ("rows", (after.h, norms, rows.long(), tiles, spans)),
        ("tiles", (after.h, norms, rows, tiles[:, :2], spans)),
        ("spans", (after.h, norms, rows, tiles, spans.long())),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"{message}: "):
            RESTORE_NORMS_[backend](*arguments)
        assert same_bits(after.storage, case.storage)
