"""The pool, against a model that remembers every fold."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.cases import same_bits

from reft_kernels import Fold, Pool, PoolFull, Span

WIDTH = 3
TENSORS = ("down", "up", "bias", "kind")


def fold(rank: int, seed: int, width: int = WIDTH) -> Fold:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, rank, width, generator=generator)
    kind = torch.randint(0, 9, (rank,), generator=generator, dtype=torch.int32)
    return Fold(down, up, torch.randn(rank, generator=generator), kind)


def contents(pool: Pool, span: Span) -> list[torch.Tensor]:
    return [getattr(pool, name)[span.first : span.first + span.rank] for name in TENSORS]


class PoolMachine(RuleBasedStateMachine):
    """Adds, removes and rewrites in any order. `held` is what the pool must hold."""

    capacity: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(WIDTH, torch.bfloat16, capacity=self.capacity)
        self.held: dict[Span, Fold] = {}
        self.removed: Span | None = None
        self.addresses = [getattr(self.pool, name).data_ptr() for name in TENSORS]

    def _holes(self) -> list[int]:
        """Sizes of the free ranges, from what is held."""
        taken = sorted(self.held)
        ends = [0, *(span.first + span.rank for span in taken)]
        starts = [*(span.first for span in taken), self.pool.capacity]
        return [start - end for end, start in zip(ends, starts)]

    @rule(rank=st.integers(1, 7), seed=st.integers(0, 99))
    def add(self, rank: int, seed: int) -> None:
        fits = max(self._holes()) >= rank
        assert self.pool.room_for([rank]) == fits
        before = self.pool.capacity, [getattr(self.pool, name).clone() for name in TENSORS]
        if self.capacity is not None and not fits:
            with pytest.raises(PoolFull, match=f"no {rank} contiguous rows"):
                self.pool.add(fold(rank, seed))
            assert self.pool.capacity == before[0]
            assert all(same_bits(getattr(self.pool, name), old) for name, old in zip(TENSORS, before[1]))
            return
        span = self.pool.add(fold(rank, seed))
        assert span.rank == rank and span not in self.held
        if fits:  # room is reused before the pool grows
            assert self.pool.capacity == before[0]
        self.held[span] = fold(rank, seed)
        self.removed = None

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        span = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[span]
        self.pool.remove(span)
        self.removed = span

    @precondition(lambda self: self.removed)
    @rule()
    def remove_twice(self) -> None:
        with pytest.raises(ValueError, match="free already"):
            self.pool.remove(self.removed)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), seed=st.integers(100, 199))
    def write(self, data: st.DataObject, seed: int) -> None:
        span = data.draw(st.sampled_from(sorted(self.held)))
        self.held[span] = fold(span.rank, seed)
        self.pool.write(span, self.held[span])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def write_of_another_rank(self, data: st.DataObject) -> None:
        span = data.draw(st.sampled_from(sorted(self.held)))
        with pytest.raises(ValueError, match="does not fit a span"):
            self.pool.write(span, fold(span.rank + 1, 0))

    @rule(ranks=st.lists(st.integers(0, 6), max_size=5))
    def room_for_several(self, ranks: list[int]) -> None:
        """`room_for` foretells what adding them one after the other does."""
        foretold, spans, grown = self.pool.room_for(ranks), [], False
        for rank in ranks:
            size = self.pool.capacity
            try:
                spans.append(self.pool.add(fold(rank, 0)))
            except PoolFull:
                grown = True
                break
            grown = grown or self.pool.capacity > size
        assert foretold != grown
        for span in spans:
            self.pool.remove(span)
        self.removed = None

    @invariant()
    def spans_lie_apart_and_inside(self) -> None:
        taken = sorted(self.held)
        for one, next_one in zip(taken, taken[1:]):
            assert one.first + one.rank <= next_one.first
        assert not taken or taken[-1].first + taken[-1].rank <= self.pool.capacity
        assert self.pool.used == sum(span.rank for span in taken)

    @invariant()
    def contents_are_the_folds_rounded_once(self) -> None:
        for span, held in self.held.items():
            for now, then in zip(contents(self.pool, span), held):
                assert same_bits(now, then.to(now.dtype))

    @invariant()
    def addresses_stay_where_the_capacity_is_fixed(self) -> None:
        if self.capacity is not None:
            assert self.addresses == [getattr(self.pool, name).data_ptr() for name in TENSORS]
            assert self.pool.capacity == self.capacity


class FixedPoolMachine(PoolMachine):
    capacity = 17


TestGrowingPool = PoolMachine.TestCase
TestFixedPool = FixedPoolMachine.TestCase


def test_rank_0_takes_no_room() -> None:
    pool = Pool(WIDTH, capacity=1)
    span = pool.add(fold(0, 0))
    assert span.rank == 0 and pool.used == 0
    pool.remove(span)
    assert pool.room_for([1])


def test_a_freed_range_joins_its_neighbours() -> None:
    pool = Pool(WIDTH, capacity=12)
    spans = [pool.add(fold(4, seed)) for seed in range(3)]
    for index in (0, 2, 1):
        pool.remove(spans[index])
    assert pool.add(fold(12, 0)) == Span(0, 12)


def test_growth_doubles() -> None:
    """So that adding n adapters copies O(n) rows."""
    pool, sizes = Pool(WIDTH), set()
    for seed in range(200):
        pool.add(fold(2, seed))
        sizes.add(pool.capacity)
    assert len(sizes) <= 7


def test_dtypes_of_the_tensors() -> None:
    for dtype, bias in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.float16, torch.float32)):
        pool = Pool(WIDTH, dtype, capacity=2)
        assert [getattr(pool, name).dtype for name in TENSORS] == [dtype, dtype, bias, torch.int32]


def test_a_fold_that_requires_grad_is_copied_out_of_the_graph() -> None:
    pool = Pool(WIDTH, capacity=4)
    down, up, bias, kind = fold(2, 1)
    pool.add(Fold(down.requires_grad_(), up.requires_grad_(), bias.requires_grad_(), kind))
    assert not any(getattr(pool, name).requires_grad for name in TENSORS)


def test_a_pool_that_grew_in_inference_mode_can_be_trained_through() -> None:
    """A subspace or composition is laid into the pool when first asked for, maybe inside generate."""
    with torch.inference_mode():
        pool = Pool(WIDTH)
        span = pool.add(fold(2, 1))
    pool.write(span, fold(2, 2))
    assert not any(getattr(pool, name).is_inference() for name in TENSORS)


def test_threads_that_add_and_grow() -> None:
    """No fold is lost when another thread grows the pool at the same moment."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        _add_from_threads()
    finally:
        sys.setswitchinterval(interval)


def _add_from_threads() -> None:
    pool, spans = Pool(WIDTH), {}

    def work(start: int) -> None:
        for seed in range(start, start + 300):
            spans[seed] = pool.add(fold(1 + seed % 3, seed))

    threads = [threading.Thread(target=work, args=(1000 * index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, span in spans.items():
        for now, then in zip(contents(pool, span), fold(1 + seed % 3, seed)):
            assert same_bits(now, then)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width: must be at least 1, was 0"),
        ({"width": 4, "dtype": torch.int8}, "dtype: must be one of .*, was torch.int8"),
        ({"width": 4, "capacity": 0}, "capacity: .*, was 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pool(**arguments)


def test_folds_that_do_not_fit() -> None:
    pool = Pool(WIDTH, capacity=4)
    span = pool.add(fold(2, 0))
    before = [getattr(pool, name).clone() for name in TENSORS]
    good = fold(2, 1)
    bad = [
        fold(2, 1, width=WIDTH + 1),
        good._replace(down=good.down[:1]),
        good._replace(bias=good.bias[:1]),
        good._replace(kind=good.kind[:1]),
    ]
    for it in bad:
        with pytest.raises(ValueError, match="fold: "):
            pool.add(it)
        with pytest.raises(ValueError, match="fold: "):
            pool.write(span, it)
    assert pool.used == 2
    assert all(same_bits(getattr(pool, name), old) for name, old in zip(TENSORS, before))


@pytest.mark.parametrize("span", [Span(3, 2), Span(4, 1), Span(-1, 1), Span(100, 3)])
def test_ranges_outside_the_pool(span: Span) -> None:
    pool = Pool(WIDTH, capacity=4)
    pool.add(fold(4, 0))
    with pytest.raises(ValueError, match="span: "):
        pool.remove(span)
    with pytest.raises(ValueError, match="span: "):
        pool.write(span, fold(span.rank, 1))
    assert pool.used == 4 and not pool.room_for([1])
