"""Proves the kernels on a CUDA machine, with nothing to install and no network: python3 bench/gpu/kit.py

Builds in place, runs the tests that need a GPU, compute-sanitizer's tools, and the benchmarks, within nine
minutes. `--parts` chooses others: models (compiled decode of 8B's shape, training) and sweeps (1B and 8B
shapes, the presets paper and serving in short) take nine minutes each. A step that fails or takes too long
doesn't stop the others. One folder holds all results: $OUT where that is set, otherwise
bench/results/gpu-<name of the GPU>, with -models or -sweeps after it.

    environment.json    machine, versions, commit; exit status and seconds of each step
    log.txt             the last lines of what each step said, with the compiler's report
    junit-*.xml         tests of the native kernels, and of the other backends
    sanitizer.txt       memcheck, racecheck, initcheck and synccheck on bench/gpu/sanitize_cases.py
    kernels.json, overhead.json, models.json, sweeps.json, train.json    as `reft-bench` writes them
    report.md           their tables, and what was reached of the targets

Exit status 0 if every step passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
USUAL_PARTS = ("build", "test", "sanitize", "bench")
PARTS = (*USUAL_PARTS, "models", "sweeps")
PYTHON = sys.executable

#: Seconds from the start after which nothing more is begun or waited for.
LIMIT = 525

#: What a log may take of the folder.
LOG_BYTES = 2_000_000


@dataclasses.dataclass
class Step:
    """A command, how long it may take, and what became of it (status None: it ran out of time).

    must_say: what stands in its output if it did its work; a tool may end with 0 where its program never ran.
    """

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    must_say: str = ""
    status: int | None = None
    seconds: float = 0.0
    output: str = ""

    @property
    def passed(self) -> bool:
        return self.status == 0 and self.must_say in self.output

    def run(self, deadline: float) -> None:
        limit = min(self.limit, deadline - time.monotonic())
        if limit < 5:
            self.output = "not begun: the time was up"
            return
        print(f"{self.name} …", flush=True)
        begun = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **self.environment}
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                self.status = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own: workers go with it
                process.wait()
            log.seek(0)
            self.output = log.read()
        self.seconds = time.monotonic() - begun
        verdict = "passed" if self.passed else "out of time" if self.status is None else "FAILED"
        print(f"{self.name}: {verdict} in {self.seconds:.0f} s", flush=True)


def _together(steps: list[Step], deadline: float) -> None:
    threads = [threading.Thread(target=step.run, args=(deadline,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


#: What to build for, by the major number of a GPU's capability; of others all that setup.py knows.
ARCHITECTURES = {"8": "80", "9": "90a", "10": "100"}


def build_steps(capability: str) -> list[Step]:
    # With the lines of the sources, which the sanitizer names.
    environment = {"REFT_KERNELS_BUILD_CUDA": "1", "NVCCFLAGS": "-lineinfo"}
    if capability.split(".")[0] in ARCHITECTURES:
        environment["REFT_KERNELS_CUDA_ARCHS"] = ARCHITECTURES[capability.split(".")[0]]
    return [Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 150, environment)]


def test_steps(folder: pathlib.Path) -> list[Step]:
    """The native kernels by themselves: Triton compiles for minutes, and must not cost their result."""
    spread = ["--numprocesses", "6"] if importlib.util.find_spec("xdist") else []
    steps = []
    for name, chosen in (("native", "native"), ("others", "not native")):
        command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", chosen]
        command += [*spread, "--junitxml", str(folder / f"junit-{name}.xml"), "tests/ops", "tests/gpu"]
        command += ["tests/test_functional.py", "tests/test_functional_errors.py"]
        steps.append(Step(f"tests {name}", command, 210))
    return steps


def sanitize_steps() -> list[Step]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # Each tensor an allocation of its own, so that a step beyond its end is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [PYTHON, str(ROOT / "bench" / "gpu" / "sanitize_cases.py"), "--seconds", "110"]
    # Our kernels alone (a part of their mangled names): torch's would take most of the time.
    options = "--error-exitcode 9 --target-processes application-only --launch-timeout 0 --print-limit 20 "
    options += "--kernel-name kns=4reft4cuda"
    steps = []
    for number, check in enumerate(("memcheck", "racecheck", "initcheck", "synccheck")):
        # Side by side, they would meet at one port.
        command = [tool, "--tool", check, *options.split(), "--port", str(49152 + 100 * number)]
        if check == "memcheck":
            command += ["--report-api-errors", "no"]  # torch asks for what may fail; our launches are checked
        steps.append(
            Step(
                f"sanitizer {check}", [*command, *script], 150, environment, "24 of 24 cases, 0 wrong results"
            )
        )
    return steps


#: Arguments of `reft-bench kernels`: the rows of DESIGN's targets, then the widths and dtypes around them.
KERNELS = (
    "--rows 1 --adapters 1",
    "--rows 64 --adapters 64 --direction forward,norm",
    "--rows 256 --adapters 256",
    "--rows 4096 --adapters 1,64 --direction forward,norm,backward",
    "--rows 64 --adapters 64 --dtype float32",
    "--rows 64 --adapters 64 --rank 64",
)

_NATIVE, _FUSED, _TRITON = "reft_kernels native", "reft_kernels native fused", "reft_kernels triton"
_EVERYWHERE = "--positions all --layers all --rank 8"


def _compiled(words: str, model: str = "8b-quarter", phases: str = "step", positions: str = "all") -> str:
    """Decode with a static cache and a compiled step, at a context of 512 tokens."""
    return (
        f"overhead --model {model} --compiled --phases {phases} --positions {positions} --layers all "
        f"--rank 8 --prompt 512 --new-tokens 16 --rounds 7 {words}"
    )


#: Whole models by part: (name, arguments of `reft-bench`, systems, seconds at most), the most wanted first.
MODELS = {
    "bench": [
        (
            "overhead-1b",
            "overhead --model 1b --phases decode --batch 64 --adapters 1,64 --prompt 32 --new-tokens 16 "
            f"--rounds 5 {_EVERYWHERE}",
            [],
            90,
        ),
    ],
    "models": [
        ("models-64", _compiled("--batch 64 --adapters 1,64"), [_NATIVE, _FUSED, _TRITON], 200),
        ("models-256", _compiled("--batch 256 --adapters 256"), [_NATIVE, _FUSED], 110),
        ("models-prompt", _compiled("--batch 64 --adapters 64", positions="f3+l3"), [_NATIVE], 80),
        ("train", "train --preset full --rounds 11", [], 100),
    ],
    "sweeps": [
        (
            "sweeps-eager",
            "overhead --model 1b --phases prefill,decode --batch 8 --adapters 8 --prompt 128 "
            f"--new-tokens 16 --rounds 7 {_EVERYWHERE}",
            [_NATIVE, _FUSED, _TRITON, "reft_kernels triton fused"],
            80,
        ),
        ("sweeps-8b", _compiled("--batch 64 --adapters 64", "8b", "decode,step"), [_NATIVE], 180),
        (
            "sweeps-serving",
            "overhead --preset serving --rounds 3 --new-tokens 8 --phases decode",
            [_NATIVE, _FUSED],
            150,
        ),
        (
            "sweeps-paper",
            "overhead --preset paper --model 1b --rounds 5 --new-tokens 12",
            [_NATIVE, "eager hooks", "PEFT LoRA unmerged"],
            170,
        ),
    ],
}


def kernel_steps(scratch: pathlib.Path) -> list[Step]:
    steps = []
    for number, text in enumerate(KERNELS):
        words = text.split() if "--dtype" in text else [*text.split(), "--dtype", "bfloat16"]
        out = ["--out", str(scratch / f"kernels-{number}"), "--device", "cuda", "--rounds", "15"]
        command = [PYTHON, "-m", "bench", "kernels", *words, "--no-call-cost", *out]
        steps.append(Step(f"kernels {text}", command, 45))
    return steps


def model_steps(part: str, scratch: pathlib.Path) -> list[Step]:
    steps = []
    for name, text, systems, limit in MODELS.get(part, ()):
        command = [PYTHON, "-m", "bench", *text.split(), "--device", "cuda", "--out", str(scratch / name)]
        steps.append(Step(name, [*command, *(["--systems", ",".join(systems)] if systems else [])], limit))
    return steps


def collect(scratch: pathlib.Path, folder: pathlib.Path) -> None:
    """One file for all runs whose names begin alike, and a report of all."""
    sys.path.insert(0, str(ROOT))
    from bench.records import record

    runs: dict[str, list] = {}
    for path in sorted(scratch.iterdir()):
        if (path / record.FILE).exists():
            runs.setdefault(path.name.split("-")[0], []).append(record.load(path))
    for name, found in runs.items():
        whole = record.merged(found)
        (folder / f"{name}.json").write_text(json.dumps(whole.to_json(), indent=1) + "\n")
    if runs:  # the tables only: plots are drawn where matplotlib is, by `reft-bench report`
        command = [PYTHON, "-m", "bench", "report", str(folder), "--no-plots"]
        subprocess.run(command, cwd=ROOT, timeout=60, stdout=subprocess.DEVNULL)


def machine() -> dict:
    """In a process of its own: this one must not hold the GPU's memory."""
    code = "import json; from bench.measure.machine import describe; print(json.dumps(describe('cuda')))"
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        sys.exit(f"no CUDA device that torch can use:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def gpu_name() -> str:
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return re.sub(r"[^a-z0-9]+", "-", done.stdout.strip().lower()).strip("-") or "unknown"


def write(folder: pathlib.Path, facts: dict, steps: list[Step]) -> None:
    facts["steps"] = [
        {"name": step.name, "status": step.status, "seconds": round(step.seconds, 1)} for step in steps
    ]
    (folder / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    for file, sanitizer in (("log.txt", False), ("sanitizer.txt", True)):
        chosen = [step for step in steps if step.name.startswith("sanitizer") == sanitizer]
        share = LOG_BYTES // max(len(chosen), 1)
        texts = [f"===== {s.name}: status {s.status}\n{s.output[-share:]}\n" for s in chosen]
        if texts:
            (folder / file).write_text("\n".join(texts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", default=",".join(USUAL_PARTS), help=f"some of {','.join(PARTS)} (default: %(default)s)"
    )
    parts = parser.parse_args().parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; allowed are {', '.join(PARTS)}")
    deadline = time.monotonic() + LIMIT
    facts = machine()
    name = "-".join(["gpu", gpu_name(), *(part for part in parts if part not in USUAL_PARTS)])
    folder = pathlib.Path(os.environ.get("OUT") or ROOT / "bench" / "results" / name)
    folder.mkdir(parents=True, exist_ok=True)

    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        builds = build_steps(facts["gpu"]["capability"]) if "build" in parts else []
        # What needs no quiet machine runs side by side.
        checks = test_steps(folder) if "test" in parts else []
        checks += sanitize_steps() if "sanitize" in parts else []
        measures = kernel_steps(scratch) if "bench" in parts else []
        for part in parts:
            measures += model_steps(part, scratch)
        steps += [*builds, *checks, *measures]
        try:
            for step in builds:
                step.run(deadline)
            _together(checks, deadline)
            for step in measures:
                step.run(deadline)
            collect(scratch, folder)
        finally:
            write(folder, facts, steps)
    for step in steps:
        print(f"{'passed' if step.passed else 'FAILED':<8}{step.seconds:6.0f} s  {step.name}")
    print(f"results: {folder}")
    return 0 if all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
