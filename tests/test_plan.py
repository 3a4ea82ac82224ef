"""Plans: tiles cover each row once, segments stay apart, all of it is one buffer; bad rows are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reft_kernels import Span, make_plan
from reft_kernels.ops import TILE
from reft_kernels.plan import _tiles, cover, one_segment, pack_rows, pack_spans

SPAN = Span(0, 2)


@st.composite
def segments(draw: st.DrawFn) -> list[np.ndarray]:
    """Distinct rows dealt to segments, some of them empty, some as long as several tiles."""
    counts = draw(st.lists(st.sampled_from([0, 1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE, 50]), max_size=7))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    rows = rng.permutation(sum(counts) + draw(st.integers(0, 20)))[: sum(counts)]
    return np.split(rows, np.cumsum(counts)[:-1]) if counts else []


def assert_well_formed(rows: torch.Tensor, tiles: torch.Tensor, offsets: torch.Tensor, expected) -> None:
    for tensor in (rows, tiles, offsets):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert tiles.shape[1:] == (3,)
    assert offsets.tolist() == [0, *np.cumsum([len(segment) for segment in expected])]
    covered = np.zeros(len(rows), dtype=int)
    for segment, start, count in tiles.tolist():
        assert 0 < count <= TILE
        assert offsets[segment] <= start and start + count <= offsets[segment + 1]
        covered[start : start + count] += 1
    assert (covered == 1).all()
    for number, segment in enumerate(expected):
        assert rows[offsets[number] : offsets[number + 1]].tolist() == list(segment)


@given(segments())
def test_pack_rows(by_segment: list[np.ndarray]) -> None:
    packed = pack_rows(by_segment, "cpu")
    assert_well_formed(*packed, by_segment)
    assert len(packed.tiles) == sum(-(-len(rows) // TILE) for rows in by_segment)  # no more than needed
    pointers = {tensor.untyped_storage().data_ptr() for tensor in packed}
    assert len(pointers) == 1, "more than one buffer"


@given(segments(), st.data())
def test_make_plan(by_segment: list[np.ndarray], data: st.DataObject) -> None:
    spans = [Span(data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))) for _ in by_segment]
    forms = (lambda rows: rows, lambda rows: rows.tolist(), torch.as_tensor)
    form = data.draw(st.sampled_from(forms))
    plan = make_plan([(span, form(rows)) for span, rows in zip(spans, by_segment)], total_rows=1000)
    assert_well_formed(plan.rows, plan.tiles, plan.offsets, by_segment)
    assert plan.spans.dtype == torch.int32 and plan.spans.shape == (len(spans), 2)
    assert plan.spans.tolist() == [list(span) for span in spans]


@given(segments(), st.integers(0, 40))
def test_make_plan_that_covers(by_segment: list[np.ndarray], extra: int) -> None:
    total = sum(map(len, by_segment)) + 20 + extra
    plan = make_plan([(SPAN, rows) for rows in by_segment], total_rows=total, cover=True)
    for mine, expected in zip((plan.rows, plan.tiles, plan.offsets), cover(by_segment, total, "cpu")):
        assert mine.dtype == expected.dtype and torch.equal(mine, expected)
    assert plan.spans.tolist() == [list(SPAN)] * len(by_segment)


def test_a_plan_that_covers_needs_the_number_of_rows() -> None:
    with pytest.raises(ValueError, match="cover: needs total_rows"):
        make_plan([(SPAN, [1])], cover=True)
    with pytest.raises(ValueError, match=r"\[0, 3\); found 3"):
        make_plan([(SPAN, [3])], total_rows=3, cover=True)


@given(st.integers(0, 5 * TILE), st.integers(0, 9), st.booleans())
def test_one_segment(count: int, rank: int, every: bool) -> None:
    rows = None if every else list(range(count))[::-2]
    plan = one_segment(rows, count, rank, torch.device("cpu"))
    assert_well_formed(plan.rows, plan.tiles, plan.offsets, [range(count) if rows is None else rows])
    assert plan.spans.tolist() == [[0, rank]]


def test_empty_spans_table() -> None:
    assert pack_spans([], "cpu").shape == (0, 2)


def test_a_spans_table_from_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        assert not pack_spans([Span(0, 2)], "cpu").is_inference()


@pytest.mark.gpu
def test_a_plan_on_a_gpu_is_the_plan_on_the_host() -> None:
    entries = [(Span(0, 2), [4, 1]), (Span(2, 1), list(range(5, 40)))]
    for there, here in zip(make_plan(entries, "cuda"), make_plan(entries)):
        assert there.is_cuda and torch.equal(there.cpu(), here)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(SPAN, [3, 1, 3])], "row 3 is named twice"),
        ([(SPAN, [3]), (Span(2, 1), [1, 3])], "row 3 is named twice"),
        ([(SPAN, [0, -1])], r"\[0, 10\); found -1"),
        ([(SPAN, [0]), (SPAN, [10])], r"\[0, 10\); found 10"),
        ([(SPAN, [2**40])], rf"\[0, 10\); found {2**40}"),
        ([(SPAN, [0.5])], r"entries\[0\]: rows must be integers, were float"),
        ([(SPAN, [1]), (SPAN, [True, False])], r"entries\[1\]: rows must be integers, were bool"),
        ([(SPAN, torch.ones(2, dtype=torch.bool))], "rows must be integers, were bool"),
        ([(SPAN, [[1, 2]])], r"one-dimensional, had shape \(1, 2\)"),
        ([(SPAN, np.array(3))], r"one-dimensional, had shape \(\)"),
        ([(SPAN, [[0], [1, 2]])], r"entries\[0\]: rows must be a list of integers, were \[\[0\], \[1, 2\]\]"),
        ([(0, [0])], r"entries\[0\]: must be a pair of a Span and rows of h, was \(0, \[0\]\)"),
        ([(SPAN, [0]), [1, 2, 3]], r"entries\[1\]: must be a pair"),
        ((SPAN, [0]), r"entries\[0\]: must be a pair of a Span and rows of h, was Span\(first=0, rank=2\)"),
        (SPAN, r"entries: must be a list of pairs of a Span and rows of h, was Span"),
        (7, "entries: must be a list of pairs.*, was 7"),
        ([((0, 1, 2), [0])], r"entries\[0\]: its Span must have two integers, 0 or more, was \(0, 1, 2\)"),
        ([(Span(-1, 2), [0])], r"entries\[0\]: its Span must have two integers, 0 or more"),
        ([(Span(0, 2**31), [0])], r"entries\[0\]: its Span must have"),
        ([(Span(0.0, 2), [0])], r"entries\[0\]: its Span must have"),
    ],
)
def test_bad_rows(entries: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(entries, total_rows=10)


@pytest.mark.parametrize("total", [-1, 2.0, "6"])
def test_bad_total_rows(total: object) -> None:
    with pytest.raises(ValueError, match="total_rows: must be an integer, 0 or more, or None, was"):
        make_plan([], total_rows=total)


def test_rows_that_no_int32_holds_are_refused_without_total_rows() -> None:
    make_plan([(SPAN, [2**31 - 1])])
    with pytest.raises(ValueError, match=f"found {2**31}"):
        make_plan([(SPAN, [2**31])])


@given(segments(), st.integers(0, 40))
def test_cover_names_every_row_once(by_segment: list[np.ndarray], extra: int) -> None:
    total = sum(map(len, by_segment)) + 20 + extra
    rows, tiles, offsets = cover(by_segment, total, "cpu")
    assert sorted(rows.tolist()) == list(range(total))
    assert offsets.tolist() == [0, *np.cumsum([len(segment) for segment in by_segment])]
    owned = {}
    for segment, start, count in tiles.tolist():
        assert 0 < count <= TILE
        owned.setdefault(segment, []).extend(rows[start : start + count].tolist())
    for number, segment in enumerate(by_segment):
        assert owned.pop(number, []) == list(segment)
    assert set(owned) <= {-1}


@given(segments())
def test_tiles_of_each_segments_own_size(by_segment: list[np.ndarray]) -> None:
    counts = np.array([len(rows) for rows in by_segment], dtype=np.int64)
    largest = np.array([1 + 5 * (number % 3) for number in range(len(counts))], dtype=np.int64)
    covered = np.zeros(counts.sum(), dtype=int)
    ends = np.cumsum(counts)
    for segment, start, count in _tiles(counts, largest).tolist():
        assert 0 < count <= largest[segment]
        assert ends[segment] - counts[segment] <= start and start + count <= ends[segment]
        covered[start : start + count] += 1
    assert (covered == 1).all()
