"""The GPU kit's own machinery: time limits, steps that fail, results that are kept. No GPU is needed here."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from reft_bench.gpu import checks as gpu_checks
from reft_bench.gpu import kit as gpu_kit
from reft_bench.gpu import plan as gpu_plan
from reft_bench.gpu import step as gpu_step
from reft_bench.gpu.step import Step
from reft_bench.records import record

NOT_YET = threading.Event()


@pytest.fixture(autouse=True)
def interrupts():
    """As the kit's main has it: a test run in the background ignores SIGINT, and so would its children."""
    before = signal.getsignal(signal.SIGINT)
    gpu_step.heed_interrupts()
    yield
    signal.signal(signal.SIGINT, before)


def python(name: str, code: str, limit: float = 60, **more) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, **more)


def run(*steps: Step, seconds: float = 60, keep=lambda: None) -> None:
    gpu_step.together(steps, time.monotonic() + seconds, keep)


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    hangs = python("hangs", "import time; print('begun', flush=True); time.sleep(100)", limit=6)
    fails = python("fails", "raise SystemExit('it broke')")
    works = python("works", "print('fine')")
    nowhere = Step("nowhere", ["/no/such/tool"], 60)
    begun = time.monotonic()
    run(hangs, fails, works, nowhere)
    assert time.monotonic() - begun < 30
    assert [step.verdict for step in (hangs, fails, works, nowhere)] == [
        "out of time",
        "FAILED",
        "passed",
        "FAILED",
    ]
    assert "begun" in hangs.output and "it broke" in fails.output and "fine" in works.output
    assert "No such file" in nowhere.why
    said = capsys.readouterr().out
    assert "hangs: out of time" in said and "fails: FAILED" in said and "works: passed" in said


def test_nothing_begins_after_the_deadline() -> None:
    step = python("late", "print('ran')")
    run(step, seconds=2)
    assert step.verdict == "not begun" and not step.output


SLOW_TESTS = """
import time, pytest
def test_quick(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.mark.parametrize("number", range(100))
def test_slow(number): time.sleep(0.2)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_tests_that_run_out_of_time_leave_their_report(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: list[str],
) -> None:
    """SIGINT before SIGKILL: the JUnit file is there. And the failure is shown long before the end."""
    monkeypatch.setattr(gpu_step, "GRACE", 90)  # a busy machine may take its time
    (tmp_path / "test_slow.py").write_text(SLOW_TESTS)
    report = tmp_path / "junit.xml"
    words = [
        "-v",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.gpu.pytest_plugin",
        f"--junitxml={report}",
        *workers,
    ]
    words += ["--rootdir", str(tmp_path), str(tmp_path)]
    step = Step("tests", [sys.executable, "-m", "pytest", *words], 100)

    def end_it() -> None:
        if "test_slow[4]" in step.output:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        gpu_step.together([step], time.monotonic() + 100, end_it, every=0.1)
    assert step.verdict == "out of time" and "took no SIGINT" not in step.why
    text = report.read_text()
    assert 'failures="1"' in text and "test_slow[0]" in text
    assert "PASSED" in step.output and "test_slow[0]" in step.output
    said = capsys.readouterr().out
    assert "tests: ! FAILED (call)" in said and "one is not two" in said
    lines = [line for line in step.lines if "one is not two" in line or "test_slow[2]" in line]
    assert lines[0].startswith("! ")  # before tests that came later


def test_what_heeds_no_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "GRACE", 1)
    step = python(
        "deaf", "import signal, time; signal.signal(2, signal.SIG_IGN); print(1); time.sleep(99)", 5
    )
    run(step, seconds=30)
    assert step.verdict == "out of time" and "it took no SIGINT" in step.why and "1" in step.output


def test_what_a_step_leaves_behind_is_ended() -> None:
    """A worker that holds the output open would otherwise keep the kit waiting."""
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid)"
    step = python("parent", code)
    begun = time.monotonic()
    run(step)
    assert step.passed and time.monotonic() - begun < 30
    time.sleep(0.2)
    state = Path(f"/proc/{int(step.output)}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_every_command_finds_cudas_tools_and_compiles_in_two_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """nvcc and ninja beside Python or in /usr/local/cuda/bin, and nothing hides what is on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (step,) = gpu_plan.build_steps("9.0")
    code = "import os; print(os.environ['PATH'], os.environ['TORCHINDUCTOR_COMPILE_THREADS'])"
    shown = python("path", code, environment=step.environment)
    run(shown)
    path, threads = shown.output.split()
    assert path.split(os.pathsep) == [str(tmp_path), str(Path(sys.executable).parent), "/usr/local/cuda/bin"]
    assert threads == "2"


JUNIT = '<testsuite><testcase name="a">{}</testcase><testcase name="b">{}</testcase></testsuite>'
SKIP = '<skipped message="{}"/>'


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ("", SKIP.format("one GPU only"), ""),
        (SKIP.format("one GPU only"), SKIP.format("needs 13 GB"), "nothing ran: every test was skipped"),
        (
            "",
            SKIP.format("native on cuda: reft_kernels_cuda.so was not built"),
            "a test was skipped: native on cuda: reft_kernels_cuda.so was not built",
        ),
        (
            "",
            SKIP.format("triton: Triton is not installed"),
            "a test was skipped: triton: Triton is not inst",
        ),
    ],
)
def test_tests_that_did_not_run_have_not_passed(tmp_path: Path, first: str, second: str, why: str) -> None:
    report = tmp_path / "junit.xml"
    report.write_text(JUNIT.format(first, second))
    step = python("tests", "print('2 passed')", check=gpu_checks.tests_ran(report))
    run(step)
    assert step.status == 0 and step.passed == (not why)
    assert step.why.startswith(why) and bool(step.why) == bool(why)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU every test of one is skipped")
def test_this_machines_skips_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "_has", lambda module: False)
    step = gpu_plan._pytest("it", ["tests/gpu/test_graphs.py"], 1, 100, tmp_path)
    run(step, seconds=100)
    assert step.verdict == "FAILED" and "every test was skipped" in step.why


def test_a_tool_that_never_ran_its_program_has_not_passed() -> None:
    for says, passed in (("3 of 3 cases", True), ("no program", False)):
        step = python("tool", f"print({says!r})", check=gpu_checks.says("3 of 3 cases"))
        run(step)
        assert step.status == 0 and step.passed == passed


def test_a_build_without_a_library_has_not_passed(tmp_path: Path) -> None:
    step = python("build", "print('built')", check=gpu_checks.built(tmp_path / "it.so"))
    run(step)
    assert not step.passed and "it.so is not there" in step.why


def _results(cases: list[record.CaseResult], notes: tuple[str, ...] = ()) -> record.Results:
    machine = {"cpu": {"model": "it", "cores": 2, "features": []}, "gpu": None, "threads": 2}
    results = record.Results("kernels", {"rounds": 2}, machine | {"versions": {"torch": "2"}, "commit": None})
    results.cases += cases
    for note in notes:
        results.note(note)
    return results


@pytest.mark.parametrize(
    ("left_out", "why"),
    [
        ({}, ""),
        ({"vllm": "is not installed", "reference": "reads the plan back"}, ""),
        ({"native": "wrong: error 2"}, "case: native: wrong: error 2"),
        ({"reft_kernels triton fused": "failed: it broke"}, "case: reft_kernels triton fused: failed"),
        (None, "nothing was measured: the baseline broke"),
    ],
)
def test_a_benchmark_that_left_our_kernels_out_has_not_passed(tmp_path: Path, left_out, why: str) -> None:
    cases = [] if left_out is None else [record.CaseResult("case", {}, "base", "base (A/A)", {}, left_out)]
    record.save(_results(cases, ("the baseline broke",)), tmp_path)
    step = python("bench", "", check=gpu_checks.measured(tmp_path))
    run(step)
    assert step.passed == (not why) and step.why.startswith(why)


def test_the_sanitizers_wait_for_every_case() -> None:
    spec = importlib.util.spec_from_file_location(
        "cases", gpu_step.ROOT / "bench" / "gpu" / "sanitize_cases.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert len(script.cases()) == gpu_plan.CASES
    for step in gpu_plan.sanitize_steps():
        step.lines = [f"{gpu_plan.CASES - 1} of {gpu_plan.CASES} cases, 0 wrong results"]
        assert step.check(step)


@pytest.mark.parametrize(("capability", "built"), [("9.0", "90a"), ("8.6", "80"), ("12.0", None), ("", None)])
def test_built_for_the_gpu_that_is_there(capability: str, built: str | None) -> None:
    (step,) = gpu_plan.build_steps(capability)
    assert step.environment["REFT_KERNELS_BUILD_CUDA"] == "1"
    assert step.environment.get("REFT_KERNELS_CUDA_ARCHS") == built


def test_a_machine_that_is_slow_to_import_torch_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A cold disk takes minutes; and beyond them the kit goes on without the facts."""
    assert gpu_plan.IMPORT >= 240
    says = [sys.executable, "-c", 'print(\'{"gpu": {"name": "it", "capability": "9.0"}}\')']
    assert gpu_kit.machine(says) == {"gpu": {"name": "it", "capability": "9.0"}}
    facts = gpu_kit.machine([sys.executable, "-c", "import time; time.sleep(60)"], limit=1)
    assert facts["gpu"]["name"] == "unknown" and "not described within 1 s" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_kit.machine([sys.executable, "-c", "raise SystemExit('no driver')"])


def test_runs_of_a_kind_become_one_file_with_a_report(tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    folder = gpu_kit.Folder(out, scratch, {"gpu": "none"}, [])
    for name, note in (("kernels-0", "first"), ("kernels-1", "second"), ("train", "third")):
        results = _results([], (f"note of {note}",))
        results.command = name.split("-")[0]
        (scratch / name).mkdir(parents=True)
        record.save(results, scratch / name)
        folder.keep()  # after every step, and while one runs
    folder.report()
    whole = record.load(out / "kernels.json")
    assert whole.notes == ["note of first", "note of second"] and whole.finished is None
    assert record.load(out / "train.json").notes == ["note of third"]
    assert "note of second" in (out / "report.md").read_text()


def test_the_folder(tmp_path: Path) -> None:
    """Logs are cut to their last lines; every step's verdict is kept; an earlier run's files are gone."""
    report = tmp_path / "junit-it.xml"
    report.write_text("of an earlier run")
    steps = [
        python("build", "print('x' * 5_000_000)", writes=(report,)),
        python("sanitizer memcheck", "print('no errors')"),
        python("later", ""),
    ]
    folder = gpu_kit.Folder(tmp_path, tmp_path / "scratch", {"gpu": "none"}, steps)
    run(*steps[:2], keep=folder.keep)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["environment.json", "log.txt", "sanitizer.txt"]
    assert (tmp_path / "log.txt").stat().st_size < 2_100_000
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert [step["verdict"] for step in facts["steps"]] == ["passed", "passed", "waiting"]


ENDED = """
import sys, tempfile, pathlib, signal, threading, os
from bench.gpu import kit as gpu_kit
from bench.gpu import step as gpu_step
gpu_kit.machine = lambda: {"gpu": {"name": "it", "capability": "9.0"}}
code = "import time; print('said before the end', flush=True); time.sleep(100)"
step = gpu_step.Step("hangs", [sys.executable, "-c", code], 100)
gpu_kit.phases_of = lambda *_: [[step], [gpu_step.Step("later", [], 9)]]
together = gpu_kit.together
gpu_kit.together = lambda *words: together(*words, every=0.2)
sys.exit(gpu_kit.main([]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=str)
def test_what_ends_the_kit_early_loses_nothing(tmp_path: Path, number: int) -> None:
    variables = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": str(gpu_step.ROOT)}
    kit = subprocess.Popen(
        [sys.executable, "-c", ENDED], env=variables, cwd=gpu_step.ROOT, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "log.txt"
    end = time.monotonic() + 60
    while not (log.exists() and "said before" in log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    kit.send_signal(number)
    assert kit.wait(60) != 0
    assert "said before the end" in log.read_text()
    steps = json.loads((tmp_path / "environment.json").read_text())["steps"]
    assert [step["name"] for step in steps] == ["hangs", "later"]
    assert steps[0]["verdict"] == ("running" if number == signal.SIGKILL else "out of time")


#: What the Makefile's targets run.
RUNS = ["build,first", "build,test,sanitize,bench", "build,models", "build,sweeps", "build,presets"]


@pytest.mark.parametrize("words", RUNS)
def test_the_limits_of_a_run_add_up(words: str, tmp_path: Path) -> None:
    """Each step gets its whole limit, in under nine minutes (four for the first) with what comes after."""
    parts = words.split(",")
    phases = gpu_kit.phases_of(parts, "9.0", tmp_path, tmp_path)
    limits = sum(max(step.limit for step in phase) for phase in phases)
    assert limits and gpu_plan.USUAL_IMPORT + limits <= gpu_plan.working_time(parts)
    after = gpu_step.GRACE + (gpu_plan.REPORT if "first" not in parts else 0)
    assert gpu_plan.working_time(parts) + after < (4 if "first" in parts else 9) * 60


@pytest.mark.parametrize("words", RUNS)
def test_the_folder_of_a_run_has_at_most_eight_files(words: str, tmp_path: Path) -> None:
    phases = gpu_kit.phases_of(words.split(","), "9.0", tmp_path, tmp_path)
    steps = [step for phase in phases for step in phase]
    files = {file.name for step in steps for file in step.writes} | {"environment.json", "log.txt"}
    files |= {"sanitizer.txt"} if any(step.name.startswith("sanitizer") for step in steps) else set()
    files |= {"report.md"} if any(file.endswith(".json") for file in files - {"environment.json"}) else set()
    assert len(files) <= 8
    assert {file for file in files if file.endswith(".json")} <= {"environment.json", *record.FILES}
