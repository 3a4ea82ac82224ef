"""scale_shift_, scale_shift and its backward: values against float64, bits, what must not be read."""

from __future__ import annotations

import random

import numpy as np
import torch
from support.calls import gradient_like
from support.cases import DTYPES, USUAL, Segment, bits, ragged_tiles, same_bits
from support.oracle import FLOOR, UNIT, wide
from support.scale_cases import Scaled, backward, check_scaled, in_place, out_of_place, scaled

from reft_kernels.ops import SCALE_SHIFT, SCALE_SHIFT_, SCALE_SHIFT_BACKWARD


def _edits(it: Scaled):
    """(row, pool row) of every edited row of h."""
    return [(r, s.first) for s in it.case.segments if s.rank for r in s.rows if r >= 0]


def _sums(it: Scaled) -> float:
    return UNIT[torch.float64 if it.case.h.dtype is torch.float64 else torch.float32]


def test_in_place_is_the_formula(backend: str, device: str) -> None:
    def holds(it: Scaled) -> None:
        before, after = wide(it.case.flat), wide(in_place(it, backend).flat)
        scale, shift = 1 + wide(it.scale_less_one), wide(it.shift)
        unit = UNIT[it.case.h.dtype]
        for row, pool_row in _edits(it):
            terms = np.abs(scale[pool_row] * before[row]) + np.abs(shift[pool_row])
            error = 4 * _sums(it) * terms
            want = scale[pool_row] * before[row] + shift[pool_row]
            limit = error + unit * (np.abs(want) + error) + FLOOR[it.case.h.dtype]
            assert (np.abs(after[row] - want) <= limit).all(), f"row {row}"

    check_scaled(holds, backend, device)


def test_out_of_place_has_its_bits_and_all_else_keeps_its_own(backend: str, device: str) -> None:
    def holds(it: Scaled) -> None:
        case, after = it.case, in_place(it, backend)
        result = out_of_place(it, backend)
        assert result.is_contiguous() and result.shape == case.h.shape
        assert same_bits(result, after.h)
        untouched = torch.ones_like(case.storage, dtype=torch.bool)
        mine = untouched.as_strided((case.spec.count, case.spec.d), case.flat.stride(), case.spec.offset)
        mine[case.edited] = False
        assert torch.equal(bits(after.storage)[untouched], bits(case.storage)[untouched])
        assert same_bits(case.storage, scaled(case.spec, device).case.storage)

    check_scaled(holds, backend, device)


def test_a_scale_of_zero_assigns_even_to_inf_and_nan(backend: str, device: str) -> None:
    def holds(it: Scaled) -> None:
        case = it.case
        zero = wide(it.scale_less_one) == -1
        special = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=case.h.dtype, device=device)
        for row, _ in _edits(it):
            case.flat[row] = special[row % 3]
        after = in_place(it, backend)
        for row, pool_row in _edits(it):
            at = torch.from_numpy(zero[pool_row]).to(device)
            assert same_bits(after.flat[row][at], it.shift[pool_row][at].to(case.h.dtype))
            assert not after.flat[row][~at].isfinite().any()

    check_scaled(holds, backend, device)


def test_a_row_does_not_know_its_batch(backend: str, device: str) -> None:
    """Alone, and in shuffled segments with other tiles: the same bits."""

    def holds(it: Scaled) -> None:
        case, together, rng = it.case, in_place(it, backend), random.Random(it.case.spec.seed)
        segments = [
            Segment(s.first, s.rank, tuple(rng.sample(s.rows, len(s.rows))))
            for s in rng.sample(case.segments, len(case.segments))
        ]
        shuffled = in_place(it, backend, case.with_segments(segments, ragged_tiles(rng)))
        assert same_bits(shuffled.storage, together.storage)
        for row, first in _edits(it)[:4]:
            alone = in_place(it, backend, case.with_segments([Segment(first, 1, (row,))]))
            assert same_bits(alone.flat[row], together.flat[row])

    check_scaled(holds, backend, device, dtypes=DTYPES)


def test_gradients_are_the_analytic_ones(backend: str, device: str) -> None:
    def holds(it: Scaled) -> None:
        case, grad = it.case, gradient_like(it.case)
        dh, dscale, dshift = backward(it, grad, backend)
        g, x = wide(grad.view(-1, case.spec.d)), wide(case.flat)
        got, factor = wide(dh.view(-1, case.spec.d)), 1 + wide(it.scale_less_one)
        want = {name: np.zeros(it.shift.shape) for name in ("scale", "shift")}
        size = {name: np.zeros(it.shift.shape) for name in ("scale", "shift")}
        for row, pool_row in _edits(it):
            expected = factor[pool_row] * g[row]
            limit = (UNIT[dh.dtype] + 4 * _sums(it)) * np.abs(expected) * 1.01 + FLOOR[dh.dtype]
            assert (np.abs(got[row] - expected) <= limit).all(), f"dh of row {row}"
            for name, term in (("scale", g[row] * x[row]), ("shift", g[row])):
                want[name][pool_row] += term
                size[name][pool_row] += np.abs(term)
        used = sorted({pool_row for _, pool_row in _edits(it)})
        unused = [row for row in range(len(it.shift)) if row not in used]
        for name, gradient in (("scale", dscale), ("shift", dshift)):
            assert gradient.shape == it.shift.shape and gradient.dtype == it.shift.dtype
            limit = UNIT[gradient.dtype] * (len(case.rows) + 8) * size[name]
            assert (np.abs(wide(gradient) - want[name]) <= limit).all(), name
            assert (bits(gradient)[unused] == 0).all(), name
        keep = torch.ones(case.spec.count, dtype=torch.bool, device=device)
        keep[case.edited] = False
        assert same_bits(dh.view(-1, case.spec.d)[keep], grad.view(-1, case.spec.d)[keep])
        for again, first in zip(backward(it, grad, backend), (dh, dscale, dshift)):
            assert same_bits(again, first)

    check_scaled(holds, backend, device)


def test_what_is_not_needed_comes_back_empty(backend: str, device: str) -> None:
    def holds(it: Scaled) -> None:
        grad = gradient_like(it.case)
        everything = backward(it, grad, backend)
        for need_h, need_pool in ((True, False), (False, True), (False, False)):
            some = backward(it, grad, backend, need_h, need_pool)
            for needed, whole, part in zip((need_h, need_pool, need_pool), everything, some):
                assert same_bits(part, whole) if needed else part.numel() == 0

    check_scaled(holds, backend, device)


def test_the_dispatcher_knows_the_ops(backend: str, device: str) -> None:
    it = scaled(USUAL, device)
    for tensor in (it.case.storage, *it.pool):
        tensor.nan_to_num_(0.5, 0.5, 0.5)
    case, grad = it.case, gradient_like(it.case)
    torch.library.opcheck(SCALE_SHIFT_[backend], (case.copy().h, *it.pool, *case.plan))
    leaves = [t.clone().requires_grad_() for t in (case.h, *it.pool)]
    torch.library.opcheck(SCALE_SHIFT[backend], (*leaves, *case.plan, case.offsets))
    hs = case.flat[case.rows.clamp(min=0).long()]
    torch.library.opcheck(
        SCALE_SHIFT_BACKWARD[backend], (grad, hs, *it.pool, *case.plan, case.offsets, True, True)
    )
    out = SCALE_SHIFT[backend](*leaves, *case.plan, case.offsets)
    for mine, theirs in zip(torch.autograd.grad(out, leaves, grad), backward(it, grad, backend)):
        assert same_bits(mine, theirs)
