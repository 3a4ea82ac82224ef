"""The GPU kit's own machinery: time limits, parts that fail, the one folder. No GPU is needed for that."""

from __future__ import annotations

import json
import sys
import time

import pytest
from reft_bench import gpu_kit, record
from reft_bench.gpu_kit import Step


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


def test_nothing_begins_after_the_deadline() -> None:
    step = python("late", "print('ran')")
    step.run(time.monotonic() + 2)
    assert step.status is None and "not begun" in step.output


def test_the_parts_fit_in_the_time() -> None:
    """Longest build, longest check (they run side by side), and the rest is for the benchmarks."""
    build = sum(step.limit for step in gpu_kit.build_steps())
    checks = max(step.limit for step in [*gpu_kit.test_steps(gpu_kit.ROOT), *gpu_kit.sanitize_steps()])
    assert build + checks < gpu_kit.LIMIT - 120 and gpu_kit.LIMIT < 9 * 60


def test_kernel_runs_become_one_file(tmp_path) -> None:
    for number in range(2):
        results = record.Results("kernels", {"rounds": 2}, {"cpu": {}})
        results.note(f"note {number}")
        results.ceilings[str(number)] = {}
        folder = tmp_path / f"kernels-{number}"
        folder.mkdir()
        record.save(results, folder)
    gpu_kit.collect(tmp_path, tmp_path)
    merged = record.load(tmp_path / "kernels.json")
    assert merged.notes == ["note 0", "note 1"] and set(merged.ceilings) == {"0", "1"}


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
    """The arguments parse, and give cases."""
    from reft_bench import cli
    from reft_bench.kernels import run

    for step in gpu_kit.bench_steps(tmp_path):
        words = step.command[step.command.index("bench") + 1 :]
        args = cli.parser(words[0]).parse_args(words)
        if words[0] == "kernels":
            assert run.cases_of(args)
