"""Position specs: parsing, clamping as in pyreft, overlaps."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from reft_kernels import Positions

counts = st.integers(1, 12)
texts = st.one_of(
    st.sampled_from(["all", "prompt", "generated"]),
    counts.map("f{}".format),
    counts.map("l{}".format),
    st.tuples(counts, counts).map(lambda pair: "f{}+l{}".format(*pair)),
)
indices = st.lists(st.integers(-6, 6), min_size=1, max_size=4, unique=True)
specs = st.builds(Positions.parse, st.one_of(texts, indices), st.sampled_from(["length", "length-1"]))


@given(st.one_of(texts, indices), st.sampled_from([None, "length", "length-1"]))
def test_parse_and_to_json_round_trip(spec: str | list[int], where: str | None) -> None:
    parsed = Positions.parse(spec, where)
    assert parsed.to_json() == spec
    assert str(parsed) == str(spec)
    assert Positions.parse(parsed.to_json(), parsed.last_position) == parsed
    assert Positions.parse(parsed) is parsed
    assert parsed.last_position == (where or "length")
    assert Positions.parse(parsed, "length-1").last_position == "length-1"


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("f3+l2", [0, 1, 2, 8, 9]),
        ("f7", [0, 1, 2, 3, 4]),
        ("l1", [9]),
        (" f1 ", [0]),
        ("all", list(range(10))),
        ("prompt", list(range(10))),
        ("generated", []),
        ([5, -1, 0], [0, 5, 9]),
    ],
)
def test_resolve_on_ten_tokens(spec: str | list[int], wanted: list[int]) -> None:
    found = Positions.parse(spec).resolve(10)
    assert found.dtype == np.int64 and found.tolist() == wanted


@pytest.mark.parametrize(
    "spec", ["", "f", "l", "f0", "l0", "f3+", "+l3", "f3l3", "l3+f3", "f-1", "f3+f3", "every", "f3 + l3", "3"]
)
def test_what_is_no_spec(spec: str) -> None:
    with pytest.raises(ValueError, match=re.escape('positions: must be a spec such as "f3+l3"')) as caught:
        Positions.parse(spec)
    assert str(caught.value).endswith(f"was {spec!r}")


@pytest.mark.parametrize("spec", [[], [1.0], [True], [1, 1], ["0"], 3, None, {0}])
def test_what_is_no_list_of_indices(spec: object) -> None:
    with pytest.raises(ValueError, match="positions: "):
        Positions.parse(spec)


def test_unknown_last_position() -> None:
    with pytest.raises(ValueError, match="last_position: .*'end'"):
        Positions.parse("l1", "end")
    with pytest.raises(ValueError, match="last_position: .*'end'"):
        Positions.parse(Positions.parse("l1"), "end")


@pytest.mark.parametrize(("spec", "length"), [([5], 5), ([-6], 5), ([0], 0), ([4, -1], 5)])
def test_an_index_that_the_prompt_lacks_or_has_twice(spec: list[int], length: int) -> None:
    with pytest.raises(ValueError, match=f"positions: .*prompt of {length} tokens"):
        Positions.parse(spec).resolve(length)


@pytest.mark.parametrize("where", ["length", "length-1"])
@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("spec", ["f1", "l1", "f5", "l4", "f3+l3", "f1+l1", "f7+l2", "f2+l9"])
def test_the_positions_are_pyrefts(spec: str, share_weights: bool, where: str) -> None:
    """Its locations for every prompt length, its padding dropped."""
    pyreft = pytest.importorskip("pyreft")
    positions = Positions.parse(spec, where)
    parts = (positions,) if share_weights else positions.untied()
    layers = 2
    for length in range(1, 31):
        theirs = pyreft.get_intervention_locations(
            last_position=length if where == "length" else length - 1,
            positions=spec,
            num_interventions=layers * len(parts),
            share_weights=share_weights,
        )
        assert len(theirs) == layers * len(parts)
        # Untied, pyreft lists the f positions for the first half of its interventions, the l for the other.
        # Where a clamped count is 0 it gives both halves one list; only lengths below 2 do that with f and l.
        for number, locations in enumerate(theirs):
            mine = parts[number // layers].resolve(length)
            assert mine.tolist() == [place for place in locations if place >= 0], (length, number)


@given(specs)
def test_untied_parts_are_disjoint_and_make_up_the_whole(positions: Positions) -> None:
    parts = positions.untied()
    assert all(part.last_position == positions.last_position for part in parts)
    for length in range(1, 30):
        try:
            whole = positions.resolve(length)
        except ValueError:
            continue
        assert np.array_equal(np.concatenate([part.resolve(length) for part in parts]), whole)
    for one in parts:
        assert all(one is other or not one.overlaps(other) for other in parts)


@given(specs, st.integers(0, 40))
def test_resolved_positions_are_ascending_and_inside(positions: Positions, length: int) -> None:
    try:
        found = positions.resolve(length)
    except ValueError:
        assume(False)
    assert (np.diff(found) > 0).all()
    assert ((found >= 0) & (found < length)).all()


def _meet(one: Positions, other: Positions) -> bool:
    for length in range(1, 40):
        try:
            if np.intersect1d(one.resolve(length), other.resolve(length)).size:
                return True
        except ValueError:
            pass
    return one.generated and other.generated


@given(specs, specs)
@example(Positions.parse([0, -1]), Positions.parse([1, -2]))  # they meet in a prompt of two tokens
@example(Positions.parse([3]), Positions.parse([-1]))
def test_overlaps(one: Positions, other: Positions) -> None:
    """Symmetric, and never False where some prompt gives both a common position."""
    assert one.overlaps(other) == other.overlaps(one)
    assert one.overlaps(other) or not _meet(one, other)
    if "generated" in (one.word, other.word):
        assert one.overlaps(other) == _meet(one, other)


@given(st.tuples(texts, texts), st.sampled_from(["length", "length-1"]))
def test_overlaps_is_exact_without_explicit_indices(pair: tuple[str, str], where: str) -> None:
    one, other = (Positions.parse(text, where) for text in pair)
    assert one.overlaps(other) == _meet(one, other)


@given(specs)
def test_which_need_a_prompt(positions: Positions) -> None:
    assert positions.needs_prompt == (positions.word != "all")
    assert positions.generated == (positions.word in ("all", "generated"))
