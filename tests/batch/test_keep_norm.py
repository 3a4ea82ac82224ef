"""Adapters that keep the norm of what they edit: values, batches of several kinds, sums, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.cases import same_bits
from torch import Tensor

import reft_kernels as rk
from reft_kernels.adapter.methods import METHODS
from reft_kernels.batch import AdapterStore, Place, Planner, Prompts, SiteKey, edit

WIDTH = 16
KEY = SiteKey("block_output", 0)
KEPT = {"keep_norm": True}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vector(seed: int, **options) -> rk.Adapter:
    return rk.Adapter.from_tensors("vector", {0: draw(WIDTH, seed=seed)}, options=options)


def red(seed: int, **options) -> rk.Adapter:
    scaling, bias = draw(2, WIDTH, seed=seed)
    return rk.Adapter.from_tensors("red", {0: {"scaling": scaling, "bias": bias}}, options=options)


def make_store(dtype: torch.dtype = torch.float32) -> AdapterStore:
    store = AdapterStore()
    for name, adapter in {
        "kept": vector(1, **KEPT),
        "plain": vector(2),
        "red": red(3, **KEPT),
        "also": vector(4, coefficient=2.0, **KEPT),
    }.items():
        store.add(name, adapter, Place(torch.device("cpu"), dtype))
    return store


def stepped(store: AdapterStore, names, h: Tensor, scale=None) -> Tensor:
    """h [rows, d] after one token of each request."""
    planner = Planner(store)
    rows = planner.check_names(names, len(names), scale)
    selection = planner.select(rows, Prompts.unpadded([1] * len(names)))
    plan = planner.step(selection, np.zeros(len(names)), np.ones(len(names), dtype=np.int64))
    return h.clone() if plan is None else edit(h.clone(), KEY, plan)


def rescaled(edited: Tensor, h: Tensor) -> Tensor:
    return edited * (h.norm(dim=-1, keepdim=True) / edited.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_what_it_is_alone_and_keeps_its_norm(dtype) -> None:
    names = ["kept", "plain", "__base__", "red", "also", "kept"]
    store, h = make_store(dtype), draw(len(names), WIDTH, seed=9, dtype=dtype)
    found = stepped(store, names, h)
    x, step = h.double(), torch.finfo(dtype).eps
    for row, name in enumerate(names):
        assert same_bits(found[row], stepped(store, [name], h[row : row + 1])[0]), name
        if name == "__base__":
            assert same_bits(found[row], h[row])
            continue
        one = store.adapters[name].interventions[0]
        if name == "red":
            want = one.scaling[0].double() * x[row] + one.bias[0].double()
        else:
            want = x[row] + one.coefficient.double() * one.v[0].double()
        want = want if name == "plain" else rescaled(want, x[row])
        torch.testing.assert_close(found[row].double(), want, rtol=4 * step, atol=4 * step)


def test_the_sum_of_several_has_the_norm_that_was_read_if_one_keeps_it() -> None:
    store, h = make_store(), draw(3, WIDTH, seed=8)
    names, scale = [["kept", "plain"], ["plain", "also"], ["kept", "also"]], [[1, 1], [-2.0, 0.5], [1, 1]]
    found, x = stepped(store, names, h, scale).double(), h.double()
    for row, (mine, numbers) in enumerate(zip(names, scale)):
        parts = [store.adapters[name].interventions[0] for name in mine]
        edits = sum(n * p.coefficient.double() * p.v[0].double() for n, p in zip(numbers, parts))
        torch.testing.assert_close(found[row], rescaled(x[row] + edits, x[row]), rtol=1e-5, atol=1e-5)
    without = stepped(store, [["plain", "kept"]], h[:1], [[1.0, 0.0]])
    assert same_bits(without, stepped(store, ["plain"], h[:1]))  # times 0 it keeps nothing, either


@pytest.mark.parametrize("name", ["kept", "red"])
def test_times_a_number(name: str) -> None:
    store, h = make_store(), draw(2, WIDTH, seed=7)
    found = stepped(store, [name] * 2, h, [0.0, 0.25])
    assert same_bits(found[0], h[0])
    edited = draw(0)
    one, x = store.adapters[name].interventions[0], h[1].double()
    if name == "red":
        edited = x + 0.25 * ((one.scaling[0].double() - 1) * x + one.bias[0].double())
    else:
        edited = x + 0.25 * one.v[0].double()
    torch.testing.assert_close(found[1].double(), rescaled(edited, x), rtol=1e-5, atol=1e-5)


def test_an_edit_of_nothing_leaves_the_bits() -> None:
    store, h = AdapterStore(), draw(1, WIDTH)
    nothing = rk.Adapter.from_tensors("vector", {0: torch.zeros(WIDTH)}, options=KEPT)
    store.add("nothing", nothing, Place(torch.device("cpu"), h.dtype))
    assert same_bits(stepped(store, ["nothing"], h), h)


@pytest.mark.parametrize("method", ["vector", "loreft", "red", "ablation"])
def test_gradients_in_float64(method: str) -> None:
    """Of the parameters and of h, against the formula by torch's own operations."""
    options = {**KEPT, **({"coefficient": 0.5} if method == "vector" else {})}
    config = rk.ReftConfig(method=method, r=2, layers=[0], positions="all", options=options)
    generator = torch.Generator().manual_seed(2)
    adapter = rk.Adapter.from_config(config, 1, WIDTH, dtype=torch.float64, generator=generator)
    one = adapter.interventions[0]
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += 0.3 * draw(*parameter.shape, seed=5, dtype=torch.float64)
    store = AdapterStore()
    store.add("mine", adapter, Place(torch.device("cpu"), torch.float64))
    leaf = draw(4, WIDTH, seed=3, dtype=torch.float64).requires_grad_()
    leaves = [leaf, *one.parameters()]
    with rk.backend("reference"):
        got = _edited_with_autograd(store, ["mine", "__base__", "mine", "mine"], leaf)
    fold = one.fold()
    if method == "red":
        want = (1 + fold.scale_less_one) * leaf + fold.shift
    elif method == "vector":
        want = leaf + fold.bias @ fold.up
    else:
        want = leaf + (leaf @ fold.down.T + fold.bias) @ fold.up
    want = torch.cat([rescaled(want, leaf)[:1], leaf[1:2], rescaled(want, leaf)[2:]])
    torch.testing.assert_close(got, want)
    grad = draw(4, WIDTH, seed=4, dtype=torch.float64)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)):
        torch.testing.assert_close(mine, theirs)


def _edited_with_autograd(store: AdapterStore, names, h: Tensor) -> Tensor:
    planner = Planner(store)
    rows = planner.check_names(names, len(names))
    selection = planner.select(rows, Prompts.unpadded([1] * len(names)))
    plan = planner.step(selection, np.zeros(len(names)), np.ones(len(names), dtype=np.int64))
    assert plan is not None
    return edit(h * 1, KEY, plan)


def test_every_method_takes_the_option_and_a_folder_keeps_it(tmp_path) -> None:
    for name, method in METHODS.items():
        assert "keep_norm" not in method.resolve(None)
        assert method.resolve(KEPT)["keep_norm"] is True, name
    for index, adapter in enumerate((vector(1, **KEPT), red(2, **KEPT), vector(3))):
        adapter.save_pretrained(tmp_path / str(index))
        again = rk.Adapter.from_pretrained(tmp_path / str(index)).interventions[0]
        assert again.keeps_norm == adapter.interventions[0].keeps_norm == (index < 2)
        assert ("keep_norm" in again.options) == again.keeps_norm
        text = (tmp_path / str(index) / "reft_config.json").read_text()
        assert ("keep_norm" in text) == again.keeps_norm
    part = vector(1, **KEPT).select_subspace([0])
    assert part.interventions[0].keeps_norm
    with pytest.raises(ValueError, match="options: keep_norm must be True or False, was 1"):
        vector(1, keep_norm=1)


def test_a_composition_keeps_the_norm_if_a_part_does() -> None:
    store, h = make_store(), draw(1, WIDTH, seed=6)
    parts = [store.adapters[name] for name in ("kept", "plain")]
    both = rk.Adapter.compose(parts, [0.5, 2.0])
    store.add("both", both, Place(torch.device("cpu"), h.dtype))
    torch.testing.assert_close(
        stepped(store, ["both"], h), stepped(store, [["kept", "plain"]], h, [[0.5, 2.0]])
    )
    assert not rk.Adapter.compose(parts, [0.0, 1.0]).interventions[0].keeps_norm
