"""The workspaces of compiled decode steps: which are kept."""

from __future__ import annotations

import numpy as np
import torch
from support.adapters import random_adapter

import reft_kernels as rk
from reft_kernels.batch import AdapterStore, DecodeWorkspaces, Place, Planner, Prompts, workspace

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
