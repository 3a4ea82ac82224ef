"""The paper's sweeps: the cases of the preset for a CPU, and the figure of four panels."""

from __future__ import annotations

import argparse

import pytest
from reft_bench import overhead, paper_plots, plots, record
from reft_bench.presets import AXES, PRESETS
from reft_bench.record import CaseResult, Results

ROUNDS = 5


def _cases() -> list[overhead.OverheadCase]:
    given = dict.fromkeys(AXES) | {"preset": "paper-cpu", "phases": None, "new_tokens": None}
    return overhead.cases_of(argparse.Namespace(**given, compiled=False), "llama-512x8", "float32", 8)


def _measured(case: overhead.OverheadCase) -> CaseResult:
    """Made-up samples: this package costs 1% at rank 1 and rank / 10 % more; the hooks fifty times that."""
    percent = 1 + case.point.rank / 10
    samples = {
        name: [1.0 + round * 1e-3 + share for round in range(ROUNDS)]
        for name, share in (
            ("merged LoRA", 0.0),
            ("merged LoRA (A/A)", 0.001),
            ("reft_kernels native", percent / 100),
            ("eager hooks", percent / 2),
        )
    }
    systems = record.summarize(samples, "merged LoRA", "merged LoRA (A/A)", {})
    share = {"median": percent / 100, "low": percent / 200, "high": percent / 50}
    systems["reft_kernels native"].extra["attributed_share"] = share
    (phase,) = case.phases
    return CaseResult(case.result_id(phase), case.params(phase), "merged LoRA", "merged LoRA (A/A)", systems)


@pytest.fixture
def results() -> Results:
    facts = {"cpu": {"model": "a CPU", "cores": 2, "features": []}, "gpu": None, "threads": 2}
    machine = {**facts, "versions": {}, "commit": None}
    made = Results("overhead", {"rounds": ROUNDS, "model": "llama-512x8"}, machine)
    made.cases = [_measured(case) for case in _cases()]
    return made


def test_the_preset_sweeps_all_four_axes():
    cases = _cases()
    assert len(cases) == len(set(cases)) == 19
    for axis, ends in (("rank", (1, 64)), ("layers", (1, 8)), ("adapters", (1, 64))):
        values = [getattr(case.point, axis) for case in cases]
        assert (min(values), max(values)) == ends
    assert {"f1", "all"} < {case.point.positions for case in cases}
    assert "paper-cpu" in PRESETS and all(case.phases == ("generate",) for case in cases)


def test_a_panel_shows_the_medians_on_a_linear_axis(results):
    swept = paper_plots.lines_of(results, "generate")
    assert {axis: len(line.cases) for axis, line in swept.items()} == {
        "rank": 7,
        "layers": 4,
        "positions": 6,
        "adapters": 4,
    }
    totals, parts = paper_plots.points(swept["rank"], "reft_kernels native")
    assert [place for place, _ in totals] == list(range(7))
    # 1.1 to 7.4 % of a second, over a baseline of 1 to 1.004 s
    assert totals[0][1].median == pytest.approx(1.1, rel=0.01)
    assert totals[-1][1].median == pytest.approx(7.4, rel=0.01) and len(parts) == 7
    shown = paper_plots.figure(swept)
    panels = shown.axes
    assert len(panels) == 4 and all(panel.get_yscale() == "linear" for panel in panels)
    top = panels[0].get_ylim()[1]
    assert 7.4 < top < 50  # the hooks, 370%, don't set the scale ...
    assert any("eager hooks up to 369%" in text.get_text() for text in panels[0].texts)  # ... but are told
    plots._pyplot().close(shown)


def test_report_draws_one_figure_for_the_four_axes(results, bench, tmp_path):
    record.save(results, tmp_path)
    status, _ = bench("report", tmp_path)
    assert status == 0
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == ["overhead-four-generate.png", "throughput.png"]
    assert "overhead-four-generate.png" in (tmp_path / "report.md").read_text()


def test_without_all_four_axes_there_is_no_such_figure(results, tmp_path):
    results.cases = [case for case in results.cases if case.params["batch"] == 4]  # no adapters
    assert paper_plots.draw(results, tmp_path) == []
