"""intervene_source_, intervene_source and its backward: values, gradients, bits, what must not be read."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support import oracle
from support.calls import gradient_like
from support.calls import in_place as without_source
from support.cases import DTYPES, USUAL, Segment, bits, ragged_tiles, same_bits
from support.oracle import UNIT, wide
from support.source_cases import Sourced, backward, check_sourced, in_place, out_of_place, sourced

from reft_kernels.ops import INTERVENE_SOURCE, INTERVENE_SOURCE_, INTERVENE_SOURCE_BACKWARD


def test_in_place_is_the_formula(backend: str, device: str) -> None:
    def holds(it: Sourced) -> None:
        after = wide(in_place(it, backend).flat)
        for row, (value, error) in oracle.forward(it.expanded()).items():
            assert (np.abs(after[row] - value) <= error).all(), f"row {row}"

    check_sourced(holds, backend, device)


def test_out_of_place_has_its_bits_and_all_else_keeps_its_own(backend: str, device: str) -> None:
    def holds(it: Sourced) -> None:
        case, after = it.case, in_place(it, backend)
        result = out_of_place(it, backend)
        assert result.is_contiguous() and result.shape == case.h.shape
        assert same_bits(result, after.h)
        untouched = torch.ones_like(case.storage, dtype=torch.bool)
        mine = untouched.as_strided((case.spec.count, case.spec.d), case.flat.stride(), case.spec.offset)
        mine[case.edited] = False
        assert torch.equal(bits(after.storage)[untouched], bits(case.storage)[untouched])
        assert same_bits(case.storage, sourced(case.spec, device).case.storage)

    check_sourced(holds, backend, device)


def test_a_source_of_zeros_is_none(backend: str, device: str) -> None:
    """On a CPU to the bit: it is the same kernel."""

    def holds(it: Sourced) -> None:
        it.source = torch.where(it.source.isnan(), it.source, 0)
        got, want = in_place(it, backend), without_source(it.case, backend)
        if backend == "triton":
            x, y = wide(got.flat)[it.case.edited], wide(want.flat)[it.case.edited]
            np.testing.assert_allclose(x, y, rtol=2 * UNIT[it.case.h.dtype] + 1e-5, atol=1e-4)
        else:
            assert same_bits(got.storage, want.storage)

    check_sourced(holds, backend, device)


def test_a_row_does_not_know_its_batch(backend: str, device: str) -> None:
    """Alone, and in shuffled segments with other tiles: the same bits, and the same gradient."""

    def holds(it: Sourced) -> None:
        case, rng = it.case, random.Random(it.case.spec.seed)
        grad, together = gradient_like(case), in_place(it, backend)
        gradient = backward(it, grad, backend)[0].view(-1, case.spec.d)
        of_row = {row: it.source[place] for place, row, _ in it.places()}
        segments = [
            Segment(s.first, s.rank, tuple(rng.sample(s.rows, len(s.rows))))
            for s in rng.sample(case.segments, len(case.segments))
        ]
        plans = [case.with_segments(segments, ragged_tiles(rng))]
        plans += [case.with_segments([Segment(s.first, s.rank, (row,))]) for _, row, s in it.places()[:3]]
        for plan in plans:
            source = torch.full((len(plan.rows), it.source.shape[1]), torch.nan).to(it.source)
            for place, row in enumerate(plan.rows.tolist()):
                source[place] = of_row.get(row, source[place])
            other = Sourced(plan, source)
            rows = plan.edited
            assert same_bits(in_place(other, backend).flat[rows], together.flat[rows])
            dh = backward(other, grad, backend)[0].view(-1, case.spec.d)
            assert same_bits(dh[rows], gradient[rows])

    check_sourced(holds, backend, device, dtypes=DTYPES)


def test_gradients_are_the_analytic_ones(backend: str, device: str) -> None:
    def holds(it: Sourced) -> None:
        case, grad = it.case, gradient_like(it.case)
        dh, ddown, dup, dbias, dsource = backward(it, grad, backend)
        expected, scale = oracle.backward(it.expanded(), grad)
        want = {name: np.zeros(getattr(case, name).shape) for name in ("down", "up", "bias")}
        size = {name: np.zeros(getattr(case, name).shape) for name in ("down", "up", "bias")}
        want["source"], size["source"] = np.zeros(it.source.shape), np.zeros(it.source.shape)
        at = 0
        for place, _, segment in it.places():
            mine = slice(at, at + segment.rank)
            span = slice(segment.first, segment.first + segment.rank)
            for into, values in ((want, expected), (size, scale)):
                for name in ("down", "up", "bias"):
                    into[name][span] += values[name][mine]
                into["source"][place, : segment.rank] = values["bias"][mine]
            at += segment.rank
        h = case.h.dtype
        sums = UNIT[torch.float64 if h is torch.float64 and case.down.dtype is h else torch.float32]
        loss = sums * 4 * (case.spec.d + len(case.rows) + 16) + 4 * oracle.between(h)
        edited = wide(dh.view(-1, case.spec.d))[case.edited], expected["h"][case.edited]
        limit = loss * scale["h"][case.edited] + 2 * UNIT[h] * np.abs(edited[1]) + oracle.FLOOR[h]
        assert (np.abs(edited[0] - edited[1]) <= limit).all(), "h"
        for name, got in zip(("down", "up", "bias", "source"), (ddown, dup, dbias, dsource)):
            tensor = it.source if name == "source" else getattr(case, name)
            assert got.shape == tensor.shape and got.dtype == tensor.dtype
            limit = loss * size[name] + 2 * UNIT[got.dtype] * np.abs(want[name]) + oracle.FLOOR[got.dtype]
            assert (np.abs(wide(got) - want[name]) <= limit).all(), name
        keep = torch.ones(case.spec.count, dtype=torch.bool, device=device)
        keep[case.edited] = False
        assert same_bits(dh.view(-1, case.spec.d)[keep], grad.view(-1, case.spec.d)[keep])
        for again, first in zip(backward(it, grad, backend), (dh, ddown, dup, dbias, dsource)):
            assert same_bits(again, first)

    check_sourced(holds, backend, device)


def test_what_is_not_needed_comes_back_empty(backend: str, device: str) -> None:
    def holds(it: Sourced) -> None:
        grad = gradient_like(it.case)
        everything = backward(it, grad, backend)
        for need_h, need_pool in ((True, False), (False, True), (False, False)):
            some = backward(it, grad, backend, need_h, need_pool)
            needs = (need_h, need_pool, need_pool, need_pool, True)
            for needed, whole, part in zip(needs, everything, some):
                assert same_bits(part, whole) if needed else part.numel() == 0

    check_sourced(holds, backend, device)


def test_the_dispatcher_knows_the_ops(backend: str, device: str) -> None:
    it = sourced(USUAL, device)
    for tensor in (it.case.storage, it.case.down, it.case.up, it.case.bias, it.source):
        tensor.nan_to_num_(0.5, 0.5, 0.5)
    case, grad = it.case, gradient_like(it.case)
    torch.library.opcheck(INTERVENE_SOURCE_[backend], (case.copy().h, it.source, *case.pool, *case.plan))
    leaves = [t.clone().requires_grad_() for t in (case.h, it.source, case.down, case.up, case.bias)]
    arguments = (*leaves, case.kind, *case.plan, case.offsets)
    torch.library.opcheck(INTERVENE_SOURCE[backend], arguments)
    hs = case.flat[case.rows.clamp(min=0).long()]
    torch.library.opcheck(
        INTERVENE_SOURCE_BACKWARD[backend],
        (grad, hs, it.source, *case.pool, *case.plan, case.offsets, True, True),
    )
    found = torch.autograd.grad(INTERVENE_SOURCE[backend](*arguments), leaves, grad)
    dh, ddown, dup, dbias, dsource = backward(it, grad, backend)
    for mine, theirs in zip(found, (dh, dsource, ddown, dup, dbias)):
        assert same_bits(mine, theirs)


def test_a_source_that_does_not_fit_is_refused_before_anything_is_written(backend: str, device: str) -> None:
    it = sourced(USUAL, device)
    after = it.case.copy()
    wrong = [it.source[:-1], it.source[0], it.source.to(torch.float16), it.source.T.contiguous().T]
    if backend != "triton":  # which does not read the ranks back
        wrong.append(it.source[:, :2].contiguous())
    for source in wrong:
        with pytest.raises((ValueError, RuntimeError), match="source: "):
            INTERVENE_SOURCE_[backend](after.h, source, *after.pool, *after.plan)
        assert same_bits(after.storage, it.case.storage)
