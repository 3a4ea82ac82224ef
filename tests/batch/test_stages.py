"""Sites with several stages: which there are, in which order, and that each row takes its own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.adapters import random_adapter
from support.cases import same_bits

import reft_kernels as rk
from reft_kernels.batch import AdapterStore, DecodeWorkspaces, Place, Planner, Prompts, SiteKey, edit
from reft_kernels.batch.stages import FORMS, StageKey

WIDTH, LAYERS = 16, 2
CPU = torch.device("cpu")
SITES = [SiteKey("block_output", layer) for layer in range(LAYERS)]
NAMES = ["low", "red", None, "scales", "low"]


def red(seed: int = 0, layers=range(LAYERS), positions: str = "all") -> rk.Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        layer: dict(zip(("scaling", "bias"), torch.randn(2, WIDTH, generator=generator))) for layer in layers
    }
    return rk.Adapter.from_tensors("red", tensors, positions=positions)


def low(seed: int = 7, layers: str | list[int] = "all", positions: str = "all") -> rk.Adapter:
    config = rk.ReftConfig(r=3, layers=layers, positions=positions)
    return random_adapter(config, WIDTH, LAYERS, seed=seed)


def make_store(dtype: torch.dtype = torch.float32, **options) -> AdapterStore:
    store = AdapterStore(**options)
    for name, adapter in {"low": low(), "red": red(), "scales": red(3, [1])}.items():
        store.add(name, adapter, Place(CPU, dtype))
    return store


def stepped(store: AdapterStore, names, h: torch.Tensor, key: SiteKey) -> torch.Tensor:
    """h [rows, d] after one token of each request."""
    planner = Planner(store)
    selection = planner.select(names, Prompts.unpadded([1] * len(names)))
    plan = planner.step(selection, np.zeros(len(names)), np.ones(len(names), dtype=np.int64))
    assert plan is not None
    return edit(h.clone(), key, plan)


def hidden(rows: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_to_the_bit_what_it_is_alone(dtype) -> None:
    store, h = make_store(dtype), hidden(len(NAMES), dtype)
    for key in SITES:
        found = stepped(store, NAMES, h, key)
        for row, name in enumerate(NAMES):
            bare = name is None or StageKey(key, "elementwise") not in _stages_of(store, name)
            if bare and (name is None or name == "scales"):
                assert same_bits(found[row], h[row])
            else:
                assert same_bits(found[row : row + 1], stepped(store, [name], h[row : row + 1], key))
                assert not same_bits(found[row], h[row])


def _stages_of(store: AdapterStore, name: str) -> set[StageKey]:
    return {StageKey.of(one) for one in store.adapters[name].interventions}


def test_a_site_has_the_stages_of_its_segments_alone() -> None:
    store = make_store()
    for names, forms in {
        ("low",): ["low_rank"],
        ("red",): ["elementwise"],
        ("red", "low"): ["low_rank", "elementwise"],
    }.items():
        table = store.table(tuple((name, 0) for name in names))
        assert [[stage.form for stage in table.sites[key].stages] for key in SITES] == [forms] * LAYERS
        assert [table.sites[key].low_rank for key in SITES] == [forms == ["low_rank"]] * LAYERS
    assert {StageKey.of(one).form for one in store.adapters["low"].interventions} <= set(FORMS)


def test_scales_lie_in_float32_beside_hidden_states_in_16_bits() -> None:
    store = make_store(torch.bfloat16)
    assert store.pool_of(SITES[0]).dtype is torch.bfloat16
    assert store.pool_of(SITES[0], "elementwise").dtype is torch.float32
    assert store.pool_of(SITES[0], "elementwise").used == 3


def test_scales_times_a_number_and_their_sum() -> None:
    """From the unedited h: Σ α ((s − 1) h + v)."""
    store, h = make_store(), hidden(2)
    names = Planner(store).check_names([["red", "scales"], "red"], 2, scale=[[0.5, -2.0], 3.0])
    found = stepped(store, names, h, SITES[1]).double()
    for row, terms in enumerate([{"red": 0.5, "scales": -2.0}, {"red": 3.0}]):
        x = h[row].double()
        want = x.clone()
        for name, number in terms.items():
            one = store.adapters[name].interventions[-1]
            want += number * (one.scaling[0].double() * x + one.bias[0].double() - x)
        torch.testing.assert_close(found[row], want, rtol=1e-5, atol=1e-5)


def test_rescaled_for_good_it_is_the_scale_of_the_call() -> None:
    store, h = make_store(), hidden(1)
    want = stepped(store, Planner(store).check_names(["red"], 1, scale=-1.5), h, SITES[0])
    again = red()
    again.rescale(-1.5)
    store.add("again", again, Place(CPU, torch.float32))
    assert same_bits(want, stepped(store, ["again"], h, SITES[0]))
    nothing = Planner(store).check_names([("red",)], 1, scale=0)
    assert nothing == (None,)  # so the row is left as it is, to the bit


def test_one_of_each_form_on_a_token_is_refused_and_names_both() -> None:
    store = make_store()
    planner = Planner(store)
    names = planner.check_names([["low", "red"]], 1)
    with pytest.raises(ValueError, match="adapter_names: 'low' .loreft. and 'red' .red. .*block_output"):
        planner.select(names, Prompts.unpadded([2]))
    # Where they share no token, or no site, each is what it is alone.
    store.add("first", red(5, positions="prompt"), Place(CPU, torch.float32))
    store.add("rest", low(6, positions="generated"), Place(CPU, torch.float32))
    h = hidden(1)
    together = stepped(store, planner.check_names([["first", "rest"]], 1), h, SITES[0])
    assert same_bits(together, stepped(store, ["first"], h, SITES[0]))


def test_an_adapter_of_both_forms() -> None:
    both = [*low(layers=[0]).interventions, *red(layers=[1]).interventions]
    store = AdapterStore()
    store.add("both", rk.Adapter(both), Place(CPU, torch.float32))
    h = hidden(1)
    assert all(not same_bits(stepped(store, ["both"], h, key), h) for key in SITES)
    with pytest.raises(ValueError, match="interventions: loreft and red meet at block_output of layer 0"):
        rk.Adapter([*low(layers=[0], positions="all").interventions, *red(layers=[0]).interventions])
    with pytest.raises(ValueError, match="adapters: loreft and red meet at block_output of layer 0"):
        rk.Adapter.compose([low(), red()])


def test_adapters_come_and_go_and_move() -> None:
    store, h = make_store(capacity=8), hidden(1)
    want = stepped(store, ["red"], h, SITES[1])
    store.remove("scales")
    assert store.pool_of(SITES[1], "elementwise").used == LAYERS
    with pytest.raises(rk.PoolFull, match="pool rows"):
        for number in range(9):
            store.add(f"n{number}", red(number), Place(CPU, torch.float32))
    assert same_bits(want, stepped(store, ["red"], h, SITES[1]))
    store.move(SITES[1], Place(CPU, torch.float64))
    with rk.backend("reference"):
        moved = stepped(store, ["red"], h.double(), SITES[1])
    torch.testing.assert_close(moved.float(), want)
    assert {pool.dtype for pool in store.pools.values()} == {torch.float32, torch.float64}
    assert same_bits(want, stepped(copy.deepcopy(make_store()), ["red"], h, SITES[1]))


def test_a_workspace_has_a_row_of_spans_for_each_stage() -> None:
    store = make_store()
    planner = Planner(store)
    selection = planner.select(NAMES, Prompts.unpadded([1] * 5))
    plan = planner.step(selection, np.zeros(5), np.ones(5, dtype=np.int64))
    assert plan is not None
    found = DecodeWorkspaces(store).of(plan)
    assert found is not None and len(found.spans) == len(store.numbers) == 2 * LAYERS
    for key in SITES:
        (first, _, form), (second, _, other) = found.places[key]
        assert (form, other) == ("low_rank", "elementwise")
        assert (found.spans[first, :, 1] > 0).tolist() == [name == "low" for name in NAMES]
        scales = [name == "red" or (name == "scales" and key.layer == 1) for name in NAMES]
        assert (found.spans[second, :, 1] > 0).tolist() == scales
