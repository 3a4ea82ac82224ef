"""The result schema, resuming, and comparing runs."""

from __future__ import annotations

import argparse
import copy
import csv
import json

import numpy as np
import pytest
from reft_bench.commands import compare
from reft_bench.measure import machine, session
from reft_bench.records import record
from reft_bench.records.record import CaseResult, ResultError, Results
from reft_bench.records.stats import Interval
from rich.console import Console

MACHINE = {"cpu": {"model": "m", "cores": 2, "features": []}, "gpu": None, "threads": 2, "versions": {}}


def _case(case_id: str, factor: float, seed: int = 0, width: float = 0.01) -> CaseResult:
    """A case with a baseline, its control, and a system that takes `factor` times as long."""
    rng = np.random.default_rng(seed)
    base, control, system = rng.lognormal(0, width, (3, 21))
    samples = {"base": base.tolist(), "ours": (factor * system).tolist(), "base (A/A)": control.tolist()}
    found = record.summarize(samples, "base", "base (A/A)", {"ours": 1e-7})
    return CaseResult(case_id, {"rows": 4}, "base", "base (A/A)", found, {"peer": "not installed"})


def _results(*cases: CaseResult) -> Results:
    return Results("kernels", {"rounds": 21}, copy.deepcopy(MACHINE), cases=list(cases))


def test_a_result_comes_back_as_it_was_written(tmp_path):
    results = _results(_case("a", 0.5), _case("b", 2.0))
    results.note("no CUDA here")
    results.finish()
    record.save(results, tmp_path)
    data = json.loads((tmp_path / record.FILE).read_text())
    assert (data["schema"], data["version"]) == ("reft-bench", 1)
    assert len(data["cases"][0]["systems"]["ours"]["samples"]) == 21
    assert record.load(tmp_path).to_json() == results.to_json()
    assert not list(tmp_path.glob("*.partial"))


def test_the_table_has_a_row_for_each_system_and_for_what_is_left_out(tmp_path):
    record.save(_results(_case("a", 0.5)), tmp_path)
    rows = list(csv.DictReader((tmp_path / record.TABLE).open()))
    assert [row["system"] for row in rows] == ["base", "ours", "base (A/A)", "peer"]
    assert 0.45 < float(rows[1]["ratio_low"]) < float(rows[1]["ratio_high"]) < 0.55
    assert rows[1]["verdict"] == "faster" and rows[3]["verdict"] == "left out: not installed"
    assert rows[0]["rows"] == "4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema="other"), "not a result"),
        (lambda data: data.update(version=99), "schema version 99"),
        (lambda data: data.pop("machine"), "damaged.*machine"),
        (lambda data: data["cases"][0]["systems"]["ours"].update(samples=["x"]), "damaged"),
        (lambda data: data["cases"][0]["systems"]["ours"]["time"].pop("low"), "damaged.*low"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    data = _results(_case("a", 0.5)).to_json()
    change(data)
    (tmp_path / record.FILE).write_text(json.dumps(data))
    with pytest.raises(ResultError, match=message):
        record.load(tmp_path)


def test_what_is_no_json_or_not_there_is_refused(tmp_path):
    with pytest.raises(ResultError, match="can't be read"):
        record.load(tmp_path)
    (tmp_path / record.FILE).write_text('{"schema":')
    with pytest.raises(ResultError, match="not JSON"):
        record.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match="can't be written"):
        record.prepare_folder(tmp_path / "file" / "below")


# Sessions ------------------------------------------------------------------------------------------------


class _Planned:
    def __init__(self, name: str) -> None:
        self.id, self.result_ids = name, [name]


def _session(folder, resume=False, overwrite=False, **settings) -> session.Session:
    args = argparse.Namespace(out=folder, resume=resume, overwrite=overwrite)
    return session.Session("kernels", {"rounds": 21, **settings}, "cpu", args, Console(quiet=True))


@pytest.fixture
def fixed_machine(monkeypatch):
    monkeypatch.setattr(machine, "describe", lambda device: copy.deepcopy(MACHINE))


def test_an_interrupt_keeps_what_was_measured_and_resume_goes_on(tmp_path, fixed_machine):
    asked = []

    def measure(case, tick):
        asked.append(case.id)
        if case.id == "b" and len(asked) == 2:
            raise KeyboardInterrupt
        return [_case(case.id, 1.0)]

    cases = [_Planned("a"), _Planned("b"), _Planned("c")]
    assert not _session(tmp_path).run(cases, measure, 1)
    kept = record.load(tmp_path)
    assert [case.id for case in kept.cases] == ["a"] and kept.finished is None
    assert _session(tmp_path, resume=True).run(cases, measure, 1)
    assert asked == ["a", "b", "b", "c"]
    assert [case.id for case in record.load(tmp_path).cases] == ["a", "b", "c"]
    assert record.load(tmp_path).finished is not None


def test_a_case_that_is_left_out_is_noted_and_the_rest_runs(tmp_path, fixed_machine):
    def measure(case, tick):
        if case.id == "a":
            raise session.LeftOut("40 layers are to be edited, the model has 2")
        return [_case(case.id, 1.0)]

    assert _session(tmp_path).run([_Planned("a"), _Planned("b")], measure, 1)
    results = record.load(tmp_path)
    assert [case.id for case in results.cases] == ["b"]
    assert results.notes == ["a: 40 layers are to be edited, the model has 2"]


def test_results_are_neither_overwritten_nor_mixed_by_accident(tmp_path, fixed_machine, monkeypatch):
    _session(tmp_path).run([_Planned("a")], lambda case, tick: [_case("a", 1.0)], 1)
    with pytest.raises(ResultError, match="holds results already"):
        _session(tmp_path)
    with pytest.raises(ResultError, match="seed: None then, 1 now"):
        _session(tmp_path, resume=True, seed=1)
    monkeypatch.setattr(machine, "describe", lambda device: {**MACHINE, "threads": 1})
    with pytest.raises(ResultError, match="threads: 2 then, 1 now"):
        _session(tmp_path, resume=True)
    assert _session(tmp_path, overwrite=True).results.cases == []


# Compare -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "status", "verdict"),
    [(0.5, 0, compare.SAME), (0.6, 1, compare.SLOWER), (0.51, 0, compare.SAME), (0.4, 0, compare.FASTER)],
)
def test_compare_tells_what_got_slower(bench, tmp_path, factor, status, verdict):
    found = _compared(bench, tmp_path, factor, "--change", "5%")
    assert found[0] == status and verdict in found[1]


def _compared(bench, tmp_path, factor: float, *words: str) -> tuple[int, str]:
    """Against a run with factor 0.5; the noise of both together is some 3 %."""
    for name, value, seed in (("old", 0.5, 0), ("new", factor, 1)):
        (tmp_path / name).mkdir(exist_ok=True)
        record.save(_results(_case("a", value, seed)), tmp_path / name)
    return bench("compare", tmp_path / "old", tmp_path / "new", *words)


def test_compare_says_when_noise_hides_a_change_of_the_size_asked_about(bench, tmp_path):
    status, said = _compared(bench, tmp_path, 0.5, "--change", "1%")
    assert status == compare.TOO_NOISY == 3
    assert compare.HIDDEN in said and "In 1 of 1 noise hides a change of 1.0%" in said
    assert "try a quieter machine" in said and "would show in all (--change)" in said
    status, said = _compared(bench, tmp_path, 0.5, "--change", "0.1")
    assert status == 0 and "hides a change" not in said and "0 of 1 got slower by 10.0% or more." in said


def test_something_slower_outweighs_what_noise_hides(bench, tmp_path):
    for name, values in (("old", (0.5, 0.5)), ("new", (0.6, 0.5))):
        (tmp_path / name).mkdir()
        cases = [_case(case, value, seed) for seed, (case, value) in enumerate(zip("ab", values))]
        record.save(_results(*cases), tmp_path / name)
    status, said = bench("compare", tmp_path / "old", tmp_path / "new", "--change", "1%")
    assert status == 1 and compare.HIDDEN in said and "1 of 2 got slower by 1.0% or more" in said


@pytest.mark.parametrize("size", ["0", "100%", "-1%", "much", "5"])
def test_compare_refuses_a_size_that_is_none(bench, tmp_path, size):
    status, said = _compared(bench, tmp_path, 0.5, f"--change={size}")
    assert status == 2 and "--change: must be above 0% and below 100%" in said


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((1.05, 1.03, 1.07), compare.SLOWER),
        ((1.05, 1.005, 1.07), compare.HIDDEN),  # the controls' 1 % explain its lower end
        ((1.01, 1.005, 1.015), compare.SAME),
        ((0.95, 0.93, 0.97), compare.FASTER),
        ((1.02, 0.99, 1.05), compare.HIDDEN),
    ],
)
def test_a_change_counts_where_neither_interval_nor_controls_explain_it(interval, said):
    assert compare.verdict(Interval(*interval), controls=0.01, size=0.03)[0] == said


def test_compare_allows_for_the_noise_of_both_runs(tmp_path):
    old, new = _results(_case("a", 0.5, 0)), _results(_case("a", 0.54, 1, width=0.5))
    (change,) = compare.changes(old, new, size=0.03, absolute=False)
    assert change.verdict == compare.HIDDEN and change.noise > 0.1


def test_compare_of_times_sees_a_machine_that_is_slower_as_a_whole():
    old, new = _results(_case("a", 0.5, 0)), _results(_case("a", 0.5, 1))
    for system in new.cases[0].systems.values():
        system.samples = [1.5 * sample for sample in system.samples]
    assert {c.verdict for c in compare.changes(old, new, 0.1, absolute=False)} == {compare.SAME}
    assert {c.verdict for c in compare.changes(old, new, 0.1, absolute=True)} == {compare.SLOWER}


def test_runs_without_a_case_in_common_are_an_error(bench, tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        record.save(_results(_case(name, 0.5)), tmp_path / name)
    status, said = bench("compare", tmp_path / "old", tmp_path / "new")
    assert status == 2 and "in common" in said
