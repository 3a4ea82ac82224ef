"""The GPU kit's own machinery: time limits, parts that fail, the one folder. No GPU is needed for that."""

from __future__ import annotations

import importlib.util
import json
import sys
import time

import pytest
from reft_bench.gpu import kit as gpu_kit
from reft_bench.gpu.kit import Step
from reft_bench.records import record


def python(name: str, code: str, limit: float = 60) -> Step:
    return Step(name, [sys.executable, "-c", code], limit)


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    hangs = python("hangs", "import time; print('begun', flush=True); time.sleep(100)", limit=6)
    fails = python("fails", "raise SystemExit('it broke')")
    works = python("works", "print('fine')")
    begun = time.monotonic()
    gpu_kit._together([hangs, fails, works], begun + 60)
    assert time.monotonic() - begun < 30
    assert (hangs.status, fails.status, works.status) == (None, 1, 0)
    assert [step.passed for step in (hangs, fails, works)] == [False, False, True]
    assert "begun" in hangs.output and "it broke" in fails.output and "fine" in works.output
    said = capsys.readouterr().out
    assert "hangs: out of time" in said and "fails: FAILED" in said and "works: passed" in said


def test_a_tool_that_never_ran_its_program_has_not_passed() -> None:
    for says, passed in (("3 of 3 cases", True), ("no program", False)):
        step = python("tool", f"print({says!r})")
        step.must_say = "3 of 3 cases"
        step.run(time.monotonic() + 60)
        assert step.status == 0 and step.passed == passed


def test_the_sanitizers_wait_for_every_case() -> None:
    spec = importlib.util.spec_from_file_location(
        "cases", gpu_kit.ROOT / "bench" / "gpu" / "sanitize_cases.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    count = len(script.cases())
    for step in gpu_kit.sanitize_steps():
        assert step.must_say == f"{count} of {count} cases, 0 wrong results"


def test_nothing_begins_after_the_deadline() -> None:
    step = python("late", "print('ran')")
    step.run(time.monotonic() + 2)
    assert step.status is None and "not begun" in step.output


@pytest.mark.parametrize(("capability", "built"), [("9.0", "90a"), ("8.6", "80"), ("12.0", None)])
def test_built_for_the_gpu_that_is_there(capability: str, built: str | None) -> None:
    (step,) = gpu_kit.build_steps(capability)
    assert step.environment["REFT_KERNELS_BUILD_CUDA"] == "1"
    assert step.environment.get("REFT_KERNELS_CUDA_ARCHS") == built


def test_the_parts_fit_in_the_time() -> None:
    """Longest build, longest check (they run side by side), and the rest is for the benchmarks."""
    build = sum(step.limit for step in gpu_kit.build_steps("9.0"))
    checks = max(step.limit for step in [*gpu_kit.test_steps(gpu_kit.ROOT), *gpu_kit.sanitize_steps()])
    assert build + checks < gpu_kit.LIMIT - 120 and gpu_kit.LIMIT < 9 * 60


@pytest.mark.parametrize("part", ["models", "sweeps"])
def test_whole_models_fit_in_the_time(part: str) -> None:
    """After a build: their limits together are what is there, or the last of them would never be begun."""
    steps = gpu_kit.model_steps(part, gpu_kit.ROOT)
    assert steps and sum(step.limit for step in steps) < gpu_kit.LIMIT + 60


def test_runs_of_a_kind_become_one_file_with_a_report(tmp_path) -> None:
    for name, settings in (("kernels-0", {"rounds": 2}), ("kernels-1", {"rounds": 3}), ("train", {})):
        machine = {"cpu": {"model": "it", "cores": 2, "features": []}, "gpu": None, "threads": 2}
        results = record.Results(name.split("-")[0], {"rounds": 2, **settings}, machine)
        results.machine |= {"versions": {"torch": "2"}, "commit": None}
        results.note(f"note of {name}")
        folder = tmp_path / name
        folder.mkdir()
        record.save(results, folder)
    out = tmp_path / "out"
    out.mkdir()
    gpu_kit.collect(tmp_path, out)
    whole = record.load(out / "kernels.json")
    assert whole.notes == ["note of kernels-0", "note of kernels-1"] and whole.finished is None
    assert whole.settings == {"rounds": "2, 3"}
    assert record.load(out / "train.json").notes == ["note of train"]
    assert "note of kernels-1" in (out / "report.md").read_text()


def test_the_folder(tmp_path) -> None:
    """Logs are cut to their last lines; every step's status is kept."""
    steps = [python("build", "print('x' * 5_000_000)"), python("sanitizer memcheck", "print('no errors')")]
    for step in steps:
        step.run(time.monotonic() + 60)
    gpu_kit.write(tmp_path, {"gpu": "none"}, steps)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["environment.json", "log.txt", "sanitizer.txt"]
    assert (tmp_path / "log.txt").stat().st_size < 2_100_000
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert [step["status"] for step in facts["steps"]] == [0, 0]


def test_every_benchmark_is_one_that_the_command_takes(tmp_path) -> None:
    """The arguments parse, give cases, and name systems that there are."""
    from reft_bench import cli
    from reft_bench.commands import kernels as run
    from reft_bench.commands import overhead, train
    from reft_bench.systems import all_systems
    from reft_bench.systems.models import SHAPES

    steps = gpu_kit.kernel_steps(tmp_path)
    for part in ("bench", "models", "sweeps"):
        steps += gpu_kit.model_steps(part, tmp_path)
    assert len({step.command[step.command.index("--out") + 1] for step in steps}) == len(steps)
    for step in steps:
        words = step.command[step.command.index("bench") + 1 :]
        args = cli.parser(words[0]).parse_args(words)
        if words[0] == "kernels":
            assert run.cases_of(args)
            continue
        preset = train.PRESETS if words[0] == "train" else overhead.PRESETS
        model = args.model or (
            preset[args.preset]["model"] if words[0] == "train" else preset[args.preset].model
        )
        assert model in SHAPES
        if words[0] == "overhead":
            assert overhead.cases_of(args, model, "bfloat16", SHAPES[model][1])
            overhead.choose(args.systems, all_systems(), overhead.BASELINE, ())
