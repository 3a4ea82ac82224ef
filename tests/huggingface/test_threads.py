"""Adapters that others delete, replace or choose while generate runs: what docs/threads.md promises."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support.adapters import patch_with_mixed, random_adapter
from support.models import batch_of, make_model
from transformers import StoppingCriteriaList

import reft_kernels as rk

pytestmark = pytest.mark.models
STEPS = 6


def generate(model, name, at_step=None, **kwargs):
    """Greedy tokens of one prompt; at_step: called after the second step, in the middle of generate."""

    class Between(list):
        def __call__(self, ids, scores, **_):
            self.append(1)
            if len(self) == 2 and at_step is not None:
                at_step()
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    between = Between()
    out = model.generate(
        **batch_of([7]),
        adapter_names=None if name is None else [name],
        max_new_tokens=STEPS,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([between]),
        **kwargs,
    )
    assert len(between) == STEPS
    return out.tolist()


def other() -> rk.Adapter:
    config = rk.ReftConfig(method="direft", r=5, layers="all", positions="all")
    return random_adapter(config, 32, scale=0.5, seed=9)


def in_a_thread(call):
    """Runs it in another thread, to its end."""

    def run():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    return run


def replace(model, name):
    model.reft.delete_adapter(name)
    model.reft.add_adapter(name, other())


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_an_adapter_that_still_edits_is_an_error(model, how):
    """Not the new one's edits from some token on, and not the bare model's."""
    change = model.reft.delete_adapter if how == "deleted" else lambda name: replace(model, name)
    with pytest.raises(ValueError, match="'everywhere' was deleted while a generate call used it"):
        generate(model, "everywhere", in_a_thread(lambda: change("everywhere")))
    # The model goes on.
    again = make_model()
    patch_with_mixed(again)
    assert generate(model, "generated") == generate(again, "generated")
    if how == "replaced":
        again.reft.delete_adapter("everywhere")
        again.reft.add_adapter("everywhere", other())
        assert generate(model, "everywhere") == generate(again, "everywhere")


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_an_adapter_that_has_done_its_edits_may_go(model, change):
    """Positions in the prompt only: what is in the cache stays."""
    want = generate(model, "untied")
    call = model.reft.delete_adapter if change == "delete" else lambda name: replace(model, name)
    assert generate(model, "untied", in_a_thread(lambda: call("untied"))) == want


def test_an_adapter_with_a_head_of_its_own_is_in_use_to_the_end(model):
    """Whatever its positions are: its head runs in every step."""
    model.reft.add_adapter("head", rk.ReftConfig(r=1, positions="f1", modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="'head' was deleted"):
        generate(model, "head", in_a_thread(lambda: model.reft.delete_adapter("head")))


@pytest.mark.parametrize("who", ["everywhere", "tied"])
def test_a_change_between_a_steps_plan_and_its_forward(model, who):
    """There another thread can put something else where the plan's adapter lay in the pool."""
    want = generate(model, "everywhere")
    prepare, seen = model.prepare_inputs_for_generation, []

    def changed_after(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        seen.append(1)
        if len(seen) == STEPS:  # the last one: no later step notices
            in_a_thread(lambda: replace(model, who))()
        return inputs

    model.prepare_inputs_for_generation = changed_after
    if who == "everywhere":
        with pytest.raises(ValueError, match="'everywhere' was deleted"):
            generate(model, "everywhere")
    else:
        assert generate(model, "everywhere") == want
    assert len(seen) == STEPS


def test_with_a_static_cache_others_wait(model):
    """Its decode steps may be compiled code: the model belongs to this generate until it ends."""
    want = generate(model, "everywhere", cache_implementation="static")
    threads: list[threading.Thread] = []

    def start():
        threads.append(threading.Thread(target=model.reft.delete_adapter, args=("everywhere",)))
        threads[0].start()
        threads[0].join(0.2)
        assert threads[0].is_alive() and "everywhere" in model.reft.adapters

    assert generate(model, "everywhere", start, cache_implementation="static") == want
    threads[0].join(60)
    assert "everywhere" not in model.reft.adapters


def test_generate_takes_the_active_adapter_once_at_its_start(model):
    model.reft.set_adapter("everywhere")
    want = generate(model, None)
    assert generate(model, None, in_a_thread(lambda: model.reft.set_adapter("generated"))) == want
    assert model.reft.active_adapter == "generated"
    model.reft.set_adapter("everywhere")

    def run_bare():
        with model.reft.disable_adapter():
            model(**batch_of([3]))

    assert generate(model, None, in_a_thread(run_bare)) == want


def test_the_active_adapter_is_the_models_not_a_threads(model):
    """What disable_adapter does in one thread, calls of all threads see; names in the call stand above it."""
    batch = batch_of([5])
    got = {}

    def look():
        with torch.no_grad():
            got["unnamed"] = model(**batch).logits
            got["named"] = model(**batch, adapter_names=["everywhere"]).logits

    with torch.no_grad():
        named = model(**batch, adapter_names=["everywhere"]).logits
    with model.reft.disable_adapter():
        in_a_thread(look)()
    with torch.no_grad():
        assert torch.equal(got["unnamed"], make_model()(**batch).logits)
    assert torch.equal(got["named"], named)


def test_forwards_while_adapters_come_and_go(model):
    """Eight threads' forwards, and one that loads and deletes: each row gets its own adapter's edits."""
    batch = batch_of([5, 4])
    names = ["everywhere", "untied", "generated", "tied"]

    def logits(name):
        with torch.no_grad():
            return model(**batch, adapter_names=[name, "__base__"]).logits

    want = {name: logits(name) for name in names}
    wrong: list[str] = []
    done = threading.Event()

    def ask(name):
        for _ in range(8):
            if not torch.equal(logits(name), want[name]):
                wrong.append(name)

    def churn():
        while not done.is_set():
            model.reft.add_adapter("new", copy.deepcopy(extra))
            model.reft.delete_adapter("new")

    extra = other()
    threads = [threading.Thread(target=ask, args=(name,)) for name in names * 2]
    churner = threading.Thread(target=churn)
    for thread in (churner, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    churner.join()
    assert not wrong
