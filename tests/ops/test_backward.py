"""intervene_backward against analytic gradients in float64."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.calls import backward, gradient_like
from support.cases import DTYPES, Case, Segment, bits, check, same_bits
from support.oracle import UNIT
from torch import Tensor

from reft_kernels.ops import INTERVENE, InterveneInPlace


def _limit(case: Case, scale, value, dtype: torch.dtype):
    """Allowed error: float32 sums, and the rounding of the result (twice: segments may share a range)."""
    h = case.h.dtype
    sums = UNIT[torch.float64 if h is torch.float64 and case.down.dtype is h else torch.float32]
    terms = 4 * (case.spec.d + len(case.rows) + 16)
    return (sums * terms + 4 * oracle.between(h)) * scale + 2 * UNIT[dtype] * abs(value) + oracle.FLOOR[dtype]


def test_equals_the_analytic_gradient(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        grad = gradient_like(case)
        result = dict(zip(("h", "down", "up", "bias"), backward(case, grad, backend)))
        expected, scale = oracle.backward(case, grad)
        assert result["h"].shape == case.h.shape and result["h"].dtype == case.h.dtype
        edited = case.edited
        got, want = oracle.wide(result["h"].reshape(-1, case.spec.d)), expected["h"]
        limit = _limit(case, scale["h"], want, case.h.dtype)
        assert (abs(got - want) <= limit)[edited].all(), "h"
        for name in ("down", "up", "bias"):
            tensor = getattr(case, name)
            assert result[name].shape == tensor.shape and result[name].dtype == tensor.dtype
            limit = _limit(case, scale[name], expected[name], tensor.dtype)
            assert (abs(oracle.wide(result[name]) - expected[name]) <= limit).all(), name

    check(holds, backend, device)


def test_rows_without_an_edit_pass_the_gradient_to_the_bit(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        grad = gradient_like(case)
        keep = torch.ones(case.spec.count, dtype=torch.bool, device=device)
        keep[case.edited] = False
        noise = grad.view(-1, case.spec.d)
        noise[keep] = case.flat[keep]  # random bits
        before = grad.clone()
        dh, *_ = backward(case, grad, backend)
        assert same_bits(dh.view(-1, case.spec.d)[keep], noise[keep])
        assert same_bits(grad, before)

    check(holds, backend, device)


def test_pool_rows_that_no_row_used_get_zeros(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        unused = torch.ones(len(case.bias), dtype=torch.bool, device=device)
        for segment in case.segments:
            if any(row >= 0 for row in segment.rows):
                unused[segment.first : segment.first + segment.rank] = False
        for gradient in backward(case, gradient_like(case), backend)[1:]:
            assert (bits(gradient)[unused] == 0).all()

    check(holds, backend, device)


@pytest.mark.parametrize(("need_h", "need_pool"), [(True, False), (False, True), (False, False)])
def test_what_is_not_needed_comes_back_empty(
    backend: str, device: str, need_h: bool, need_pool: bool
) -> None:
    def holds(case: Case) -> None:
        grad = gradient_like(case)
        everything = backward(case, grad, backend)
        some = backward(case, grad, backend, need_h, need_pool)
        for needed, all_of_it, it in zip((need_h, *[need_pool] * 3), everything, some):
            assert same_bits(it, all_of_it) if needed else it.numel() == 0

    check(holds, backend, device)


def test_a_gradient_with_other_strides(backend: str, device: str) -> None:
    """What autograd hands on is seldom contiguous: expanded (of a sum) and transposed gradients."""

    def holds(case: Case) -> None:
        wide = gradient_like(case)
        if wide.dim() < 2:
            return
        for grad in (wide.transpose(0, -1).contiguous().transpose(0, -1), wide[..., :1].expand_as(wide)):
            for it, plain in zip(backward(case, grad, backend), backward(case, grad.contiguous(), backend)):
                assert same_bits(it, plain)

    check(holds, backend, device)


def _leaves(case: Case) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in (case.h, case.down, case.up, case.bias)]


def test_the_in_place_function_has_the_gradients_of_the_functional(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        grad = gradient_like(case)
        h, *pool = leaves = _leaves(case)
        out = INTERVENE[backend](h, *pool, case.kind, *case.plan, case.offsets)
        functional = torch.autograd.grad(out, leaves, grad)

        h, *pool = leaves = _leaves(case)
        fresh = h * 1  # what a block hands on: no leaf, no view, saved by nobody
        edited = InterveneInPlace.apply(fresh, *pool, case.kind, *case.plan, case.offsets, backend)
        assert edited is fresh and same_bits(edited, out)
        for mine, theirs in zip(torch.autograd.grad(edited, leaves, grad), functional):
            assert same_bits(mine, theirs)

    # Multiplying by 1 would quieten the NaNs of rows that nobody edits.
    check(lambda case: holds(_without_noise(case)), backend, device)


def _without_noise(case: Case) -> Case:
    case.storage.nan_to_num_(0.5, 0.5, 0.5)
    return case


def test_only_what_needs_a_gradient_gets_one(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        h, down, up, bias = _leaves(case)
        out = INTERVENE[backend](h.detach(), down, up.detach(), bias, case.kind, *case.plan, case.offsets)
        out.backward(gradient_like(case))
        assert h.grad is None and up.grad is None
        _, ddown, _, dbias = backward(case, gradient_like(case), backend, need_h=False)
        assert same_bits(down.grad, ddown) and same_bits(bias.grad, dbias)

    check(holds, backend, device)


def test_segments_that_share_a_range_add_up(backend: str, device: str) -> None:
    """One adapter at two position groups: its gradient is that of one segment with all the rows."""

    def holds(case: Case) -> None:
        if not case.segments or not case.segments[0].rank:
            return
        first = case.segments[0]
        rows = tuple(range(case.spec.count))
        case.flat[:] = torch.randn(case.flat.shape, generator=torch.Generator().manual_seed(1)).to(case.flat)
        grad = gradient_like(case)
        span = (first.first, first.rank)
        divided = case.with_segments([Segment(*span, part) for part in (rows[::3], rows[1::3], rows[2::3])])
        whole = case.with_segments([Segment(*span, rows)])
        expected, scale = oracle.backward(divided, grad)
        results = backward(divided, grad, backend), backward(whole, grad, backend)
        assert same_bits(results[0][0], results[1][0])
        for result in results:
            for name, gradient in zip(("down", "up", "bias"), result[1:]):
                limit = _limit(divided, scale[name], expected[name], gradient.dtype)
                assert (abs(oracle.wide(gradient) - expected[name]) <= limit).all(), name

    check(holds, backend, device, dtypes=DTYPES)
