"""Position specs: parsing, clamping as in pyreft, overlaps."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import position_oracle

from reft_kernels import Positions

counts = st.integers(1, 12)
texts = st.one_of(
    st.sampled_from(["all", "prompt", "generated"]),
    counts.map("f{}".format),
    counts.map("l{}".format),
    st.tuples(counts, counts).map(lambda pair: "f{}+l{}".format(*pair)),
)
indices = st.lists(st.integers(-6, 6), min_size=1, max_size=4, unique=True)
ends = st.one_of(st.just(""), st.integers(-9, 9).map(str))
steps = st.one_of(st.just(""), st.integers(-4, 4).filter(bool).map(":{}".format))
late_ends = st.one_of(st.just(""), st.integers(0, 9).map(str))
late_steps = st.one_of(st.just(""), st.integers(1, 4).map(":{}".format))
terms = st.one_of(
    texts.filter(lambda text: "+" not in text),
    st.builds("prompt[{}:{}{}]".format, ends, ends, steps),
    st.builds("generated[{}:{}{}]".format, late_ends, late_ends, late_steps),
    st.integers(0, 9).map("generated[{}]".format),
    st.lists(st.integers(0, 3), min_size=1, max_size=2).map(lambda ids: f"token({','.join(map(str, ids))})"),
)
unions = st.builds(
    lambda added, removed: "+".join(added) + "".join(f"-{term}" for term in removed),
    st.lists(terms, min_size=1, max_size=3),
    st.lists(terms, max_size=2),
)
wheres = st.sampled_from(["length", "length-1"])
specs = st.builds(Positions.parse, st.one_of(texts, indices), wheres)
all_specs = st.builds(Positions.parse, st.one_of(texts, indices, unions), wheres)


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
    ("spec", "at", "why"),
    [
        ("", 0, "expected a term"),
        ("f", 1, "expected a count"),
        ("f0", 1, "expected a count"),
        ("f-1", 1, "expected a count"),
        ("f3+", 3, "expected a term"),
        ("+l3", 0, "expected a term"),
        ("f3l3", 2, "expected +, - or the end"),
        ("every", 0, "expected a term"),
        ("prompt+genrated", 7, "expected a term"),
        ("3", 0, "expected a term"),
        ("prompt[", 7, "expected an index or a slice"),
        ("prompt[]", 7, "expected an index or a slice"),
        ("prompt[1 2]", 9, "expected ':' or ']'"),
        ("prompt[1:2", 10, "expected ':' or ']'"),
        ("prompt[1:2:3:4]", 12, "expected ']'"),
        ("prompt[::0]", 9, "expected a step other than 0"),
        ("prompt[9999999999]", 7, "expected a number up to"),
        ("generated[-1]", 10, "expected an index from 0 up"),
        ("generated[2:-1]", 12, "expected an index from 0 up"),
        ("generated[::-1]", 12, "expected a step of at least 1"),
        ("token()", 6, "expected a token's id"),
        ("token(-3)", 6, "expected a token's id"),
        ("token(1", 7, "expected ',' or ')'"),
        ("all-f1+l1", 6, "what is taken away with - stands last"),
    ],
)
def test_what_is_no_spec(spec: str, at: int, why: str) -> None:
    """The error shows where the spec goes wrong, by a caret."""
    with pytest.raises(ValueError, match=re.escape('positions: must be a spec such as "f3+l3"')) as caught:
        Positions.parse(spec)
    first, shown, caret = str(caught.value).split("\n")
    assert first.endswith(f"was {spec!r}") and shown == f"  {spec}"
    assert caret.startswith(f"  {' ' * at}^ ") and why in caret


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("f3 + l3", "f3+l3"),
        ("l3+f3", "f3+l3"),
        ("f3+f3", "f3"),
        ("prompt[:]", "prompt"),
        ("prompt[0::1]", "prompt"),
        ("generated[0:64:1]", "generated[:64]"),
        (" prompt[ 2 : -1 ]+generated ", "prompt[2:-1]+generated"),
        ("token(5, 3,5)", "token(3,5)"),
        ("all - token(7)", "all-token(7)"),
    ],
)
def test_specs_that_say_the_same_are_the_same(spec: str, same: str) -> None:
    assert Positions.parse(spec) == Positions.parse(same) and str(Positions.parse(spec)) == same


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


# The grammar ----------------------------------------------------------------------------------------------


@given(unions, wheres, st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12)), min_size=1, max_size=4))
def test_a_spec_means_what_python_slices(spec: str, where: str, rows: list[tuple[int, int]]) -> None:
    """Tokens of a batch of requests in one call, against lists that Python slices, request by request."""
    positions = Positions.parse(spec, where)
    totals = np.array([prompt + answer for prompt, answer in rows])
    index = np.concatenate([np.arange(total) for total in totals])
    lengths = np.repeat([prompt for prompt, _ in rows], totals)
    ids = index * 7 % 4
    found = np.split(positions.mask(index, lengths, ids), np.cumsum(totals)[:-1])
    for (prompt, answer), mask in zip(rows, found):
        mine = (np.arange(prompt + answer) * 7 % 4).tolist()
        wanted = position_oracle.edited(spec, prompt, prompt + answer, mine, where)
        assert np.flatnonzero(mask).tolist() == wanted, (prompt, answer)
    assert Positions.parse(str(positions), where) == positions


@given(specs, st.integers(0, 20), st.integers(0, 5))
def test_mask_and_resolve_agree(positions: Positions, length: int, more: int) -> None:
    mask = positions.mask(np.arange(length + more), np.array(length))
    assert mask[length:].tolist() == [positions.generated] * more
    try:
        found = positions.resolve(length)
    except ValueError:
        assume(False)
    assert np.flatnonzero(mask[:length]).tolist() == found.tolist()


def test_ids_that_are_needed_are_asked_for() -> None:
    positions = Positions.parse("all-token(7)")
    assert positions.mask(np.arange(3), np.array(2), np.array([7, 1, 7])).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"'all-token\(7\)' needs the tokens' ids"):
        positions.mask(np.arange(3), np.array(2))


@given(all_specs, st.integers(0, 9), st.integers(0, 12))
def test_untied_parts_are_disjoint_unions_too(positions: Positions, prompt: int, answer: int) -> None:
    index = np.arange(prompt + answer)
    parts = positions.untied()
    masks = [part.mask(index, np.array(prompt), index % 4) for part in parts]
    assert (np.sum(masks, axis=0) == positions.mask(index, np.array(prompt), index % 4)).all()
    for number, one in enumerate(parts):
        assert not any(one.overlaps(other) for other in parts[:number])


@given(all_specs, all_specs)
@example(Positions.parse("generated[::16]"), Positions.parse("generated[8:9]"))
@example(Positions.parse("prompt[:3]"), Positions.parse("prompt[-3:]"))
@example(Positions.parse("token(1)"), Positions.parse("token(2)"))
def test_overlaps_of_any_specs(one: Positions, other: Positions) -> None:
    """Never False where a prompt gives both a common token, and for unions True only then."""
    index = np.arange(80)
    common = False
    for length in range(40):
        for ids in range(5):
            tokens = index, np.array(length), np.full(80, ids)
            common |= bool((one.mask(*tokens) & other.mask(*tokens)).any())
    assert one.overlaps(other) == other.overlaps(one)
    assert one.overlaps(other) or not common
    if one.terms is not None or other.terms is not None:
        assert one.overlaps(other) == common


def test_an_index_in_a_union_is_one_that_the_prompt_has() -> None:
    positions = Positions.parse("prompt[4]+generated")
    assert positions.resolve(5).tolist() == [4]
    with pytest.raises(ValueError, match=r"'prompt\[4\]\+generated' has an index outside a prompt of 4"):
        positions.resolve(4)


def test_which_ask_each_step_anew() -> None:
    static = ["all", "f3+l3", "prompt+generated", "prompt[2:]"]
    dynamic = ["generated[:4]", "token(1)", "all-token(1)", "generated-token(1)"]
    asking = {spec for spec in static + dynamic if Positions.parse(spec).dynamic}
    assert asking == set(dynamic)
    assert not Positions.parse("token(1)").needs_prompt
    assert Positions.parse("generated[:4]").counts_generated and not Positions.parse("all").counts_generated
