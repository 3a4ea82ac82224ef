"""Many elementwise adapters: their pool, and `intervene` with it, beside low-rank ones in one batch."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cases import same_bits
from support.pools import draw, pool_and_plan

import reft_kernels as rk
from reft_kernels import functional

D = 8


def two(device: str = "cpu") -> tuple[rk.ScalePool, list[rk.Span], list[rk.ScaleFold]]:
    pool = rk.ScalePool(D, device=device)
    folds = [rk.ScaleFold.of(*draw(seed, (D,), (D,), device=device)) for seed in (1, 2)]
    return pool, [pool.add(fold) for fold in folds], folds


def test_rows_take_the_scales_of_their_adapters(backend: str, device: str) -> None:
    pool, spans, folds = two(device)
    (h,) = draw(5, (6, D), device=device)
    plan = rk.make_plan([(spans[1], [0, 4]), (spans[0], [3])], device, total_rows=6)
    with rk.backend(backend):
        out = functional.intervene(h, pool, plan)
        edited = functional.intervene_(h.clone(), pool, plan)
    want = h.clone()
    for row, fold in ((0, folds[1]), (4, folds[1]), (3, folds[0])):
        want[row] = h[row] * (1 + fold.scale_less_one[0]) + fold.shift[0]
    torch.testing.assert_close(out, want)
    assert same_bits(out, edited)
    assert same_bits(out[[1, 2, 5]], h[[1, 2, 5]])


def test_beside_low_rank_adapters_in_one_batch(backend: str, device: str) -> None:
    """Two plans, in either order: each row takes one of the two kinds, and is what it is alone."""
    scales, spans, _ = two(device)
    low_rank, plan = pool_and_plan(device)  # rows 1, 5 and 0
    others = rk.make_plan([(spans[0], [2]), (spans[1], [4])], device, total_rows=6)
    (h,) = draw(6, (2, 3, D), device=device)
    with rk.backend(backend):
        one = functional.intervene_(functional.intervene_(h.clone(), low_rank, plan), scales, others)
        other = functional.intervene_(functional.intervene_(h.clone(), scales, others), low_rank, plan)
        parts = functional.intervene(h, low_rank, plan), functional.intervene(h, scales, others)
    assert same_bits(one, other)
    flat = one.view(-1, D)
    assert same_bits(flat[[0, 1, 5]], parts[0].view(-1, D)[[0, 1, 5]])
    assert same_bits(flat[[2, 4]], parts[1].view(-1, D)[[2, 4]])
    assert same_bits(flat[3], h.view(-1, D)[3])


def test_h_gets_its_gradient(backend: str, device: str) -> None:
    pool, spans, folds = two(device)
    (h,) = draw(5, (3, D), device=device)
    h.requires_grad_()
    with rk.backend(backend):
        functional.intervene(h, pool, rk.make_plan([(spans[0], [1])], device, total_rows=3)).sum().backward()
    want = torch.ones_like(h)
    want[1] = 1 + folds[0].scale_less_one[0]
    torch.testing.assert_close(h.grad, want)


def test_rows_come_go_and_are_written_anew() -> None:
    pool, (first, second), folds = two()
    pool.write(first, folds[1])
    assert same_bits(pool.rows.shift[first.first], folds[1].shift[0])
    pool.remove(second)
    for seed in range(20):  # it grows, and keeps what it has
        pool.add(rk.ScaleFold.of(*draw(seed, (D,), (D,))))
    assert same_bits(pool.rows.scale_less_one[first.first], folds[1].scale_less_one[0])
    assert pool.used == 21
    twin = copy.deepcopy(pool)
    assert same_bits(twin.rows.shift, pool.rows.shift)
    with pytest.raises(ValueError, match="plan: .*removed|entries.*removed"):
        functional.intervene_(torch.zeros(2, D), pool, rk.make_plan([(second, [0])]))


def test_a_scale_is_taken_off_one_in_float32() -> None:
    """In bfloat16 a scale of 2⁻¹² less one would be −1, which assigns."""
    scale = torch.tensor([2.0**-12, 0.0], dtype=torch.bfloat16)
    fold = rk.ScaleFold.of(scale, torch.zeros(2, dtype=torch.bfloat16))
    assert fold.scale_less_one.dtype is torch.float32
    assert fold.scale_less_one.tolist() == [[2.0**-12 - 1, -1.0]]
    assert (fold.rank, fold.width) == (1, 2)


def test_bad_input_is_refused_by_name() -> None:
    h, (pool, spans, folds) = torch.zeros(6, D), two()
    low_rank, _ = pool_and_plan()
    foreign = low_rank.add(rk.Fold(h[:1], h[:1], h[0, :1], torch.zeros(1, dtype=torch.int32)))
    plan = rk.make_plan([(foreign, [0])])
    wide = rk.ScaleFold.of(torch.ones(3), torch.ones(3))
    weight = torch.ones(D)
    for message, call in (
        ("dtype: must be torch.float32", lambda: rk.ScalePool(D, torch.bfloat16)),
        ("fold: must be a ScaleFold", lambda: pool.add(tuple(folds[0]))),
        ("fold: scale_less_one must be \\[1, 8\\]", lambda: pool.add(wide)),
        ("fold: shift must be floating", lambda: pool.add(folds[0]._replace(shift=torch.ones(1, D).int()))),
        ("fold: must be a Fold", lambda: low_rank.add(folds[0])),
        ("plan: .*another pool", lambda: functional.intervene_(h, pool, plan)),
        ("pool: .*intervene_norm_", lambda: functional.intervene_norm_(h, pool, plan, weight)),
        ("h: last dimension", lambda: functional.intervene_(h[:, 1:], pool, rk.make_plan([(spans[0], [0])]))),
    ):
        before = pool.rows.shift.clone()
        with pytest.raises(ValueError, match=message):
            call()
        assert same_bits(pool.rows.shift, before) and not h.any()
