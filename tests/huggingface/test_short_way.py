"""The short way past the dispatcher: the bits of the long one, and the long one wherever somebody watches."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from support.adapters import patch_with_mixed, random_adapter
from support.models import LAYERS, batch_of, make_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reft_kernels as rk
from reft_kernels.huggingface import sites
from reft_kernels.ops import launch

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(launch.missing is not None, reason=f"no short way: {launch.missing}"),
]
NAMES = ["everywhere", "tied", "__base__", "generated"]
LENGTHS = [6, 3, 5, 1]


@pytest.fixture
def model():
    model = make_model()
    patch_with_mixed(model).set_adapter(None)
    return model


@pytest.fixture
def by_name(monkeypatch):
    """Counts the edits that went the long way."""
    count = [0]
    edit = sites.edit

    def counted(*args, **kwargs):
        count[0] += 1
        return edit(*args, **kwargs)

    monkeypatch.setattr(sites, "edit", counted)
    return count


@torch.no_grad()
def logits(model, names=NAMES):
    return model(**batch_of(LENGTHS), adapter_names=names).logits


def long_logits(model, names=NAMES):
    with launch.long_way():
        return logits(model, names)


def tokens(model):
    return model.generate(**batch_of(LENGTHS), adapter_names=NAMES, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool_dtype", [None, torch.float32])
def test_both_ways_give_the_same_bits(dtype, pool_dtype, by_name):
    model = make_model().to(dtype)
    patch_with_mixed(model, pool_dtype=pool_dtype).set_adapter(None)
    got = logits(model)
    assert by_name == [0]
    want = long_logits(model)
    assert by_name == [LAYERS]
    assert torch.equal(got, want) and not torch.equal(got, logits(model, None))
    generated = tokens(model)
    assert by_name == [LAYERS]
    with launch.long_way():
        assert torch.equal(generated, tokens(model))
    assert by_name[0] > LAYERS


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenCalls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Profiled:
    def __enter__(self):
        self.profile = torch.profiler.profile()
        self.profile.__enter__()
        return self

    def __exit__(self, *args):
        self.profile.__exit__(*args)
        self.names = [event.name for event in self.profile.events()]


@pytest.mark.parametrize("watcher", [Seen, SeenCalls, Profiled])
def test_who_watches_sees_the_op(model, watcher, by_name):
    want = logits(model)
    with watcher() as watching:
        got = logits(model)
    assert torch.equal(got, want) and by_name == [LAYERS]
    assert sum("reft_kernels" in name and "intervene_" in name for name in watching.names) == LAYERS


def test_a_watcher_that_comes_within_a_forward_is_noticed(model, by_name):
    stack = contextlib.ExitStack()
    seen = Seen()
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: stack.enter_context(seen) and None)
    with stack:
        logits(model)
    assert by_name == [LAYERS - 1]  # the first block had no watcher
    assert sum("intervene_" in name for name in seen.names) == LAYERS - 1


def test_a_gradient_takes_the_long_way(model, by_name):
    embeds = model.get_input_embeddings()(batch_of(LENGTHS)["input_ids"]).detach().requires_grad_()
    mask = batch_of(LENGTHS)["attention_mask"]
    out = model(inputs_embeds=embeds, attention_mask=mask, adapter_names=NAMES).logits
    assert by_name == [LAYERS]
    out.sum().backward()
    assert embeds.grad is not None
    with torch.inference_mode():
        quick = model(inputs_embeds=embeds, attention_mask=mask, adapter_names=NAMES).logits
    assert by_name == [LAYERS]
    torch.testing.assert_close(quick, out.detach())


def test_a_transform_of_functorch_takes_the_long_way(model, by_name):
    want = logits(model)
    batch = batch_of(LENGTHS)
    with torch.no_grad():
        inner = torch.func.vmap(lambda scale: model(**batch, adapter_names=NAMES).logits * scale)
        got = inner(torch.ones(2))
    assert by_name == [LAYERS]
    assert torch.equal(got[0], want) and torch.equal(got[1], want)


@pytest.fixture
def site(model):
    """The first block's stand-in over a forward that only copies, under a plan of 24 tokens."""
    plans = []
    runtime = model.reft._runtime
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: plans.append(runtime.plan))
    logits(model)
    hook.remove()
    stand_in = model.model.layers[0].__dict__["forward"]
    stand_in.original = torch.clone
    with runtime.using(plans[0]), torch.no_grad():
        yield stand_in


def test_a_tracer_takes_the_long_way(site, by_name):
    h = torch.randn(4, 6, 32)
    want = site(h)
    assert by_name == [0]
    traced = torch.jit.trace(site, h, check_trace=False)
    assert by_name == [1] and "intervene_" in str(traced.graph)
    assert torch.equal(traced(h), want)


def test_a_wrong_number_of_tokens_is_refused(site):
    with pytest.raises(RuntimeError, match="planned for 24 tokens"):
        site(torch.randn(4, 1, 32))


def test_hidden_states_in_other_layouts(site, by_name):
    h = torch.randn(4, 6, 32)
    want = site(h)
    assert torch.equal(site.__call__(h), want)
    by_name[0] = 0
    apart = torch.empty(4, 6, 64)[..., :32].copy_(h)
    site.original = lambda h: h
    assert torch.equal(site(apart), want) and by_name == [1]  # rows with a stride
    lazy = torch._lazy_clone(h)
    assert torch.equal(site(lazy), want) and by_name == [1]
    assert not torch.equal(h, want)  # what the copy shared memory with until it was written
    site.original = lambda h: (h, "more")
    out = site(h.clone())
    assert out[1] == "more" and torch.equal(out[0], want) and by_name == [1]


def test_a_subclass_of_tensor_takes_the_long_way(model, by_name):
    class Mine(torch.Tensor):
        pass

    want = logits(model)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda m, a, o: o.as_subclass(Mine))
    got = logits(model)
    handle.remove()
    assert torch.equal(got.as_subclass(torch.Tensor), want)
    assert by_name[0] > 0


def test_a_backend_that_was_chosen_is_taken(model, by_name):
    want = logits(model)
    with rk.backend("reference"):
        got = logits(model)
    assert by_name == [LAYERS]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_pool_that_moves_within_a_forward(model, by_name):
    want = logits(model)
    store = model.reft._runtime.store
    (pool,) = store.pools.values()
    before = pool.down

    def grow(*_):
        if pool.down is before:
            pool._resize(2 * pool.capacity)
            before.fill_(float("nan"))

    model.model.layers[1].register_forward_pre_hook(grow)
    got = logits(model)
    assert pool.down is not before and by_name == [0]
    assert torch.equal(got, want)


def test_adapters_that_come_go_and_train(model, by_name):
    logits(model)
    reft = model.reft
    reft.add_adapter("late", random_adapter(rk.ReftConfig(r=3, layers="all", positions="all"), 32, seed=9))
    names = ["late", "everywhere", "__base__", "late"]
    assert torch.equal(logits(model, names), long_logits(model, names))
    before = logits(model, names)
    with torch.no_grad():
        for parameter in reft.adapters["everywhere"].parameters():
            parameter.mul_(0.5)
    reft.adapters["everywhere"].trainable = True
    by_name[0] = 0
    after = logits(model, names)
    assert by_name == [0]
    assert torch.equal(after, long_logits(model, names)) and not torch.equal(after[1], before[1])
    reft.delete_adapter("everywhere")
    names = ["late", "tied", "__base__", "late"]
    assert torch.equal(logits(model, names), long_logits(model, names))


def test_a_model_cast_after_it_was_used(model, by_name):
    logits(model)
    model.to(torch.bfloat16)
    logits(model)  # learns of the dtype
    by_name[0] = 0
    got = logits(model)
    assert by_name == [0] and torch.equal(got, long_logits(model))


def test_a_site_that_joins_a_module_that_was_called(model, by_name):
    want = logits(model)
    config = rk.ReftConfig(r=2, layers=[1], site="block_input", positions="all")
    model.reft.add_adapter("before", random_adapter(config, 32, seed=3))
    names = ["everywhere", "before", "__base__", "before"]
    got = logits(model, names)
    assert by_name == [2]  # what goes in, and that module's output
    assert torch.equal(got, long_logits(model, names)) and not torch.equal(got, want)
    model.reft.delete_adapter("before")
    by_name[0] = 0
    assert torch.equal(logits(model), want) and by_name == [0]


def test_a_runtime_with_another_cell(model, by_name):
    """Memory of a cell is used again: who still points to it must notice."""
    want = logits(model)
    runtime = model.reft._runtime
    runtime.cell = None
    others = [launch.cell() for _ in range(3)]
    for other in others:
        other.hold(False)
    runtime.cell = launch.cell()
    assert torch.equal(logits(model), want) and by_name == [0]


def test_a_plan_whose_sites_became_others_goes_by_name(site, by_name):
    h = torch.randn(4, 6, 32)
    want = site(h)
    assert by_name == [0]
    site.runtime.plan.launches.close()
    assert torch.equal(site(h), want) and by_name == [1]


def test_copies_hold_no_addresses(model, by_name):
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tables = twin.reft._runtime.store._tables.values()
        assert len(tables) > 0 and all(table.launches is None for table in tables)
        forward = twin.model.layers[0].__dict__["forward"]
        assert type(forward) is type(model.model.layers[0].__dict__["forward"])
        assert forward.module is twin.model.layers[0]
        assert torch.equal(logits(twin), want) and by_name == [0]


def test_the_stand_in_looks_like_the_forward_that_it_stands_for(model):
    forward = model.model.layers[0].__dict__["forward"]
    assert isinstance(forward, sites.SiteForward) and type(forward) is not sites.SiteForward
    assert inspect.signature(forward) == inspect.signature(make_model().model.layers[0].forward)
    with pytest.raises(TypeError):
        forward(no_such_argument=1)


@pytest.mark.parametrize("setting", ["0", ""])
def test_it_can_be_left_alone(setting):
    code = "from reft_kernels.ops import launch; print(launch.missing)"
    environment = {"REFT_KERNELS_SHORT_WAY": setting}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.stdout.strip() == ("REFT_KERNELS_SHORT_WAY is 0" if setting else "None"), done.stderr
