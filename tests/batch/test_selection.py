"""Which rows of h each segment takes: every forward's rows, against the rule token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import position_oracle

from reft_kernels import Positions
from reft_kernels.batch import Prompts, Selection, read_prompts, select
from reft_kernels.batch.stacks import Term, row_of, segment_of, terms_of

SPECS = {
    "untied": ("f2", "l3"),
    "tied": ("f3+l1",),
    "everywhere": ("all",),
    "generated": ("generated",),
    "prompt": ("prompt",),
    "listed": ([0, -1],),
    "late": ("generated[:2]", "prompt[-1:]+generated[3::2]"),
    "by id": ("all-token(0)-token(2)",),
    "both": ("prompt[::2]", "token(1)-prompt[::2]"),
}
GROUPS = {name: tuple(Positions.parse(spec) for spec in specs) for name, specs in SPECS.items()}

names = st.lists(st.sampled_from([*SPECS, None]), min_size=1, max_size=6)


def lists(found, segments) -> dict:
    """Rows by segment, as sets; {} for a forward without edits."""
    if found is None:
        return {}
    split = np.split(found.rows, np.cumsum(found.counts)[:-1])
    assert len(split) == len(segments) and found.counts.sum() == len(found.rows)
    result = {}
    for segment, rows in zip(segments, split):
        assert len(set(rows.tolist())) == len(rows)
        if len(rows):
            result[segment] = set(rows.tolist())
    return result


def edits(positions: Positions, token: int, prompt: int, identity: int) -> bool:
    """Whether token number `token` of a row is edited, with a prompt of `prompt` tokens, by its id."""
    ids = [0] * token + [identity] + [0] * prompt
    return token in position_oracle.edited(positions.to_json(), prompt, max(token + 1, prompt), ids)


@st.composite
def grids(draw):
    """Rows of a padded batch: names, mask [batch, width] with 2 tokens at least, prompt lengths."""
    chosen = draw(names)
    width = draw(st.integers(2, 9))
    mask = torch.zeros(len(chosen), width, dtype=torch.long)
    lengths = []
    for row in mask:
        tokens = sorted(draw(st.sets(st.integers(0, width - 1), min_size=2, max_size=width)))
        row[tokens] = 1
        lengths.append(draw(st.integers(2, len(tokens))))
    return chosen, mask, lengths


@given(grids(), st.integers(0, 9), st.integers(1, 12), st.integers(1, 3))
def test_a_window_of_a_padded_batch(grid, start: int, length: int, repeat: int) -> None:
    chosen, mask, lengths = grid
    width = mask.shape[1]
    selection = select(chosen, read_prompts(len(chosen), 0, width, mask, lengths), GROUPS.__getitem__)
    ids = np.random.default_rng(0).integers(0, 3, (len(chosen) * repeat, length))
    want: dict = {}
    for row, name in enumerate(chosen):
        columns = torch.nonzero(mask[row]).flatten().tolist()
        for group, positions in enumerate(GROUPS[name] if name else ()):
            for column in range(start, start + length):
                if column < width and column not in columns:
                    continue
                token = columns.index(column) if column < width else len(columns) + column - width
                for copy in range(row * repeat, (row + 1) * repeat):
                    identity = int(ids[copy, column - start])
                    if edits(positions, token, lengths[row], identity):
                        want.setdefault((name, group), set()).add(copy * length + column - start)
    assert lists(selection.window(start, length, repeat, ids), selection.segments) == want


@given(names, st.data())
def test_chunks_of_a_flat_batch(chosen: list[str | None], data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(1, 9)) for _ in chosen]
    starts = np.array([data.draw(st.integers(0, 12)) for _ in chosen])
    counts = np.array([data.draw(st.integers(0, 6)) for _ in chosen])
    selection = select(chosen, Prompts.unpadded(lengths), GROUPS_FOR_SHORT.__getitem__)
    ids = np.random.default_rng(0).integers(0, 3, counts.sum())
    want: dict = {}
    offset = 0
    for row, name in enumerate(chosen):
        for place, token in enumerate(range(starts[row], starts[row] + counts[row])):
            for group, positions in enumerate(GROUPS_FOR_SHORT[name] if name else ()):
                if edits(positions, token, lengths[row], int(ids[offset + place])):
                    want.setdefault((name, group), set()).add(offset + place)
        offset += counts[row]
    assert lists(selection.chunks(starts, counts, ids), selection.segments) == want


#: A prompt of one token has no two tokens to list.
GROUPS_FOR_SHORT = GROUPS | {"listed": (Positions.parse([-1]),)}


#: What a row may take: adapters of which some share a spec, alone, several together, and times a number.
TERMS = [Term(name, scale) for name in GROUPS_FOR_SHORT for scale in (1.0, 0.5)]
taken = st.lists(
    st.one_of(
        st.sampled_from([*GROUPS_FOR_SHORT, None]),
        st.lists(st.sampled_from(TERMS), max_size=3, unique_by=lambda term: term.name).map(row_of),
    ),
    max_size=8,
)


def pairs(segments, counts, *arrays) -> list[tuple]:
    """(segment, …) of arrays that are sorted by segment, in their order."""
    owners = [segment for segment, count in zip(segments, counts.tolist()) for _ in range(count)]
    assert all(len(array) == len(owners) for array in arrays)
    return list(zip(owners, *(array.tolist() for array in arrays)))


@given(taken, st.data())
def test_a_selection_lists_what_each_row_says_in_order(rows: list, data: st.DataObject) -> None:
    """Row by row and position by position; segments by name, scale and group, rows and columns ascending."""
    lengths = [data.draw(st.integers(1, 6)) for _ in rows]
    listed = {}
    for row, names in enumerate(rows):
        if isinstance(names, str) and data.draw(st.booleans()):
            columns = st.sets(st.integers(0, lengths[row] - 1)).map(sorted)
            listed[row] = tuple(np.array(data.draw(columns), dtype=np.int64) for _ in GROUPS_FOR_SHORT[names])
    terms = sorted({term for names in rows for term in terms_of(names)})
    segments, prompt, late, asked = [], [], [], []
    for term in terms:
        for group, positions in enumerate(GROUPS_FOR_SHORT[term.name]):
            segments.append(segment_of(term, group))
            # Rows that are given a list come first.
            for row in sorted(range(len(rows)), key=lambda row: row not in listed):
                length = lengths[row]
                if term not in terms_of(rows[row]):
                    continue
                if row in listed:
                    prompt += [(segments[-1], row, column) for column in listed[row][group].tolist()]
                elif positions.dynamic:
                    asked.append((id(positions), segments[-1], row))
                else:
                    prompt += [(segments[-1], row, column) for column in positions.resolve(length).tolist()]
                    late += [(segments[-1], row)] if positions.generated else []
    grid = Prompts(np.array(lengths, dtype=np.int64), np.array(lengths, dtype=np.int64), 9)
    found = select(rows, grid, GROUPS_FOR_SHORT.__getitem__, listed)
    assert list(found.segments) == segments and found.batch == len(rows)
    assert pairs(segments, found.counts, found.rows, found.columns) == prompt
    assert pairs(segments, found.generated_counts, found.generated) == late
    by_spec = [
        (id(one.positions), segments[owner], row)
        for one in found.asked
        for owner, row in zip(one.owners.tolist(), one.rows.tolist())
    ]
    assert all(np.all(np.diff(one.owners) >= 0) for one in found.asked)
    assert sorted(by_spec, key=str) == sorted(asked, key=str)


def test_rows_that_share_a_spec_are_resolved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of many adapters costs numpy calls by the spec, not by the row."""
    calls = []
    real = Positions.resolve_all
    monkeypatch.setattr(Positions, "resolve_all", lambda *args: calls.append(1) or real(*args))
    many = [f"adapter {number}" for number in range(50)]
    untied = GROUPS["untied"]
    selection = select(many, read_prompts(50, 0, 8, None), lambda name: untied)
    assert isinstance(selection, Selection) and len(selection.segments) == 100
    assert selection.counts.tolist() == [2, 3] * 50
    assert len(calls) == 2


def test_the_row_whose_prompt_lacks_an_index_is_named() -> None:
    groups = (Positions.parse([4]),)
    with pytest.raises(ValueError, match=r"row 2, adapter 'b'.*\[4\].*prompt of 3 tokens"):
        select(["a", None, "b", "a"], Prompts.unpadded([5, 1, 3, 2]), lambda name: groups)


def test_labels_and_lengths_tell_the_prompt() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 7, 8], [-100, 5, 6, -100, -100]])
    assert read_prompts(2, 0, 5, mask, None, labels).lengths.tolist() == [2, 1]
    assert read_prompts(2, 0, 5, mask).lengths.tolist() == [4, 3]
    assert read_prompts(2, 0, 5, None, None, labels).lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="row 1 has 3 tokens, but its prompt length was 4"):
        read_prompts(2, 0, 5, mask, [4, 4])


def test_generated_tokens_can_be_counted_only_from_a_known_prompt() -> None:
    by_hand = read_prompts(2, 5, 1, None)
    assert select(["late"] * 2, read_prompts(2, 5, 1, None, [3, 4]), GROUPS.__getitem__).asked
    with pytest.raises(ValueError, match=r"row 0, adapter 'late': positions 'generated\[:2\]' count"):
        select(["late"] * 2, by_hand, GROUPS.__getitem__)
    select(["by id"] * 2, by_hand, GROUPS.__getitem__)
