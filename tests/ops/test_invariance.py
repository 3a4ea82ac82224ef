"""A row's result depends, to the bit, on that row and its pool range only; the same call, the same bits."""

from __future__ import annotations

import dataclasses
import random

import torch
from support.calls import backward, gradient_like, in_place, out_of_place
from support.cases import DTYPES, Case, Segment, build, check, ragged_tiles, same_bits

# The reference backend sums in float64 through BLAS, whose order depends on the batch. Rounded to the
# dtypes here, that shows about once in 10⁸ numbers, so it takes part in all but float64.


def test_a_row_alone_is_the_row_in_a_batch(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        together = in_place(case, backend)
        for segment in case.segments:
            for row in [row for row in segment.rows if row >= 0][:6]:
                alone = in_place(case.with_segments([Segment(segment.first, segment.rank, (row,))]), backend)
                assert same_bits(alone.flat[row], together.flat[row]), f"row {row}"

    check(holds, backend, device, dtypes=DTYPES)


def test_any_order_and_any_tiles(backend: str, device: str) -> None:
    """Segments and their rows shuffled, tiles cut anew: the same bits everywhere."""

    def holds(case: Case) -> None:
        rng = random.Random(case.spec.seed)
        segments = [
            dataclasses.replace(segment, rows=tuple(rng.sample(segment.rows, len(segment.rows))))
            for segment in rng.sample(case.segments, len(case.segments))
        ]
        shuffled = case.with_segments(segments, ragged_tiles(rng))
        assert same_bits(in_place(shuffled, backend).storage, in_place(case, backend).storage)

    check(holds, backend, device, dtypes=DTYPES)


def test_rows_permuted_in_memory(backend: str, device: str) -> None:
    """Equivariance: edit and permute is permute and edit."""

    def holds(case: Case) -> None:
        count = case.spec.count
        order = list(range(count))
        random.Random(case.spec.seed).shuffle(order)  # row i moves to order[i]
        moved = case.copy()
        moved.flat[order] = case.flat.clone()
        moved = moved.with_segments(
            [
                dataclasses.replace(s, rows=tuple(order[r] if r >= 0 else r for r in s.rows))
                for s in case.segments
            ]
        )
        assert same_bits(in_place(moved, backend).flat[order], in_place(case, backend).flat)

    check(holds, backend, device, dtypes=DTYPES)


def test_where_h_and_the_pool_lie_does_not_matter(backend: str, device: str) -> None:
    """Another alignment, another row stride, other pool rows: the same bits."""

    def holds(case: Case) -> None:
        neat = dataclasses.replace(case.spec, row_pad=0, offset=0)
        h = torch.empty(case.h.shape, dtype=case.h.dtype, device=device).copy_(case.h)
        shift = 1 + case.spec.seed % 4
        pool = [torch.cat([t[:1].expand(shift, *t.shape[1:]), t]) for t in case.pool]
        segments = [dataclasses.replace(s, first=s.first + shift) for s in case.segments]
        names = ("down", "up", "bias", "kind")
        other = dataclasses.replace(case, spec=neat, storage=h.view(-1), h=h, **dict(zip(names, pool)))
        after = in_place(other.with_segments(segments), backend)
        assert same_bits(after.flat, in_place(case, backend).flat)

    check(holds, backend, device, dtypes=DTYPES)


def test_the_same_call_twice_gives_the_same_bits(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        assert same_bits(out_of_place(case, backend), out_of_place(build(case.spec, device), backend))
        grad = gradient_like(case)
        for first, second in zip(backward(case, grad, backend), backward(case, grad, backend)):
            assert same_bits(first, second)

    check(holds, backend, device)


def test_the_gradient_of_a_row_alone(backend: str, device: str) -> None:
    """dh is a row's own affair too."""

    def holds(case: Case) -> None:
        grad = gradient_like(case)
        together, *_ = backward(case, grad, backend)
        for segment in case.segments:
            for row in [row for row in segment.rows if row >= 0][:4]:
                one = case.with_segments([Segment(segment.first, segment.rank, (row,))])
                alone, *_ = backward(one, grad, backend, need_pool=False)
                flat = (alone.view(-1, case.spec.d), together.view(-1, case.spec.d))
                assert same_bits(flat[0][row], flat[1][row]), f"row {row}"

    check(holds, backend, device, dtypes=DTYPES)
