"""Adapters of a row that follow one another: against applying them one after another."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from support.adapters import random_adapter
from support.cases import same_bits
from torch import Tensor

import reft_kernels as rk
from reft_kernels.batch import AdapterStore, DecodeWorkspaces, Place, Planner, Prompts, SiteKey, edit
from reft_kernels.batch.stages import StageKey

WIDTH, LAYERS = 16, 2
SITES = [SiteKey("block_output", layer) for layer in range(LAYERS)]
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def low(seed: int, positions: str = "all", layers="all", **options) -> rk.Adapter:
    config = rk.ReftConfig(r=3, layers=layers, positions=positions, act_fn="tanh", **options)
    return random_adapter(config, WIDTH, LAYERS, seed=seed)


def red(seed: int, positions: str = "all") -> rk.Adapter:
    tensors = {layer: dict(zip(("scaling", "bias"), draw(2, WIDTH, seed=seed))) for layer in range(LAYERS)}
    return rk.Adapter.from_tensors("red", tensors, positions=positions)


def kept(seed: int) -> rk.Adapter:
    v = {layer: draw(WIDTH, seed=seed) for layer in range(LAYERS)}
    return rk.Adapter.from_tensors("vector", v, options={"keep_norm": True})


def make_store(dtype: torch.dtype = torch.float32, **options) -> AdapterStore:
    store = AdapterStore(**options)
    made = {"a": low(1), "b": low(2), "red": red(3), "kept": kept(4), "last": low(5, layers=[1])}
    for name, adapter in made.items():
        store.add(name, adapter, Place(CPU, dtype))
    return store


def planned(store: AdapterStore, names, scale=None):
    planner = Planner(store)
    rows = planner.check_names(names, len(names), scale)
    selection = planner.select(rows, Prompts.unpadded([1] * len(names)))
    return planner.step(selection, np.zeros(len(names)), np.ones(len(names), dtype=np.int64))


def stepped(store: AdapterStore, names, h: Tensor, key: SiteKey = SITES[0], scale=None) -> Tensor:
    """h [rows, d] after one token of each request."""
    plan = planned(store, names, scale)
    return h.clone() if plan is None else edit(h.clone(), key, plan)


def one_by_one(store: AdapterStore, names, h: Tensor, key: SiteKey = SITES[0], scale=None) -> Tensor:
    """h [1, d] after each of the adapters, as a call of its own."""
    for number, name in enumerate(names):
        h = stepped(store, [name], h, key, None if scale is None else [scale[number]])
    return h


SEQUENCES = [("a", "b"), ("b", "a"), ("a", "red"), ("red", "b", "kept"), ("kept", "a", "red"), ("last", "b")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_edits_what_the_one_before_has_written(dtype) -> None:
    """To the bit what calls one behind the other give, whatever is beside them in the batch."""
    store = make_store(dtype)
    names = [rk.Sequence(*mine) for mine in SEQUENCES] + ["a", "__base__", ["a", "b"], "kept"]
    h = draw(len(names), WIDTH, seed=9, dtype=dtype)
    for key in SITES:
        found = stepped(store, names, h, key)
        for row, mine in enumerate(SEQUENCES):
            assert same_bits(found[row], one_by_one(store, mine, h[row : row + 1], key)[0]), mine
        for row in range(len(SEQUENCES), len(names)):
            assert same_bits(found[row], stepped(store, [names[row]], h[row : row + 1], key)[0])
    assert not torch.equal(*stepped(store, names[:2], h[:1].expand(2, -1)))


def test_in_float64_it_is_the_formula() -> None:
    store, h = make_store(torch.float64), draw(1, WIDTH, dtype=torch.float64)
    with rk.backend("reference"):
        found = stepped(store, [rk.Sequence("a", "red", "b")], h)
    for name in ("a", "red", "b"):
        one = store.adapters[name].interventions[0]
        if name == "red":
            h = one.scaling.double() * h + one.bias.double()
        else:
            R, W, b = (getattr(one, part).double() for part in "RWb")
            h = h + (torch.tanh(h @ W.T + b) - h @ R.T) @ R
    torch.testing.assert_close(found, h, rtol=1e-6, atol=1e-6)  # folds lie in float64, R and W are float32


def test_each_times_its_number() -> None:
    store, h = make_store(), draw(1, WIDTH, seed=3)
    scale = [0.5, -2.0, 0.25]
    found = stepped(store, [rk.Sequence("a", "kept", "red")], h, scale=[scale])
    assert same_bits(found, one_by_one(store, ("a", "kept", "red"), h, scale=scale))
    without = stepped(store, [rk.Sequence("a", "b", "red")], h, scale=[[1.0, 0.0, 1.0]])
    assert same_bits(without, one_by_one(store, ("a", "red"), h))
    alone = stepped(store, [rk.Sequence("b")], h)
    assert same_bits(alone, stepped(store, ["b"], h))


@pytest.mark.parametrize("names", [("linear", "a"), ("plain", "linear", "a"), ("red", "scales")])
def test_one_edit_of_several_in_turn(names) -> None:
    """compose(in_turn=True): in float64 what the sequence gives."""
    store, h = make_store(torch.float64), draw(2, WIDTH, seed=3, dtype=torch.float64)
    v = {layer: draw(WIDTH, seed=8) for layer in range(LAYERS)}
    linear = random_adapter(rk.ReftConfig(r=2, positions="all"), WIDTH, LAYERS, seed=7)
    more = {"linear": linear, "plain": rk.Adapter.from_tensors("vector", v), "scales": red(6)}
    for name, adapter in more.items():
        store.add(name, adapter, Place(CPU, h.dtype))
    weights = [0.5, -2.0, 3.0][: len(names)]
    whole = rk.Adapter.compose([store.adapters[name] for name in names], weights, in_turn=True)
    store.add("whole", whole, Place(CPU, h.dtype))
    with rk.backend("reference"):
        for key in SITES:
            want = stepped(store, [rk.Sequence(*names)] * 2, h, key, [weights] * 2)
            torch.testing.assert_close(stepped(store, ["whole"] * 2, h, key), want, rtol=1e-5, atol=1e-5)


def test_what_is_not_one_edit_in_turn_is_refused() -> None:
    for message, parts in (
        ("only the last may have an activation", [low(1), low(2)]),
        ("keeps the norm", [kept(1), low(2)]),
        ("one of them edits element by element", [red(1), low(2)]),
        ("some tokens are edited by one", [red(1), red(2, "f1")]),
    ):
        with pytest.raises(ValueError, match=f"adapters: .*{message}"):
            rk.Adapter.compose(parts, in_turn=True)


def test_positions_are_each_ones_own() -> None:
    store = make_store()
    store.add("first", low(6, "f1"), Place(CPU, torch.float32))
    planner, h = Planner(store), draw(3, WIDTH, seed=5)
    names = planner.check_names([rk.Sequence("first", "a")], 1)
    selection = planner.select(names, Prompts.unpadded([3]))
    plan = planner.step(selection, np.array([0]), np.array([3]))
    assert plan is not None
    found = edit(h.clone(), SITES[0], plan)
    first = stepped(store, ["first"], h[:1])  # of a prompt of one token f1 is nothing, so by its fold
    fold = store.adapters["first"].interventions[0].fold()
    first = h[:1] + torch.where(fold.kind == 6, torch.tanh(h[:1] @ fold.down.T + fold.bias), 0) @ fold.up
    first += torch.where(fold.kind == 0, h[:1] @ fold.down.T + fold.bias, 0) @ fold.up
    want = torch.cat([stepped(store, ["a"], first), stepped(store, ["a", "a"], h[1:])])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_one_after_another() -> None:
    parts = {}
    for seed, name in enumerate(("x", "y")):
        config = rk.ReftConfig(method="direft", r=2, layers=[0], positions="all", act_fn="tanh")
        generator = torch.Generator().manual_seed(seed)
        parts[name] = rk.Adapter.from_config(config, LAYERS, WIDTH, torch.float64, generator)
    store = AdapterStore()
    for name, adapter in parts.items():
        store.add(name, adapter, Place(CPU, torch.float64))
    leaf = draw(3, WIDTH, dtype=torch.float64).requires_grad_()
    leaves = [leaf, *(p for adapter in parts.values() for p in adapter.parameters())]
    names = [rk.Sequence("x", "y"), "y", rk.Sequence("y", "x")]

    def by_hand(h: Tensor, order) -> Tensor:
        for name in order:
            fold = parts[name].interventions[0].fold()
            h = h + torch.tanh(h @ fold.down.T + fold.bias) @ fold.up
        return h

    with rk.backend("reference"):
        plan = planned(store, names)
        assert plan is not None
        got = edit(leaf * 1, SITES[0], plan, training=True)
        want = torch.stack([by_hand(leaf[row], order) for row, order in enumerate(("xy", "y", "yx"))])
        torch.testing.assert_close(got, want)
        grad = draw(3, WIDTH, seed=1, dtype=torch.float64)
        mine, theirs = (torch.autograd.grad(it, leaves, grad) for it in (got, want))
    for one, other in zip(mine, theirs):
        torch.testing.assert_close(one, other)


def test_dropout_falls_behind_each_turn() -> None:
    """With a rate near 1 for the one that edits first, the next begins at zeros."""
    configs = {"x": 0.999999, "y": 0.0}
    store = AdapterStore()
    for name, rate in configs.items():
        config = rk.ReftConfig(method="lobireft", r=2, layers=[0], positions="all", dropout=rate)
        store.add(name, rk.Adapter.from_config(config, LAYERS, WIDTH), Place(CPU, torch.float32))
    h = draw(2, WIDTH)
    plan = planned(store, [rk.Sequence("x", "y"), "y"])
    assert plan is not None
    found = edit(h.clone() * 1, SITES[0], plan, training=True)
    fold = store.adapters["y"].interventions[0].fold()
    torch.testing.assert_close(found[0], (fold.bias @ fold.up), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], h[1] + fold.bias @ fold.up)


def test_stages_of_turns_come_with_the_first_sequence_and_adapters_may_go() -> None:
    store, h = make_store(capacity=64), draw(2, WIDTH)
    before, used = len(store.numbers), [pool.used for pool in store.pools.values()]
    assert all(key.turn == 0 for key in store.numbers)
    found = stepped(store, [rk.Sequence("a", "b"), "a"], h)
    assert len(store.numbers) == before + LAYERS and StageKey(SITES[0], "low_rank", 1) in store.numbers
    assert [pool.used for pool in store.pools.values()] == used  # the ranges that are there
    workspace = DecodeWorkspaces(store).of(planned(store, [rk.Sequence("a", "kept"), "b"]))
    assert workspace is not None
    forms = [form for _, _, form in workspace.places[SITES[0]]]
    first = ["keep_norm", "low_rank", "elementwise", "keep_norm"]
    assert forms == [*first, "keep_norm", "low_rank", "keep_norm"]
    store.remove("b")
    with pytest.raises(ValueError, match="no adapter 'b'"):
        stepped(store, [rk.Sequence("a", "b")], h[:1])
    store.add("b", low(2), Place(CPU, torch.float32))
    assert same_bits(stepped(store, [rk.Sequence("a", "b"), "a"], h), found)


def test_bad_sequences_are_refused_by_name() -> None:
    store = make_store()
    for message, names in (
        ("names: must be names", lambda: rk.Sequence("a", 3)),
        ("adapter_names: row 0 has an adapter twice", lambda: rk.Sequence("a", "a")),
        ("adapter_names: row 0 names the bare model", lambda: rk.Sequence("a", "__base__")),
        ("adapter_names: there is no adapter 'c'", lambda: rk.Sequence("a", "c")),
        ("scale: row 0 has 1 numbers for 2", lambda: rk.Sequence("a", "b")),
    ):
        with pytest.raises(ValueError, match=message):
            stepped(store, [names()], draw(1, WIDTH), scale=[[1.0]] if "scale" in message else None)
    one = rk.Sequence("a", "b")
    assert copy.deepcopy(one) == one == pickle.loads(pickle.dumps(one)) and repr(one) == "Sequence('a', 'b')"
    assert isinstance(pickle.loads(pickle.dumps(one)), rk.Sequence)
    (row,) = Planner(store).check_names([one], 1, [[1.0, 0.5]])
    assert repr(row) == "'a' then 'b' times 0.5"
