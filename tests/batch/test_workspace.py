"""The workspaces of compiled decode steps: which are kept."""

from __future__ import annotations

import numpy as np
import torch
from support.adapters import random_adapter

import reft_kernels as rk
from reft_kernels.batch import AdapterStore, DecodeWorkspaces, Place, Planner, Prompts, SiteKey, workspace

WIDTH = 16


def _planned(planner: Planner, batch: int):
    selection = planner.select(["a"] * batch, Prompts.unpadded([3] * batch))
    return planner.step(selection, np.full(batch, 3), np.ones(batch, dtype=np.int64))


def _store() -> AdapterStore:
    store = AdapterStore()
    place = Place(torch.device("cpu"), torch.float32)
    store.add("a", random_adapter(rk.ReftConfig(r=2, layers=[0, 1], positions="all"), WIDTH), place)
    return store


def test_a_bounded_number_is_kept_and_the_last_used_stay(monkeypatch):
    monkeypatch.setattr(workspace, "_KEPT", 3)
    store = _store()
    planner, kept = Planner(store), DecodeWorkspaces(store)
    first = {batch: kept.of(_planned(planner, batch)) for batch in (1, 2, 3)}
    assert kept.of(_planned(planner, 1)) is first[1]  # so that 2 is the oldest
    kept.of(_planned(planner, 4))
    assert kept.of(_planned(planner, 1)) is first[1] and kept.of(_planned(planner, 3)) is first[3]
    assert kept.of(_planned(planner, 2)) is not first[2]


def test_a_workspace_says_which_rows_take_which_range():
    store = _store()
    planner = Planner(store)
    found = DecodeWorkspaces(store).of(_planned(planner, 2))
    assert found is not None and found.rows.tolist() == [0, 1]
    assert (found.spans[:, 0] == found.spans[:, 1]).all() and (found.spans[:, :, 1] > 0).all()


def test_ranges_of_adapters_that_came_before_others_sites():
    store = AdapterStore()
    place = Place(torch.device("cpu"), torch.float32)
    made = {"early": ([1], "f2+l2"), "late": ([0, 1, 2], "all"), "later": ([2], "l1")}
    for seed, (name, (layers, positions)) in enumerate(made.items()):
        config = rk.ReftConfig(r=seed + 2, layers=layers, positions=positions, share_weights=False)
        store.add(name, random_adapter(config, 8, seed=seed), place)
    order = (("late", 0), ("early", 1), ("early", 0), ("early", 1), ("later", 0), ("early", 0))
    got = store.ranges(order)
    assert got.dtype == np.int32 and got.flags.c_contiguous
    for key, number in store.numbers.items():
        for index, (name, group) in enumerate(order):
            spans = [
                tuple(span)
                for one, (_, span) in zip(store.adapters[name].interventions, store._laid[name])
                if (SiteKey.of(one), one.group) == (key.site, group)
            ]
            assert got[number, index].tolist() == list(spans[0] if spans else (0, 0))
    assert store.ranges(()).shape == (3, 0, 2)
