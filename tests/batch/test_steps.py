"""StepTables: the steps of an engine, beside the plans that `Planner.step` makes of the same requests."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from support.adapters import random_adapter

import reft_kernels as rk
from reft_kernels.batch import AdapterStore, Place, Planner, Prompts, SiteKey, StepTables, edit, intervals_of
from reft_kernels.batch.steps import most_together
from reft_kernels.ops import INTERVENE_, current_backend
from reft_kernels.positions import Positions

SPECS = ["f3+l2", "f1", "l2", "all", "prompt", "generated", [0, -1]]
LAYERS, WIDTH = 3, 8
PLACE = Place(torch.device("cpu"), torch.float32)
SITES = [SiteKey("block_output", layer) for layer in range(LAYERS)]


def adapters() -> dict[str, rk.Adapter]:
    made = {}
    for number, spec in enumerate(SPECS):
        layers = [[0, 2], [1], "all"][number % 3]
        config = rk.ReftConfig(r=1 + number % 3, layers=layers, positions=spec, share_weights=number % 2 == 1)
        made[str(spec)] = random_adapter(config, WIDTH, LAYERS, 0.5, number)
    # Two groups that meet at a token, at different layers.
    parts = [random_adapter(rk.ReftConfig(r=2, layers=[0], positions="all"), WIDTH, LAYERS, 0.5, 8)]
    parts.append(random_adapter(rk.ReftConfig(r=1, layers=[1], positions="f2"), WIDTH, LAYERS, 0.5, 9))
    made["meeting"] = rk.Adapter.compose(parts)
    return made


ADAPTERS = adapters()


def tables(max_tokens: int = 64, max_requests: int = 9) -> tuple[AdapterStore, StepTables]:
    store = AdapterStore(capacity=64)
    for name, adapter in ADAPTERS.items():
        store.add(name, adapter, PLACE)
    steps = StepTables(store, SITES, max_tokens, max_requests, max_segments=32)
    for name in ADAPTERS:
        steps.lay(name)
    return store, steps


STORE, STEPS = tables()


@st.composite
def batches(draw: st.DrawFn) -> tuple:
    n = draw(st.integers(1, 6))
    several = st.lists(st.integers(2, 9), min_size=n, max_size=n)
    names = draw(st.lists(st.sampled_from([None, *ADAPTERS]), min_size=n, max_size=n))
    counts = draw(st.lists(st.integers(0, 7), min_size=n, max_size=n))
    starts = draw(st.lists(st.integers(0, 14), min_size=n, max_size=n))
    rows = draw(st.permutations(range(9)))[:n]
    return names, draw(several), starts, counts, rows


@hypothesis.given(batches())
def test_a_step_edits_what_the_planner_edits(batch: tuple) -> None:
    """To the bit, at every layer, whichever rows of the tables the requests have."""
    names, prompts, starts, counts, rows = batch
    planner = Planner(STORE)
    plan = planner.step(planner.select(names, Prompts.unpadded(prompts)), starts, counts)
    for row, name, length in zip(rows, names, prompts):
        STEPS.clear(row) if name is None else STEPS.put(row, name, length)
    STEPS.fill(*(np.array(part, dtype=np.int64) for part in (rows, starts, counts)))
    h = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(0))
    for key in SITES:
        mine, theirs = h.clone(), h.clone()
        pool = STORE.pool_of(key)
        INTERVENE_[current_backend("cpu")](
            mine,
            pool.down,
            pool.up,
            pool.bias,
            pool.kind,
            *STEPS.tables(len(h)),
            STEPS.spans[STEPS.sites[key]],
        )
        if plan is not None and key in plan.sites:
            edit(theirs, key, plan)
        assert torch.equal(mine, theirs)


def test_addresses_stay_and_tables_for_a_graph_have_one_size() -> None:
    _, steps = tables()
    before = [t.data_ptr() for t in (steps.rows, steps.tiles, steps.spans)]
    for counts in ([5, 2], [1, 1], [0, 3]):
        steps.put(0, "all", 4)
        steps.put(1, "f3+l2", 4)
        steps.fill(np.array([0, 1]), np.zeros(2, dtype=np.int64), np.array(counts))
        rows, tiles = steps.tables(8, captured=True)
        assert (len(rows), len(tiles)) == (16, 16)
    assert [t.data_ptr() for t in (steps.rows, steps.tiles, steps.spans)] == before
    steps.idle()
    assert steps.used == (0, 0)


def test_segments_are_given_back_and_moved_adapters_found_again() -> None:
    store, steps = tables()
    free = len(steps._free)
    steps.lift("all")
    assert len(steps._free) == free + 1
    adapter = store.remove("all")
    store.add("all", adapter, PLACE)
    steps.lay("all")
    name = "f1"
    store.remove("f3+l2")
    moved = store.remove(name)
    store.add(name, moved, PLACE)  # elsewhere now
    steps._segments.pop("f3+l2")
    steps.renew()
    segment = steps._segments[name][0]
    ranges = store.ranges(((name, 0),))
    for (key, *_), number in store.numbers.items():
        assert steps.spans[steps.sites[key], segment].tolist() == ranges[number, 0].tolist()
    with pytest.raises(RuntimeError, match="max_segments"):
        for _ in range(40):
            steps.lay("all")


def test_intervals() -> None:
    parse = Positions.parse
    assert intervals_of([parse("f3+l3")], 4).tolist() == [[0, 0, 4]]  # f and l meet
    assert intervals_of([parse("all"), parse("prompt")], 3).tolist() == [[0, 0, 2**31 - 1], [1, 0, 3]]
    assert intervals_of([parse([-1, 0, 2])], 5).tolist() == [[0, 0, 1], [0, 2, 3], [0, 4, 5]]
    assert intervals_of([parse("f2")], 1).tolist() == []
    with pytest.raises(ValueError, match="outside a prompt of 2"):
        intervals_of([parse([4])], 2)
    with pytest.raises(ValueError, match="empty"):
        intervals_of([parse("f2")], 0)


def test_how_many_groups_may_meet() -> None:
    parse = Positions.parse
    assert most_together([parse("f2"), parse("l2")]) == 1
    assert most_together([parse("f2"), parse("l2"), parse("all")]) == 3  # a bound
    assert most_together([]) == 0


MOVES = st.sampled_from(["on", "on", "on", "skip", "put", "leave"])


@hypothesis.given(batches(), st.lists(MOVES, max_size=14))
def test_decode_steps_that_go_on_are_those_that_are_made_anew(batch: tuple, moves: list[str]) -> None:
    """Requests that decode, skip a token, take another adapter or leave, against tables without a memory."""
    names, prompts, starts, _, rows = batch
    (_, going_on), (_, anew) = tables(), tables()
    rows, starts = np.array(rows, dtype=np.int64), np.array(starts, dtype=np.int64)
    for row, name, length in zip(rows, names, prompts):
        for one in (going_on, anew):
            one.clear(row) if name is None else one.put(row, name, length)
    for move in moves:
        if move == "skip":
            starts = starts + 1
        elif move == "put":
            for one in (going_on, anew):
                one.put(rows[0], "all", 2)
        elif move == "leave" and len(rows) > 1:
            rows, starts = rows[1:], starts[1:]
        going_on.fill(rows, starts, np.ones_like(starts))
        anew._fill(rows, starts, np.ones_like(starts))
        for mine, theirs in zip(going_on.tables(9), anew.tables(9)):
            assert torch.equal(mine, theirs)
        starts = starts + 1


def test_tables_are_written_only_where_an_edit_begins_or_ends() -> None:
    _, steps = tables()
    steps.put(0, "all", 4)
    steps.put(1, "f3+l2", 4)  # two tokens by the one group, two by the other, and nothing behind
    steps.clear(2)
    written = []
    write, steps._write = steps._write, lambda *it: (written.append(len(it[0])), write(*it))
    for position in range(12):
        steps.fill(np.arange(3), np.full(3, position), np.ones(3, dtype=np.int64))
    assert written == [2, 2, 1]
    steps.idle()
    steps.idle()
    assert written[3:] == [0]
    steps.fill(np.arange(3), np.full(3, 12), np.ones(3, dtype=np.int64))
    assert written[-1] == 1 and steps.used == (1, 1)
