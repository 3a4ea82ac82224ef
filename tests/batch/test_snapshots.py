"""Folds of adapters that train are made anew where their parameters are others, and only there."""

from __future__ import annotations

import pytest
import torch
from support.adapters import random_adapter

import reft_kernels as rk
from reft_kernels.batch import AdapterStore, Place, SiteKey
from reft_kernels.batch.stacks import Part, Stack

CPU = torch.device("cpu")
WIDTH = 8


@pytest.fixture
def store() -> AdapterStore:
    """With "one" and "two", which train."""
    store = AdapterStore()
    for seed, name in enumerate(("one", "two")):
        config = rk.ReftConfig(method="nodireft", r=2, layers=[0, 1], positions="all")
        store.add(name, random_adapter(config, WIDTH, seed=seed), Place(CPU, torch.float32))
        store.adapters[name].trainable = True
    return store


@pytest.fixture
def folded(monkeypatch) -> list[object]:
    """The adapters that were folded."""
    found: list[object] = []
    folds = rk.Adapter.folds
    monkeypatch.setattr(
        rk.Adapter, "folds", lambda self, drawn=None: found.append(self) or folds(self, drawn)
    )
    return found


def renew(store: AdapterStore) -> None:
    if store.stale(store.adapters):
        store.refresh(store.adapters, {})


def laid(store: AdapterStore, name: str) -> list[torch.Tensor]:
    return [
        rows[span.first : span.first + span.rank]
        for pool, span in store._laid[name]
        for rows in (pool.down, pool.up, pool.bias)
    ]


def is_as_folded(store: AdapterStore, name: str) -> bool:
    folds = [part.detach() for one in store.adapters[name].interventions for part in one.fold()[:3]]
    return all(torch.equal(mine, fold.to(mine.dtype)) for mine, fold in zip(laid(store, name), folds))


def by_optimizer(parameter: torch.nn.Parameter) -> None:
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


CHANGES = {
    "through data": lambda parameter: parameter.data.mul_(2),
    "by a fused optimizer": by_optimizer,
    "to another tensor": lambda parameter: setattr(parameter, "data", parameter.data * 2),
    "to NaN": lambda parameter: parameter.data.fill_(float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_however_it_came(store, folded, change):
    renew(store)
    assert len(folded) == 2
    renew(store)
    assert len(folded) == 2 and is_as_folded(store, "one") and is_as_folded(store, "two")
    CHANGES[change](next(store.adapters["two"].parameters()))
    renew(store)
    assert folded[2:] == [store.adapters["two"]]
    assert change == "to NaN" or is_as_folded(store, "two")
    assert any(tensor.isnan().any() for tensor in laid(store, "two")) == (change == "to NaN")
    renew(store)
    assert len(folded) == 3  # NaN too is what it was


def test_the_sign_of_zero_counts(store, folded):
    (parameter, *_) = store.adapters["one"].parameters()
    parameter.data.zero_()
    renew(store)
    parameter.data.neg_()
    renew(store)
    assert folded.count(store.adapters["one"]) == 2


def test_what_was_laid_in_between_is_no_longer_known(store):
    """Parameters that go and come back, while what lies in the pools does not come back with them."""
    (parameter, *_) = store.adapters["one"].parameters()
    before = parameter.detach().clone()
    stack = Stack((Part("one", 0, 0.5), Part("two", 0)))
    renew(store)
    with torch.no_grad():
        parameter.add_(1)
        store.ranges((stack,))  # laid with these
        parameter.copy_(before)
    renew(store)
    for number, (pool, span) in store._stacks[stack].items():
        (key,) = (key for key, other in store.numbers.items() if other == number)
        for rows, fold in zip(pool.rows, store._stack_fold(stack, key)):
            assert torch.equal(rows[span.first : span.first + span.rank], fold)
    with torch.no_grad():
        parameter.add_(1)
        store.move(SiteKey("block_output", 0), Place(CPU, torch.bfloat16))
        parameter.copy_(before)
    renew(store)
    assert is_as_folded(store, "one")


def test_folds_of_random_numbers_are_of_one_forward_alone(store, folded):
    renew(store)
    (one, *_) = store.adapters["one"].interventions
    drawn = {name: torch.zeros_like(value) for name, value in one.named_parameters()}
    store.refresh(store.adapters, {one: drawn})
    store.refresh(store.adapters, {one: drawn})
    assert folded[2:] == [store.adapters["one"]] * 2 and not is_as_folded(store, "one")
    renew(store)
    assert len(folded) == 5 and is_as_folded(store, "one")


def test_frozen_adapters_are_left_alone(store, folded):
    for adapter in store.adapters.values():
        adapter.trainable = False
    renew(store)
    assert not folded
