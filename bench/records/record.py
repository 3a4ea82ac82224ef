"""Results on disk: one JSON schema with a version, every sample in it, and a CSV of the summary.

A file `results.json` lies in a folder of its own:

    schema, version    "reft-bench", 1
    command, settings  what was run, with every setting that a number depends on
    machine            see measure/machine.py
    started, finished  UTC, ISO 8601; `finished` is null until the run is complete
    ceilings           rates measured in the same run (bytes/s, operations/s, seconds)
    notes              what was left out of the whole run, and why
    cases              a list of: id, params, baseline, control, systems, left_out, floor
    cases[].systems    name → samples (seconds a call, paired by round), time, ratio, verdict, error, extra

Intervals are {median, low, high} at 95%; `time` in seconds, `ratio` over the baseline of the same case.
`error` is the distance to the reference's output over the size of the edit that the reference makes.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import stats
from .stats import Interval

SCHEMA, VERSION = "reft-bench", 1
FILE, TABLE = "results.json", "results.csv"

#: Files that hold results: a run's own, and those into which the GPU kit puts several runs each.
FILES = (FILE, "kernels.json", "overhead.json", "models.json", "sweeps.json", "train.json")


class ResultError(ValueError):
    """A result file that can't be read, written or gone on with; the message says what to do."""


@dataclasses.dataclass
class SystemResult:
    """One system in one case; see the module's docstring."""

    samples: list[float]
    time: Interval
    ratio: Interval | None = None
    verdict: str | None = None
    error: float | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SystemResult:
        ratio = data["ratio"]
        return cls(
            samples=[float(sample) for sample in data["samples"]],
            time=Interval.from_json(data["time"]),
            ratio=None if ratio is None else Interval.from_json(ratio),
            verdict=data["verdict"],
            error=data["error"],
            extra=dict(data["extra"]),
        )


@dataclasses.dataclass
class CaseResult:
    """All systems in one case; see the module's docstring."""

    id: str
    params: dict[str, Any]
    baseline: str
    control: str
    systems: dict[str, SystemResult]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    floor: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        data = dict(vars(self))
        data["systems"] = {name: system.to_json() for name, system in self.systems.items()}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CaseResult:
        systems = {name: SystemResult.from_json(system) for name, system in data["systems"].items()}
        return cls(**{**data, "systems": systems})


def summarize(
    samples: dict[str, list[float]], baseline: str, control: str, errors: dict[str, float | None]
) -> dict[str, SystemResult]:
    """Samples of a case → results with intervals, paired ratios and verdicts against the A/A control."""
    against = stats.paired_ratio(samples[control], samples[baseline]) if baseline in samples else None
    results = {}
    for name, taken in samples.items():
        result = SystemResult(list(taken), stats.median_interval(taken), error=errors.get(name))
        if against is not None and name != baseline:
            result.ratio = stats.paired_ratio(taken, samples[baseline])
            result.verdict = stats.verdict(result.ratio, against)
        results[name] = result
    return results


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclasses.dataclass
class Results:
    """A run; see the module's docstring."""

    command: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    started: str = dataclasses.field(default_factory=_now)
    finished: str | None = None
    ceilings: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    cases: list[CaseResult] = dataclasses.field(default_factory=list)

    def case(self, case_id: str) -> CaseResult | None:
        return next((case for case in self.cases if case.id == case_id), None)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def finish(self) -> None:
        self.finished = _now()

    def to_json(self) -> dict[str, Any]:
        fields = dict(vars(self))
        fields["cases"] = [case.to_json() for case in self.cases]
        return {"schema": SCHEMA, "version": VERSION, **fields}

    @classmethod
    def from_json(cls, data: Any, source: str) -> Results:
        """Raises ResultError for another schema or version, or where a field is missing or mistyped."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ResultError(f"{source}: not a result of reft-bench")
        if data.get("version") != VERSION:
            raise ResultError(f"{source}: schema version {data.get('version')}, but {VERSION} is read here")
        try:
            fields = {field.name: data[field.name] for field in dataclasses.fields(cls)}
            fields["cases"] = [CaseResult.from_json(case) for case in fields["cases"]]
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ResultError(f"{source}: damaged result file: {type(error).__name__}: {error}") from error


def load(path: Path | str) -> Results:
    """Reads a folder's results.json, or such a file. Raises ResultError."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    try:
        return Results.from_json(json.loads(file.read_text()), str(file))
    except OSError as error:
        raise ResultError(f"{file}: can't be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ResultError(f"{file}: not JSON: {error}") from error


def find(folder: Path | str) -> list[Path]:
    """All result files in a folder and below, sorted. Raises ResultError if there are none."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    files = sorted(path for path in folder.rglob("*.json") if path.name in FILES)
    if not files:
        raise ResultError(f"{folder}: no {FILE} in it or below")
    return files


def prepare_folder(folder: Path) -> None:
    """Makes the folder and checks that files can be written into it. Raises ResultError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResultError(f"--out {folder}: can't be written to: {error.strerror}") from error


def _atomically(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def save(results: Results, folder: Path) -> None:
    """Writes results.json and results.csv; a reader never sees half of one."""
    _atomically(folder / FILE, json.dumps(results.to_json(), indent=1, sort_keys=False) + "\n")
    rows = table(results)
    partial = folder / (TABLE + ".partial")
    with partial.open("w", newline="") as stream:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, folder / TABLE)


def table(results: Results) -> list[dict[str, Any]]:
    """One flat row for each system of each case, as in the CSV; times in seconds."""
    rows = []
    for case in results.cases:
        for name, system in case.systems.items():
            row: dict[str, Any] = {"case": case.id, **case.params, "system": name}
            row |= {
                "time_s": system.time.median,
                "time_low_s": system.time.low,
                "time_high_s": system.time.high,
            }
            if system.ratio is not None:
                ratio = system.ratio
                row |= {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}
                row |= {"verdict": system.verdict}
            row |= {"error": system.error, "samples": len(system.samples)}
            for key, value in system.extra.items():
                if isinstance(value, dict) and set(value) == {"median", "low", "high"}:
                    row |= {key: value["median"], f"{key}_low": value["low"], f"{key}_high": value["high"]}
                else:
                    row[key] = value
            rows.append(row)
        for name, reason in case.left_out.items():
            rows.append({"case": case.id, **case.params, "system": name, "verdict": f"left out: {reason}"})
    return rows


def merged(runs: Sequence[Results]) -> Results:
    """Runs of one command on one machine as one: all cases, and of the settings what stands in any."""
    first = runs[0]
    settings = {
        name: (
            values[0]
            if all(value == values[0] for value in values)
            else ", ".join(dict.fromkeys(map(str, values)))
        )
        for name in first.settings
        if (values := [run.settings[name] for run in runs if name in run.settings])
    }
    whole = Results(first.command, settings, first.machine, first.started)
    whole.finished = max(run.finished for run in runs) if all(run.finished for run in runs) else None
    for run in runs:
        whole.cases += run.cases
        whole.ceilings |= run.ceilings
        for note in run.notes:
            whole.note(note)
    return whole


#: What must be the same for a run to go on where another stopped.
SAME_RUN: Sequence[str] = ("command", "settings", "machine")


def resumed(old: Results, new: Results, source: str) -> Results:
    """`old`, to be gone on with, if it was made with the settings, machine and versions of `new`.

    Raises ResultError that names the first difference.
    """
    for part in SAME_RUN:
        before, after = getattr(old, part), getattr(new, part)
        if before != after:
            raise ResultError(
                f"--resume: {source} was made with another {part} ({_first_difference(before, after)}); "
                "its numbers can't stand beside new ones. Give another --out, or --overwrite it"
            )
    old.finished = None
    return old


def _first_difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            if before.get(key) != after.get(key):
                return f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
    return f"{before!r} then, {after!r} now"
