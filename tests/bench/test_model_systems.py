"""Whole models: what is shared, what is right, and that attributed time and totals agree."""

from __future__ import annotations

import time

import pytest
import torch
from reft_bench.measure import attribution, memory
from reft_bench.measure.timer import interleaved
from reft_bench.records import stats
from reft_bench.systems import Runner, Setup, System, Unable, all_systems, generation, models
from reft_bench.systems.base import Point
from reft_bench.systems.correctness import References, check, outputs
from reft_bench.systems.lora import merge

POINT = Point(batch=3, prompt=9, rank=2, layers=2, positions="f3+l3", adapters=2)


def _setup(**changes) -> Setup:
    model = models.build("tiny", torch.float32, "cpu", 0)
    setup = Setup(model, Point(**{**vars(POINT), **changes}), 0)
    setup.merged = merge(setup)
    return setup


def test_twins_share_weights_and_nothing_else():
    model = models.build("tiny", torch.float32, "cpu", 0)
    twin = models.twin(model)
    pairs = list(zip(model.parameters(), twin.parameters()))
    assert pairs and all(a is b for a, b in pairs)
    models.blocks(twin)[0].register_forward_hook(lambda *_: None)
    assert not models.blocks(model)[0]._forward_hooks


def test_a_merge_leaves_the_model_that_it_came_from():
    setup = _setup()
    before = [parameter.clone() for parameter in setup.original.parameters()]
    merged = merge(setup)
    assert all(torch.equal(a, b) for a, b in zip(before, setup.original.parameters()))
    shared = sum(a is b for a, b in zip(setup.original.parameters(), merged.parameters()))
    assert 0 < shared < len(before)  # all but the modules that LoRA is on


@pytest.mark.parametrize(("count", "total", "layers"), [(1, 8, [7]), (2, 8, [3, 7]), (3, 3, [0, 1, 2])])
def test_edited_layers_are_spread(count, total, layers):
    assert models.spread(count, total) == layers


@pytest.mark.parametrize("positions", ["f3+l3", "all"])
@pytest.mark.parametrize("name", all_systems())
def test_systems_give_the_reference(name, positions):
    setup, system = _setup(positions=positions), all_systems()[name]
    reason = system.why_not(setup)
    if reason is not None or name.startswith("reft_kernels triton"):
        pytest.skip(reason or "slow through the interpreter")
    found = check(References(setup), system, system.build(setup), 3)
    assert found.get("error", 0.0) < 1e-4 and ("error" in found) == (name != "bare model")
    assert found.get("token_agreement", 1.0) == 1.0


@pytest.mark.parametrize(
    ("method", "site", "heads", "peers"),
    [
        ("vector", "block_output", None, 1),
        ("ablation", "block_output", None, 1),
        ("concept", "block_output", None, 0),
        ("adapter", "mlp_activation", None, 0),
        ("sae", "mlp_output", None, 0),
        ("loreft", "lm_head_input", None, 0),
        ("lofit", "head_attention_value_output", 2, 0),
        ("vector", "head_key_output", 4, 0),
        ("loreft", "*.mlp.down_proj.input", None, 0),
    ],
)
def test_any_method_at_any_site(method, site, heads, peers):
    """Ours is right; hooks are there for linear edits of block outputs, and edit the same; pyreft says no."""
    setup = _setup(positions="all", method=method, site=site, heads=heads)
    systems, references = all_systems(), References(setup)
    found = check(references, systems["reft_kernels native"], systems["reft_kernels native"].build(setup), 3)
    assert found["error"] < 1e-3 and found["token_agreement"] == 1.0
    bare, edited = references.bare("reft")[0], references.wanted("reft", False)[0]
    assert (edited - bare).norm() > 1e-4 * bare.norm()
    assert (systems["eager hooks"].why_not(setup) is None) == bool(peers)
    if peers:
        hooks = systems["eager hooks"]
        assert check(references, hooks, hooks.build(setup), 3)["error"] < 1e-4
    assert "loreft at block_output" in systems["pyreft"].why_not(setup)


class _Unedited(System):
    name = "unedited"

    def build(self, setup):
        return Runner(setup, models.twin(setup.merged))


class _OneForAll(System):
    """The right edit with the wrong adapter for some rows."""

    name = "one for all"

    def build(self, setup):
        runner = all_systems()["reft_kernels reference"].build(setup)
        runner._arguments = {"adapter_names": ["a0"] * setup.point.batch}
        return runner


@pytest.mark.parametrize("system", [_Unedited(), _OneForAll()], ids=lambda system: system.name)
def test_wrong_systems_are_not_timed(system):
    setup = _setup()
    with pytest.raises(Unable, match="wrong"):
        check(References(setup), system, system.build(setup), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "the model has 2"),
        ({"rank": 65}, "more than the model's width 64"),
        ({"rank": 17, "site": "head_value_output", "heads": 1}, "width 16 at head_value_output"),
        ({"site": "head_value_output", "heads": 5}, "the model has 4 heads"),
        ({"site": "*.attn.output"}, "attn"),
        ({"adapters": 4}, "don't fit a batch of 3"),
        ({"prompt": 9000}, "no room"),
    ],
)
def test_what_a_model_cannot_take_is_said(changes, message):
    with pytest.raises(Unable, match=message):
        _setup(**changes)


# Attribution ---------------------------------------------------------------------------------------------

DELAY = 3e-3


class _VirtualClock:
    """Stands for time.perf_counter, so that no neighbour's load is in the figures: time passes where a
    delay says so, and by a microsecond whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch):
    virtual = _VirtualClock()
    monkeypatch.setattr(time, "perf_counter", virtual)
    return virtual


class _Delay:
    """A hook that takes its time."""

    def __call__(self, module, args, output):
        if isinstance(time.perf_counter, _VirtualClock):
            time.perf_counter.now += DELAY


class _Wrapper:
    """A method put on the instance that takes its time before it calls what was there."""

    def __init__(self, original) -> None:
        self.original, self.__name__ = original, "forward"

    def __call__(self, *args, **kwargs):
        _Delay()(None, None, None)
        return self.original(*args, **kwargs)


class _Delayed(Runner):
    attributed = (__name__,)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, models.twin(setup.merged))
        for block in models.blocks(self.model):
            block.register_forward_hook(_Delay())
        self.model.forward = _Wrapper(self.model.forward)


def test_attributed_time_and_the_difference_of_totals_agree(clock):
    setup = _setup()
    runners = {"bare": Runner(setup, models.twin(setup.merged)), "delayed": _Delayed(setup)}
    timings = interleaved(list(runners), lambda name: generation.timed(runners[name], 4), rounds=3)
    with attribution.attributing(runners["delayed"].model, (__name__,)) as ledger:
        costs = dict.fromkeys(attribution.HOOK_DICTS, 0.0)
        parts = [generation.attributed(runners["delayed"], 4, ledger, costs) for _ in range(3)]
    for phase, calls in (("prefill", 3), ("decode", 3), ("generate", 12)):
        samples = {name: [getattr(t, phase) for t in taken] for name, taken in timings.items()}
        total = stats.paired_difference(samples["delayed"], samples["bare"])
        part = stats.median_interval([getattr(t, phase) for t in parts])
        # Two layers and the wrapper, in each forward; the rest is the looking at the clock.
        assert part.median == pytest.approx(calls * DELAY, rel=0.01), phase
        assert total.median == pytest.approx(calls * DELAY, rel=0.01), phase


def test_the_stopwatches_own_cost_is_known_from_the_bare_model(clock):
    setup = _setup()
    bare, runner = Runner(setup, models.twin(setup.merged)), _Delayed(setup)
    zero = dict.fromkeys(attribution.HOOK_DICTS, 0.0)
    below = bare.model.forward
    bare.model.forward = lambda *args, **kwargs: _Delay()(None, None, None) or below(*args, **kwargs)
    contents = dict(vars(bare.model))
    with (
        attribution.mirroring(bare.model, runner.model, (__name__,)) as nothing,
        attribution.attributing(runner.model, (__name__,)) as ledger,
    ):
        outputs(runner, decode=False)
        outputs(bare, decode=False)
    # The clock is looked at twice a hook and four times a wrapper; what the methods take is in neither.
    assert nothing.seconds(zero) == pytest.approx(4e-6)
    assert ledger.seconds(zero) - nothing.seconds(zero) == pytest.approx(3 * DELAY)
    assert dict(vars(bare.model)) == contents
    assert not any(block._forward_hooks for block in models.blocks(bare.model))


def test_the_cost_of_calling_a_hook_is_added_for_every_call(clock):
    runner = _Delayed(_setup())
    with attribution.attributing(runner.model, (__name__,)) as ledger:
        outputs(runner, decode=False)
        free, charged = (ledger.seconds(dict.fromkeys(attribution.HOOK_DICTS, cost)) for cost in (0.0, 1.0))
    assert charged - free == pytest.approx(2.0)  # a forward hook on each of two layers


def test_attributing_leaves_the_model_as_it_was():
    runner = _Delayed(_setup())
    hooks = [dict(block._forward_hooks) for block in models.blocks(runner.model)]
    forward, original = runner.model.forward, runner.model.forward.original
    with attribution.attributing(runner.model, (__name__,)) as ledger:
        outputs(runner, decode=False)
        assert ledger.calls == {"_forward_pre_hooks": 0, "_forward_hooks": 2}
    assert [dict(block._forward_hooks) for block in models.blocks(runner.model)] == hooks
    assert runner.model.forward is forward and forward.original is original
    spent = ledger.seconds(dict.fromkeys(attribution.HOOK_DICTS, 0.0))
    outputs(runner, decode=False)
    assert ledger.seconds(dict.fromkeys(attribution.HOOK_DICTS, 0.0)) == spent


def test_other_peoples_hooks_are_not_attributed():
    runner = _Delayed(_setup())
    with attribution.attributing(runner.model, ("another.package",)) as ledger:
        outputs(runner, decode=False)
    assert ledger.seconds(dict.fromkeys(attribution.HOOK_DICTS, 1.0)) == 0.0


def test_the_cost_of_an_idle_hook_is_measured_for_both_kinds():
    costs = attribution.call_costs()
    assert set(costs) == set(attribution.HOOK_DICTS) and all(cost >= 0 for cost in costs.values())


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        a = torch.ones(256, 1024)
        b = a + 1
        del a
        c = b + 1
        return c.sum()

    assert 2 << 20 <= memory.peak_bytes(call, cuda=False) < 2.1 * (1 << 20)


class _WallMarks:
    """Marks by the wall clock, as no GPU is there to ask."""

    def __init__(self) -> None:
        self.stamps: list[list[float]] = []

    def begin(self) -> None:
        self.stamps.append([time.perf_counter()])

    def end(self) -> None:
        self.stamps[-1].append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - begin for begin, end in self.stamps]


@pytest.mark.parametrize("name", ["merged LoRA", "reft_kernels native"])
def test_a_devices_step_is_from_its_inputs_to_its_logits(name):
    runner, marks, slow = all_systems()[name].build(_setup(positions="all")), _WallMarks(), 0.02
    prepare = runner.model.prepare_inputs_for_generation

    def slowly(*args, **kwargs):
        time.sleep(slow)
        return prepare(*args, **kwargs)

    runner.model.prepare_inputs_for_generation = slowly
    inside = generation.marked_step(runner, 5, marks)
    assert len(marks.stamps) == 5 and all(len(pair) == 2 for pair in marks.stamps)
    assert inside > slow  # what the patch does before a forward is a part of it
    assert runner.model.prepare_inputs_for_generation is slowly


def test_the_hosts_time_ends_where_the_logits_are_launched():
    """What the step itself takes is in it; what comes after its logits and waiting for the device are not."""
    runner, waits = all_systems()["reft_kernels native"].build(_setup(positions="all")), []
    inside = runner.model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.02))

    def wait():
        waits.append(time.sleep(0.5))

    marks = generation.HostMarks(wait)
    host = generation.marked_step(runner, 5, marks)
    inside.remove()
    assert len(waits) == len(marks.seconds()) == 5
    assert 0.02 <= host < 0.5


def test_phases_that_only_a_gpu_has_are_refused_on_a_cpu(bench):
    for phase in ("step", "host"):
        words = ("overhead", "--device", "cpu", "--model", "tiny", "--phases", phase, "--compiled")
        status, said = bench(*words)
        assert status == 2 and f"--phases: {phase}" in said and "cpu" in said
