"""The rehearsal of the GPU kit: every command line is read, and stand-ins take the tools' places."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reft_bench.commands import rehearse
from reft_bench.gpu import dry as gpu_dry
from reft_bench.gpu import kit as gpu_kit
from reft_bench.gpu import plan as gpu_plan
from reft_bench.gpu import step as gpu_step
from reft_bench.gpu.step import Step
from reft_bench.records import record

#: Parts with benchmarks.
PARTS = ["bench", "models", "sweeps", "presets"]


@pytest.mark.parametrize("part", PARTS)
def test_every_benchmark_is_one_that_the_command_takes(part: str, tmp_path: Path) -> None:
    """The arguments parse, give cases, and name systems that there are."""
    steps = gpu_plan.bench_steps(part, tmp_path, tmp_path)
    assert steps and len({step.command[step.command.index("--out") + 1] for step in steps}) == len(steps)
    for step in steps:
        assert rehearse.cases(step.command[step.command.index("bench") + 1 :])


@pytest.mark.parametrize("words", ["kernels --systems nativ", "overhead --phases steps", "train --preset no"])
def test_a_benchmark_that_the_command_does_not_take_is_found_out(words: str) -> None:
    with pytest.raises((record.ResultError, SystemExit)):
        rehearse.cases(words.split())


#: One step of each kind.
FEW = """
import sys
from bench.gpu import kit, plan
def few(parts, capability, folder, scratch):
    tests = plan._pytest("native", ["-k", "native", "tests/gpu/test_graphs.py"], 1, 60, folder)
    checks = [tests, *plan.sanitize_steps(("racecheck",)), *plan.occupancy_steps()]
    return [plan.build_steps(capability), checks, plan.bench_steps("bench", folder, scratch)[:1]]
kit.phases_of = few
sys.exit(kit.main(["--dry"]))
"""


def test_the_first_part_has_every_kind_of_call(tmp_path: Path) -> None:
    """Of what is to be seen in four minutes; each by tests that there are."""
    both = ["launches", "graphs", "elementwise_and_sums", "serving_steps", "models"]
    kinds = {
        "tests first native": [
            *both,
            "ways",
            "forward",
            "norm",
            "invariance",
            "backward",
            "sum",
            "scale_shift",
        ],
        "tests first triton": both,
    }
    steps = {step.name: step for step in gpu_plan.first_steps(tmp_path)}
    for name, wanted in kinds.items():
        files = [word.partition("::") for word in steps[name].command if word.startswith("tests/")]
        found = {Path(file).stem.removeprefix("test_") for file, _, _ in files}
        assert found == {*wanted}
        for file, _, test in files:
            assert f"def {test}(" in (gpu_step.ROOT / file).read_text() or not test


def _rehearse(tmp_path: Path, *words: str) -> dict:
    """Runs the kit with stand-ins; returns what it wrote of itself, after every step has passed."""
    variables = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(gpu_step.ROOT)}
    done = subprocess.run(
        [sys.executable, *words], env=variables, cwd=gpu_step.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert {step["verdict"] for step in facts["steps"]} == {"passed"} and facts["gpu"] == gpu_dry.GPU
    return facts


def test_a_step_of_each_kind_with_stand_ins_for_its_tools(tmp_path: Path) -> None:
    """From start to end: command lines are read, every step passes, every result is there."""
    facts = _rehearse(tmp_path, "-c", FEW)
    names = [step["name"] for step in facts["steps"]]
    assert names == ["build", "tests native", "sanitizer racecheck", "occupancy", "kernels-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "environment.json",
        "junit-native.xml",
        "kernels.json",
        "log.txt",
        "report.md",
        "sanitizer.txt",
    ]
    assert "tests/gpu/test_graphs.py" in (tmp_path / "junit-native.xml").read_text()
    (case,) = record.load(tmp_path / "kernels.json").cases
    assert "native" in case.systems and "would measure" in (tmp_path / "log.txt").read_text()
    assert "29 of 29 cases, 0 wrong results" in (tmp_path / "sanitizer.txt").read_text()


@pytest.mark.slow
def test_the_whole_kit_with_stand_ins_for_its_tools(tmp_path: Path) -> None:
    """From start to end: every command line is read, every step passes, every result is there."""
    facts = _rehearse(tmp_path, "-m", "bench.gpu.kit", "--dry")
    phases = gpu_kit.phases_of(gpu_plan.USUAL_PARTS, "9.0", tmp_path, tmp_path)
    assert [step["name"] for step in facts["steps"]] == [step.name for phase in phases for step in phase]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "environment.json",
        "junit-native.xml",
        "junit-others.xml",
        "kernels.json",
        "log.txt",
        "overhead.json",
        "report.md",
        "sanitizer.txt",
    ]
    for name in ("native", "others"):
        report = (tmp_path / f"junit-{name}.xml").read_text()
        assert "tests/gpu/test_launches.py" in report and "tests/ops/test_forward.py" in report
    log = (tmp_path / "log.txt").read_text()
    assert log.count("would measure") == sum(
        len(rehearse.cases(step.command[step.command.index("bench") + 1 :]))
        for step in gpu_plan.bench_steps("bench", tmp_path, tmp_path)
    )
    assert "29 of 29 cases, 0 wrong results\n" in (tmp_path / "sanitizer.txt").read_text()


def test_a_step_of_a_rehearsal_can_fail(tmp_path: Path) -> None:
    """What the tool would refuse, or what is not there, is found out."""
    tool = ["compute-sanitizer", "--tool", "memchek", sys.executable]
    test = gpu_plan._pytest("it", ["tests/gpu/test_that_is_gone.py"], 1, 60, tmp_path)
    steps = [Step("tool", tool, 60), test, Step("nobody's", ["nsys", "profile"], 60)]
    rehearsed = [gpu_dry.rehearsed(step) for step in steps]
    gpu_step.together(rehearsed, time.monotonic() + gpu_dry.WHOLE, lambda: None)
    assert [step.verdict for step in rehearsed] == ["FAILED"] * 3
    assert "invalid choice: 'memchek'" in rehearsed[0].output and "no stand-in" in rehearsed[2].output
