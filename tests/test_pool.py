"""The pool, against a model that remembers every fold."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.cases import same_bits

from reft_kernels import Fold, Pool, PoolFull, Span, functional, make_plan

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


BAD_FOLDS = {
    "a tensor": (torch.zeros(2, WIDTH), "fold: must be a Fold of the tensors down .*, was a Tensor"),
    "three tensors": (fold(2, 0)[:3], "fold: must be a Fold .*, was a tuple"),
    "no tensor in it": (fold(2, 0)._replace(kind=[0, 0]), "fold: must be a Fold of the tensors"),
    "one dimension": (fold(2, 0)._replace(up=torch.zeros(WIDTH)), r"fold: up must be \[r, 3\].*was \[3\]"),
    "integers": (fold(2, 0)._replace(down=torch.zeros(2, WIDTH).int()), "fold: down must be floating, was"),
    "a floating kind": (fold(2, 0)._replace(kind=torch.zeros(2)), "fold: kind must be torch.int32, was"),
}


@pytest.mark.parametrize("name", BAD_FOLDS)
def test_what_is_no_fold(name: str) -> None:
    pool = Pool(WIDTH, capacity=4)
    bad, message = BAD_FOLDS[name]
    with pytest.raises(ValueError, match=message):
        pool.add(bad)
    assert pool.used == 0 and pool.room_for([4])


# Spans that a pool gave out ------------------------------------------------------------------------------


def test_a_span_is_the_pair_that_it_was() -> None:
    span = Pool(WIDTH).add(fold(2, 0))
    assert span == (0, 2) == Span(0, 2) and tuple(span) == (0, 2) and hash(span) == hash((0, 2))
    assert sorted([Span(4, 1), span]) == [span, Span(4, 1)] and repr(span) == "Span(first=0, rank=2)"
    first, rank = span
    assert (first, rank) == (span.first, span.rank) == (0, 2)


def test_a_span_that_was_removed_makes_no_plan() -> None:
    pool = Pool(WIDTH, capacity=4)
    kept, gone = pool.add(fold(2, 0)), pool.add(fold(2, 1))
    pool.remove(gone)
    message = r"entries\[1\]: Span\(first=2, rank=2\) was removed from its pool; its rows are free already"
    with pytest.raises(ValueError, match=message):
        make_plan([(kept, [0]), (gone, [1])])
    new = pool.add(fold(2, 2))
    assert new == gone  # the same rows, which are another's now
    with pytest.raises(ValueError, match=message):
        make_plan([(kept, [0]), (gone, [1])])
    make_plan([(kept, [0]), (new, [1]), (Span(0, 0), [2])])
    for call in (lambda: pool.remove(gone), lambda: pool.write(gone, fold(2, 3))):
        with pytest.raises(ValueError, match="span: .* was removed from its pool"):
            call()
    assert pool.used == 4
    for now, then in zip(contents(pool, new), fold(2, 2)):
        assert same_bits(now, then)


def test_a_plan_whose_span_was_removed_since_runs_no_more() -> None:
    pool = Pool(WIDTH, capacity=6)
    kept, gone, other = (pool.add(fold(2, seed)) for seed in range(3))
    plan, plan_of_kept = make_plan([(kept, [0]), (gone, [1])]), make_plan([(kept, [0])])
    h = torch.randn(3, WIDTH)
    before = h.clone()
    pool.remove(gone)
    pool.add(fold(2, 3))
    for function in (functional.intervene_, functional.intervene):
        with pytest.raises(ValueError, match=r"plan: Span\(first=2, rank=2\) was removed from its pool"):
            function(h, pool, plan)
    assert same_bits(h, before)
    for _ in range(2):
        functional.intervene_(h, pool, plan_of_kept)
    pool.remove(other)
    functional.intervene_(h, pool, plan_of_kept)
    pool.remove(kept)
    with pytest.raises(ValueError, match=r"plan: Span\(first=0, rank=2\) was removed"):
        functional.intervene_(h, pool, plan_of_kept)


def test_a_table_that_was_written_over_is_taken_at_its_word() -> None:
    """Tables that a CUDA graph reads stay where they are, and are filled with other spans."""
    pool = Pool(WIDTH, capacity=4)
    gone, kept = pool.add(fold(2, 0)), pool.add(fold(2, 1))
    plan, h = make_plan([(gone, [0])]), torch.randn(3, WIDTH)
    pool.remove(gone)
    plan.spans.copy_(torch.tensor([kept]))
    expected = functional.intervene(h, pool, make_plan([(kept, [0])]))
    assert same_bits(functional.intervene_(h, pool, plan), expected)


def test_a_span_of_another_pool() -> None:
    pool, other = Pool(WIDTH, capacity=4), Pool(WIDTH, capacity=4)
    span, foreign = pool.add(fold(2, 0)), other.add(fold(2, 1))
    h = torch.randn(3, WIDTH)
    before = h.clone()
    with pytest.raises(ValueError, match=r"plan: Span\(first=0, rank=2\) is of another pool"):
        functional.intervene_(h, pool, make_plan([(foreign, [0])]))
    with pytest.raises(ValueError, match=r"entries\[1\]: .* is of another pool; a plan takes rows of one"):
        make_plan([(span, [0]), (foreign, [1])])
    for call in (lambda: pool.remove(foreign), lambda: pool.write(foreign, fold(2, 3))):
        with pytest.raises(ValueError, match="span: .* is of another pool"):
            call()
    assert same_bits(h, before) and pool.used == other.used == 2


def test_spans_and_pools_that_were_copied_together_belong_together() -> None:
    pool = Pool(WIDTH, capacity=4)
    held = {"pool": pool, "span": pool.add(fold(2, 0)), "other": pool.add(fold(1, 1))}
    for copied in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        # The original's span and a span that was sent alone name the same rows of the copy.
        alone = pickle.loads(pickle.dumps(held["span"]))
        h = torch.randn(3, WIDTH)
        for span in (copied["span"], held["span"], alone):
            functional.intervene_(h, copied["pool"], make_plan([(span, [0])]))
        copied["pool"].remove(copied["span"])
        with pytest.raises(ValueError, match="was removed"):
            make_plan([(copied["span"], [0])])
        with pytest.raises(ValueError, match="plan: "):
            functional.intervene_(h, copied["pool"], make_plan([(held["span"], [0])]))
        # What was removed in a copy is still there.
        functional.intervene_(h, pool, make_plan([(held["span"], [0]), (held["other"], [1])]))


def test_only_ranges_that_add_returned_are_removed() -> None:
    pool = Pool(WIDTH, capacity=8)
    spans = [pool.add(fold(4, 0)), pool.add(fold(2, 1))]
    for bad in (Span(0, 2), Span(1, 3), Span(0, 6), Span(6, 2)):
        with pytest.raises(ValueError, match="span: .* is no range that add returned"):
            pool.remove(bad)
    with pytest.raises(ValueError, match="span: must be a Span that add returned, was 0"):
        pool.remove(0)
    assert pool.used == 6
    pool.remove(Span(0, 4))  # one that was noted down as numbers
    with pytest.raises(ValueError, match="was removed"):
        pool.remove(spans[0])
    assert pool.used == 2
