"""Several adapters on one row, and adapters times a number: edits of the unedited state, and their sum."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import patch_with_mixed, random_adapter
from support.models import batch_of, make_model, row_alone

import reft_kernels as rk
from reft_kernels.batch import store as store_module

pytestmark = pytest.mark.models
WIDTH = 32
#: (name, factor) of each row's adapters. Their positions overlap without being equal.
ROWS = [
    [("tied", 1.0), ("everywhere", 0.5)],
    [("everywhere", 1.0)],
    [("untied", -1.0), ("generated", 1.0), ("tied", 2.0)],
    [],
]
NAMES = [["tied", "everywhere"], "everywhere", ["untied", "generated", "tied"], "__base__"]
SCALES = [[1.0, 0.5], 1.0, [-1.0, 1.0, 2.0], 1.0]


@pytest.fixture
def model():
    model = make_model(gain=1.0)
    patch_with_mixed(model)
    return model


@contextlib.contextmanager
def hooks(model, terms, prompt: int):
    """The sum of the formulas' edits in plain hooks, of the state that came."""
    adapters = [(model.reft.adapters[name], factor) for name, factor in terms]

    def hook_of(layer: int):
        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            before, after = h[0].double(), h[0].double().clone()
            for adapter, factor in adapters:
                for one in adapter.interventions:
                    if one.layer == layer:
                        at = oracle.columns(one.positions, prompt, len(before))
                        after[at] += factor * (oracle.formula(one, before[at]) - before[at])
            edited = after.to(h.dtype)[None]
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    handles = [block.register_forward_hook(hook_of(i)) for i, block in enumerate(model.model.layers)]
    try:
        with model.reft.disable_adapter():
            yield
    finally:
        for handle in handles:
            handle.remove()


def greedy(model, row, terms, steps: int) -> list[int]:
    ids, prompt = row["input_ids"], row["input_ids"].shape[1]
    with torch.no_grad(), hooks(model, terms, prompt):
        for _ in range(steps):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, prompt:].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_overlapping_edits_add_up(model, side):
    batch = batch_of([7, 5, 6, 4], side)
    places = batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    with torch.no_grad():
        found = model(**batch, position_ids=places, adapter_names=NAMES, scale=SCALES).logits
    for row, terms in enumerate(ROWS):
        alone = row_alone(batch, row)
        length = alone["input_ids"].shape[1]
        with torch.no_grad(), hooks(model, terms, length):
            want = model(**alone).logits[0]
        seen = batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row][seen], want, rtol=1e-4, atol=1e-4)


def test_generated_tokens_too(model):
    batch = batch_of([7, 5, 6, 4])
    tokens = model.generate(**batch, adapter_names=NAMES, scale=SCALES, max_new_tokens=5, do_sample=False)
    for row, terms in enumerate(ROWS):
        assert tokens[row, -5:].tolist() == greedy(model, row_alone(batch, row), terms, 5)


def logits(model, batch, **call):
    with torch.no_grad():
        return model(**batch, **call).logits


def test_a_row_of_two_is_their_composition_to_the_bit(model):
    adapters = model.reft.adapters
    both = rk.Adapter.compose([adapters["everywhere"], adapters["tied"]], weights=[0.5, 2.0])
    model.reft.add_adapter("both", both)
    batch = batch_of([6, 5])
    found = logits(model, batch, adapter_names=[["tied", "everywhere"], "__base__"], scale=[[2.0, 0.5], 1])
    assert torch.equal(found, logits(model, batch, adapter_names=["both", "__base__"]))
    alone = logits(model, row_alone(batch, 0), adapter_names=[["everywhere", "tied"]], scale=[[0.5, 2.0]])
    torch.testing.assert_close(found[0], alone[0], rtol=1e-5, atol=1e-5)


def test_forms_of_scale(model):
    batch = batch_of([6, 6])
    names = [["tied", "everywhere"], "tied"]
    want = logits(model, batch, adapter_names=names, scale=[[3.0, 0.5], 3.0])
    assert torch.equal(want, logits(model, batch, adapter_names=names, scale={"tied": 3, "everywhere": 0.5}))
    assert torch.equal(want, logits(model, batch, reft_adapter_names=names, reft_scale=[[3, 0.5], 3]))
    plain = logits(model, batch, adapter_names=["tied", "tied"])
    assert not torch.equal(want, plain)
    for one in (1.0, 1, [1, 1.0], {"tied": 1}):
        assert torch.equal(plain, logits(model, batch, adapter_names=["tied", "tied"], scale=one))
    doubled = logits(model, batch, adapter_names=["tied"] * 2, scale=2.0)
    model.reft.set_adapter("tied")
    assert torch.equal(doubled, logits(model, batch, scale=2.0))
    bare = logits(model, batch, adapter_names=["__base__"] * 2)
    assert torch.equal(bare, logits(model, batch, scale=0))


def test_rows_do_not_depend_on_their_neighbours(model):
    batch = batch_of([6, 6, 6])
    names, scale = [["tied", "everywhere"], "untied", ["generated", "everywhere"]], [[0.5, 1.0], 2.0, 1.0]
    found = logits(model, batch, adapter_names=names, scale=scale)
    flipped = {key: tensor.flip(0) for key, tensor in batch.items()}
    again = logits(model, flipped, adapter_names=names[::-1], scale=scale[::-1]).flip(0)
    assert torch.equal(found, again)


def test_gradients_of_a_row_of_two():
    model = make_model(gain=1.0).double()
    reft = rk.patch(model)
    for seed, (name, spec) in enumerate({"a": "f2+l2", "b": "all"}.items()):
        config = rk.ReftConfig(method="direft", r=2, layers=[1], positions=spec, share_weights=True)
        adapter = random_adapter(config, WIDTH, seed=seed).double()
        adapter.trainable = True
        reft.add_adapter(name, adapter)
    batch, parameters = batch_of([6]), dict(reft.named_parameters())
    with rk.backend("reference"):
        model(**batch, adapter_names=[["a", "b"]], scale=[[0.5, 3.0]]).logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in parameters.items()}
    reft.zero_grad()

    def hook(module, args, output):
        out = output
        for name, factor in (("a", 0.5), ("b", 3.0)):
            one = reft.adapters[name].interventions[0]
            fold, at = one.fold(), oracle.columns(one.positions, 6, 6)
            mask = torch.zeros(6, 1, dtype=torch.float64)
            mask[at] = 1
            out = out + factor * mask * ((output @ fold.down.T + fold.bias) @ fold.up)
        return out

    handle = model.model.layers[1].register_forward_hook(hook)
    with reft.disable_adapter():
        model(**batch).logits.square().sum().backward()
    handle.remove()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-8)


def test_what_was_trained_since_is_seen(model):
    batch = batch_of([6])
    call = {"adapter_names": [["tied", "everywhere"]], "scale": 0.5}
    model.reft.adapters["everywhere"].trainable = True
    before = logits(model, batch, **call)
    with torch.no_grad():
        for one in model.reft.adapters["everywhere"].interventions:
            one.b += 1.0
    after = logits(model, batch, **call)
    assert not torch.equal(before, after)
    fresh = copy.deepcopy(model)
    fresh.reft._runtime.store._forget_stacks(fresh.reft._runtime.store._stacks)
    fresh.reft._runtime.store._changed()
    assert torch.equal(after, logits(fresh, batch, **call))


def test_room_is_given_back(model, monkeypatch):
    monkeypatch.setattr(store_module, "_KEPT_STACKS", 3)
    store = model.reft._runtime.store
    (pool,) = store.pools.values()
    used, batch = pool.used, batch_of([6])
    first = logits(model, batch, adapter_names=["tied"], scale=0.25)
    for step in range(2, 12):
        logits(model, batch, adapter_names=["tied"], scale=float(step))
        assert len(store._stacks) <= 4
    assert torch.equal(first, logits(model, batch, adapter_names=["tied"], scale=0.25))
    assert pool.used > used
    mine = model.reft.adapters["tied"].pool_rows
    model.reft.delete_adapter("tied")
    assert pool.used == used - mine and not store._stacks


def test_a_fixed_pool_without_room_says_so():
    model = make_model()
    reft = rk.patch(model, capacity=6)
    reft.add_adapter("a", random_adapter(rk.ReftConfig(r=4, layers=[0], positions="all"), WIDTH))
    batch = batch_of([4])
    before = logits(model, batch, adapter_names=["a"])
    with pytest.raises(rk.PoolFull, match="4 contiguous rows"):
        logits(model, batch, adapter_names=["a"], scale=2.0)
    assert torch.equal(before, logits(model, batch, adapter_names=["a"]))


def test_heads_of_two_adapters_on_a_row_are_refused(model):
    for name in ("one", "two"):
        config = rk.ReftConfig(r=1, positions="all", modules_to_save=["lm_head"])
        model.reft.add_adapter(name, config)
    with pytest.raises(ValueError, match="row 0 has 'one' and 'two'.*'lm_head'.*no sum"):
        logits(model, batch_of([4]), adapter_names=[["one", "two"]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"adapter_names": [["tied", "tied"], None]}, ("adapter_names: row 0", "twice", "scale")),
        ({"adapter_names": [["tied", "__base__"], None]}, ("adapter_names: row 0", "bare model")),
        ({"adapter_names": [["tied", "tide"], None]}, ("adapter_names", "'tide'", "known are")),
        ({"adapter_names": [["tied", 3], None]}, ("adapter_names", "lists of names", "3")),
        ({"adapter_names": ["tied", None], "scale": "2"}, ("scale", "finite number", "'2'")),
        ({"adapter_names": ["tied", None], "scale": float("inf")}, ("scale", "finite", "inf")),
        ({"adapter_names": ["tied", None], "scale": [1.0]}, ("scale", "1 entries", "2 rows")),
        ({"adapter_names": ["tied", None], "scale": [[1.0, 2.0], 1]}, ("scale", "row 0", "2 numbers", "1")),
        ({"adapter_names": ["tied", None], "scale": {"untied": 1.0}}, ("scale", "'untied'", "no row")),
        ({"adapter_names": ["tied", None], "scale": {"tied": None}}, ("scale", "'tied'", "None")),
        ({"adapter_names": ["tied", None], "scales": 2}, ("scales", "scale is")),
        (
            {"adapter_names": [["tied", "untied"], None], "reft_positions": [[0], None]},
            ("reft_positions: row 0", "several adapters"),
        ),
    ],
)
def test_bad_input_is_named(model, call, words):
    with pytest.raises(ValueError) as caught:
        logits(model, batch_of([4, 4]), **call)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_method_without_a_scale(model, monkeypatch):
    monkeypatch.setattr(type(model.reft.adapters["everywhere"].interventions[0].spec), "scalable", False)
    batch = batch_of([4])
    with pytest.raises(ValueError, match="^scale: .*direft"):
        logits(model, batch, adapter_names=["everywhere"], scale=2.0)
    with pytest.raises(ValueError, match="^weights: .*direft"):
        rk.Adapter.compose([model.reft.adapters["everywhere"]], weights=[2.0])
    logits(model, batch, adapter_names=["everywhere"], scale=1.0)
