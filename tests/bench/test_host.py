"""`reft-bench host`: a tiny run, and that what it tells apart is what was there."""

from __future__ import annotations

import dataclasses
import shutil
import time

import pytest
import torch
from reft_bench.commands import host
from reft_bench.records import answers, host_costs, record
from reft_bench.systems import Runner, System, Unable, models
from reft_bench.systems import host as host_systems
from reft_bench.systems.base import Point
from reft_bench.systems.host import HostSystem, Setups, all_systems

TINY = ("host", "--layers", "1,2", "--rounds", "3", "--steps", "2", "--batch", "2", "--rank", "2")
EAGER = (*TINY, "--modes", "generate,forward")
SYSTEMS = "reft_kernels idle,reft_kernels mixed,reft_kernels fused one adapter,one torch op,eager hooks"
POINT = Point(batch=2, prompt=8, rank=2, layers=2, positions="all", adapters=2)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    from reft_bench.cli import main

    folder = tmp_path_factory.mktemp("host")
    assert main([*EAGER, "--systems", SYSTEMS, "--out", str(folder)]) == 0
    return folder


def test_every_mode_and_depth_is_recorded(recorded):
    results = record.load(recorded)
    assert results.finished and results.machine["threads"] == 1
    found = [(case.params["layers"], case.params["mode"]) for case in results.cases]
    assert found == [(depth, mode) for depth in (1, 2) for mode in ("generate", "forward")]
    for case in results.cases:
        assert set(case.systems) == {"bare", "bare (A/A)", *SYSTEMS.split(",")} and not case.left_out
        mixed = case.systems["reft_kernels mixed"]
        assert len(mixed.samples) == 3 and mixed.ratio is not None and mixed.error < 1e-3
        assert mixed.extra["layer_s"]["median"] == mixed.extra["cost_s"]["median"] / case.params["layers"]


def test_the_report_has_a_table_for_each_mode_and_a_plot(recorded, bench):
    status, _ = bench("report", recorded)
    text = (recorded / "report.md").read_text()
    assert status == 0 and "## The host's time" in text
    sentences = answers.sentences(record.load(recorded))
    assert [line.split(",")[0] for line in sentences] == [
        "decode step of generate",
        "decode step in a loop of one's own",
    ]
    for line in sentences:
        assert "ReFT costs" in line and "the bare model" in line
        assert "every row of the batch with its own adapter" in line
        assert "µs a layer" in line and f"- {line}" in text.split("### ")[0]
    assert "no description" not in text
    assert text.count("### A decode step") == 2 and text.count("| reft_kernels mixed |") == 2
    assert (recorded / "host.png").read_bytes().startswith(b"\x89PNG")


def test_resume_measures_what_is_missing(recorded, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(host_systems, "COMPILE", {"fullgraph": True, "mode": None, "backend": "eager"})
    shutil.copy(recorded / record.FILE, tmp_path)
    words = (*TINY, "--compiled-layers", "1", "--systems", SYSTEMS, "--out", tmp_path, "--resume")
    status, said = bench(*words, "--modes", "generate,forward,compiled")
    assert status == 0 and "4 cases are there already" in said
    before, after = record.load(recorded), record.load(tmp_path)
    assert [case.params["mode"] for case in after.cases[4:]] == ["compiled"]
    assert [case.to_json() for case in after.cases[:4]] == [case.to_json() for case in before.cases]


# What is told apart --------------------------------------------------------------------------------------

LAYER, STEP = 1e-3, 5e-3


class _Clock:
    """Stands for time.thread_time: time passes where a delay says so, and a little for each layer."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Delayed(System):
    name = "delayed"

    def build(self, setup):
        runner = Runner(setup, models.twin(setup.original))
        for block in models.blocks(runner.model):
            block.register_forward_hook(lambda *_: _pass(LAYER))
        runner.model.register_forward_pre_hook(lambda *_: _pass(STEP))
        return runner


class _Bare(System):
    name = "bare"

    def build(self, setup):
        runner = Runner(setup, models.twin(setup.original))
        runner.model.register_forward_hook(lambda *_: _pass(1e-2))
        return runner


def _pass(seconds: float) -> None:
    time.thread_time.now += seconds


def test_the_cost_of_a_layer_and_of_a_step_are_told_apart(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "thread_time", _Clock())
    systems = [HostSystem("bare", "one", _Bare()), HostSystem("delayed", "one", _Delayed(), idle=True)]
    monkeypatch.setattr(host, "all_systems", lambda: {one.name: one for one in systems})
    status, _ = bench(*EAGER, "--layers", "1,3", "--out", tmp_path)
    assert status == 0
    for cases in host_costs.depths(record.load(tmp_path)):
        assert [case.params["layers"] for case in cases] == [1, 3]
        # The delayed model has no 10 ms of the bare one's.
        for case in cases:
            expected = STEP + case.params["layers"] * LAYER - 1e-2
            assert case.systems["delayed"].extra["cost_s"]["median"] == pytest.approx(expected)
            assert case.systems["bare (A/A)"].extra["cost_s"]["median"] == pytest.approx(0, abs=1e-9)
        step, layer = host_costs.split(cases, "delayed")
        assert step.median == pytest.approx(STEP - 1e-2) and layer.median == pytest.approx(LAYER)


def test_a_system_that_takes_long_has_fewer_steps():
    case = host.HostCase((host.GENERATE,), (2,), "float32", 64, POINT, 12)
    counts = [host._steps(case, {"generate": times}, {"generate": 1.0}) for times in (0.9, 2.0, 50.0)]
    assert counts == [12, 6, host.LEAST_STEPS]
    compiled = dataclasses.replace(case, modes=(host.COMPILED,))
    assert host._steps(compiled, {"compiled": 50.0}, {"compiled": 1.0}) == 12


def _setups() -> Setups:
    model = models.random_llama((64, 2, 128, 4, 4, 256), torch.float32, "cpu", 0)
    return Setups(model, POINT, 0, compiled=False)


@pytest.mark.parametrize("name", all_systems())
def test_every_system_is_right(name):
    system = all_systems()[name]
    reason = system.system.why_not(_setups().setups[system.kind])
    if reason is not None:
        pytest.skip(reason)
    _, error = system.build(_setups(), 3)
    assert (error is None) == (name == "bare") and (error or 0.0) < 1e-4


def test_an_idle_model_that_edits_is_not_timed():
    system = dataclasses.replace(all_systems()["reft_kernels mixed"], idle=True)
    with pytest.raises(Unable, match="wrong: idle"):
        system.build(_setups(), 3)


def test_an_idle_model_has_its_adapters_loaded():
    runner, _ = all_systems()["reft_kernels idle"].build(_setups(), 3)
    assert len(runner.model.reft.adapters) == POINT.adapters and runner.arguments() == {}


def test_a_compiled_step_says_whether_another_mix_compiles_again(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(host_systems, "COMPILE", {"fullgraph": True, "mode": None, "backend": "eager"})
    words = (*TINY, "--modes", "compiled", "--compiled-layers", "1", "--out", tmp_path)
    status, _ = bench(*words, "--systems", "reft_kernels mixed,pyreft")
    assert status == 0
    (case,) = record.load(tmp_path).cases
    assert case.systems["reft_kernels mixed"].extra["recompiles"] >= 0
    assert "recompiles" not in case.systems["bare"].extra
    assert case.left_out["pyreft"].startswith("not compiled here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modes", "odd"), "unknown 'odd'; allowed are generate, forward, compiled"),
        (("--layers", "all"), "--layers: must be integers"),
        (("--layers", "0"), "--layers: must be integers"),
        (("--steps", "0"), "--steps: must be at least 1, was 0"),
        (("--prompt", "1"), "--prompt: must be at least 2, was 1"),
        (("--width", "20"), "--width: must be a multiple of 8"),
        (("--rank", "65"), "--rank: must be at most the width 64, was 65"),
        (("--adapters", "3"), "--adapters: must be at most the batch 2, was 3"),
        (("--systems", "odd"), "unknown 'odd'"),
        (("--device", "cuda"), "--device cuda"),
    ],
)
def test_bad_input_is_a_message(bench, tmp_path, words, message):
    status, said = bench(*TINY, *words, "--out", tmp_path / "none")
    assert status == 2 and message in said
    assert not (tmp_path / "none").exists()
