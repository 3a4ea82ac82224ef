"""Proves the kernels on a CUDA machine, with nothing to install and no network: python3 -m bench.gpu.kit

Builds in place, runs the tests that need a GPU, compute-sanitizer's tools, and the benchmarks, within nine
minutes. `--parts` chooses others; build,first tells within four whether the kernels are right, and models,
sweeps and presets (whole models) take nine each. A step that fails or takes too long doesn't stop the others.
One folder holds all results: $OUT where that is set, otherwise bench/results/gpu-<name of the GPU>, with the
parts that are not of the usual run after it. It is written every few seconds, so that whatever ends the kit
loses no more than that.

    environment.json    machine, versions, commit; verdict, reason and seconds of each step
    log.txt             the last lines of what each step said, with the compiler's report
    junit-*.xml         tests of the native kernels, and of the other backends
    sanitizer.txt       memcheck, racecheck, initcheck and synccheck on bench/gpu/sanitize_cases.py
    kernels.json, overhead.json, models.json, sweeps.json, train.json    as `reft-bench` writes them
    report.md           their tables, and what was reached of the targets

Exit status 0 if every step passed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from ..records import record
from . import dry, plan
from .plan import PARTS, PYTHON, USUAL_PARTS
from .step import ROOT, Step, environment, heed_interrupts, together

#: What a log may take of the folder.
LOG_BYTES = 2_000_000


class Folder:
    """The results of a run.

    Args:
        scratch: where each benchmark writes a folder of its own.
    """

    def __init__(self, path: pathlib.Path, scratch: pathlib.Path, facts: dict, steps: list[Step]) -> None:
        self.path, self.scratch, self.facts, self.steps = path, scratch, facts, steps
        self._collected: dict[str, list[tuple[str, int]]] = {}
        path.mkdir(parents=True, exist_ok=True)
        for step in steps:
            for file in step.writes:  # what an earlier run left would be taken for this one's
                file.unlink(missing_ok=True)

    def keep(self) -> None:
        """Writes what there is by now."""
        self.facts["steps"] = [
            {
                "name": step.name,
                "verdict": step.verdict,
                "why": step.why,
                "status": step.status,
                "seconds": round(step.seconds, 1),
            }
            for step in self.steps
        ]
        self._write("environment.json", json.dumps(self.facts, indent=1) + "\n")
        for file, sanitizer in (("log.txt", False), ("sanitizer.txt", True)):
            chosen = [step for step in self.steps if step.name.startswith("sanitizer") == sanitizer]
            share = LOG_BYTES // max(len(chosen), 1)
            texts = [f"===== {s.name}: {s.verdict} {s.why}\n{s.output[-share:]}\n" for s in chosen]
            if texts:
                self._write(file, "\n".join(texts))
        self._collect()

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f".{name}.partial"
        partial.write_text(text)
        os.replace(partial, self.path / name)

    def _collect(self) -> None:
        """One file for all benchmarks whose names begin alike; what they have measured by now."""
        found: dict[str, list[tuple[str, int]]] = {}
        for path in sorted(self.scratch.glob(f"*/{record.FILE}")):
            name = path.parent.name.split("-")[0]
            found.setdefault(name, []).append((str(path), path.stat().st_mtime_ns))
        for name, files in found.items():
            if self._collected.get(name) != files:
                whole = record.merged([record.load(path) for path, _ in files])
                self._write(f"{name}.json", json.dumps(whole.to_json(), indent=1) + "\n")
                self._collected[name] = files

    def report(self) -> None:
        """The tables only: plots are drawn where matplotlib is, by `reft-bench report`."""
        if not self._collected:
            return
        command = [PYTHON, "-m", "bench", "report", str(self.path), "--no-plots"]
        try:
            subprocess.run(
                command, cwd=ROOT, env=environment(), timeout=plan.REPORT, stdout=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            print("no report.md: it took too long; `reft-bench report` makes it of this folder", flush=True)


DESCRIBE = "import json; from bench.measure.machine import describe; print(json.dumps(describe('cuda')))"


def machine(command: Sequence[str] = (PYTHON, "-c", DESCRIBE), limit: float = plan.IMPORT) -> dict:
    """Facts about the machine, from a process of its own: this one must not hold the GPU's memory.

    Where that takes too long, next to nothing: the steps may fare better, since their files are then at hand.
    """
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        print(f"the machine was not described within {limit:.0f} s; going on", flush=True)
        return {"gpu": {"name": "unknown", "capability": ""}, "error": f"not described within {limit:.0f} s"}
    if done.returncode:
        sys.exit(f"no CUDA device that torch can use:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def phases_of(
    parts: Sequence[str], capability: str, folder: pathlib.Path, scratch: pathlib.Path
) -> list[list[Step]]:
    """Steps of one phase run side by side, the phases one after another. What measures runs alone."""
    phases = [plan.build_steps(capability)] if "build" in parts else []
    if "first" in parts:
        phases.append(plan.first_steps(folder))
    checks = plan.test_steps(folder) if "test" in parts else []
    checks += plan.sanitize_steps() if "sanitize" in parts else []
    phases.append(checks)
    for part in parts:
        phases += [[step] for step in plan.bench_steps(part, folder, scratch)]
    return [phase for phase in phases if phase]


def _arguments(argv: Sequence[str] | None) -> tuple[list[str], bool]:
    """The parts, and whether this is a rehearsal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parts", default=",".join(USUAL_PARTS), help=f"some of {','.join(PARTS)} (default: %(default)s)"
    )
    parser.add_argument("--dry", action="store_true", help="a rehearsal without a GPU (bench/gpu/dry.py)")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; allowed are {', '.join(PARTS)}")
    return parts, args.dry


def _ended(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    parts, rehearsal = _arguments(argv)
    heed_interrupts()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    facts = machine((PYTHON, "-m", dry.MODULE, "machine"), dry.WHOLE) if rehearsal else machine()
    name = "-".join(["gpu", _slug(facts["gpu"]["name"]), *(p for p in parts if p not in USUAL_PARTS)])
    place = ROOT / "build" / "gpu-dry" if rehearsal else ROOT / "bench" / "results"
    path = pathlib.Path(os.environ.get("OUT") or place / name)
    facts["seconds_to_describe"] = round(time.monotonic() - begun, 1)
    with tempfile.TemporaryDirectory() as scratch:
        phases = phases_of(parts, facts["gpu"]["capability"], path, pathlib.Path(scratch))
        if rehearsal:
            phases = [[dry.rehearsed(step) for step in phase] for phase in phases]
        steps = [step for phase in phases for step in phase]
        folder = Folder(path, pathlib.Path(scratch), facts, steps)
        folder.keep()
        for phase in phases:
            seconds = dry.WHOLE if rehearsal else plan.working_time(parts)
            together(phase, begun + seconds, folder.keep)
        folder.report()
    for step in steps:
        print(f"{step.verdict:<12}{step.seconds:6.0f} s  {step.name}  {step.why}")
    print(f"results: {path}")
    return 0 if all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
