"""Rows that are in several segments: joined where those meet, and left alone where they don't."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reft_kernels.batch.stacks import Mix, Part, Stack, Term, joined, parts_of, row_of, terms_of
from reft_kernels.plan import SegmentRows


@given(
    st.lists(st.lists(st.integers(0, 8), unique=True, max_size=6), min_size=1, max_size=5),
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4))),
)
def test_every_row_keeps_its_parts_and_no_two_segments_of_it_meet(
    by_segment: list[list[int]], pairs: set[tuple[int, int]]
) -> None:
    segments = tuple((f"a{index}", 0) for index in range(len(by_segment)))
    numbers = {Part(name, group): i for i, (name, group) in enumerate(segments)}

    def meet(one, other) -> bool:
        ones, others = ([numbers[part] for part in parts_of(it)] for it in (one, other))
        return any((i, j) in pairs or (j, i) in pairs for i in ones for j in others)

    given_rows = SegmentRows.of([np.array(rows, dtype=np.int64) for rows in by_segment])
    found, (rows, counts) = joined(segments, given_rows, meet)
    assert found[: len(segments)] == segments and len(counts) == len(found)
    owners = np.repeat(np.arange(len(found)), counts)
    assert len(rows) == len(owners)
    for row in range(9):
        mine = [found[owner] for owner in owners[rows == row]]
        assert len(set(mine)) == len(mine)
        assert not any(meet(a, b) for i, a in enumerate(mine) for b in mine[:i])
        parts = sorted(numbers[part] for segment in mine for part in parts_of(segment))
        assert parts == [i for i, listed in enumerate(by_segment) if row in listed]


def test_the_shortest_form_of_a_row() -> None:
    assert row_of([]) is None and row_of([Term("a", 0.0)]) is None
    assert row_of([Term("a")]) == row_of([Term("a"), Term("b", 0)]) == "a"
    assert row_of([Term("b"), Term("a", 2.0)]) == Mix((Term("a", 2.0), Term("b")))
    assert terms_of("a") == (Term("a", 1.0),) and terms_of(None) == ()
    assert repr(row_of([Term("b"), Term("a", 2.0)])) == "'a' times 2 and 'b'"
    assert parts_of(("a", 1)) == (Part("a", 1, 1.0),) == parts_of(Stack((Part("a", 1),)))
