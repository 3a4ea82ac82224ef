"""What a report says in sentences and shows in bars."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
from reft_bench import systems
from reft_bench.commands import report
from reft_bench.kernels import systems as kernel_systems
from reft_bench.records import answers, bars, names, plots, record
from reft_bench.records.record import CaseResult, Results
from reft_bench.records.stats import Interval
from reft_bench.systems import host, training

RECORDS = Path(report.__file__).resolve().parents[1] / "results"
MACHINE = {"cpu": {"model": "m", "cores": 2, "features": []}, "gpu": None, "threads": 2, "versions": {}}
MACHINE["commit"] = None
OURS, BASE, AGAIN = "reft_kernels native", "merged LoRA", "merged LoRA (A/A)"


def _case(factors: dict[str, float], noise: float = 0.001, rounds: int = 21, **changed) -> CaseResult:
    rng = np.random.default_rng(0)
    wanted = {BASE: 1.0, **factors, AGAIN: 1.0}
    samples = {name: (f * rng.lognormal(0, noise, rounds)).tolist() for name, f in wanted.items()}
    params = {"phase": "decode", "model": "m", "dtype": "float32", "batch": 8, "prompt": 64, "rank": 8}
    params |= {"layers": 8, "positions": "all", "adapters": 8, "new_tokens": 16, "compiled": False, **changed}
    found = record.summarize(samples, BASE, AGAIN, {})
    for system in found.values():
        system.extra["tokens_per_s"] = 8 / system.time.median
    return CaseResult(str(params), params, BASE, AGAIN, found)


def _results(*cases: CaseResult) -> Results:
    settings = {"rounds": 21, "model": "m"}
    return Results("overhead", settings, copy.deepcopy(MACHINE), cases=list(cases))


@pytest.mark.parametrize(
    ("factor", "noise", "said"),
    [
        (1.05, 0.001, "decode, every position, 8 adapters: ReFT costs 5.0 ± 0."),
        (0.95, 0.001, "ReFT saves 5.0 ± 0."),
        (1.0, 0.003, "ReFT costs at most 0."),
        (1.01, 0.06, "too noisy to tell (merged LoRA beside itself: up to "),
    ],
)
def test_a_sentence_says_what_was_seen_and_how_sure_it_is(factor, noise, said):
    (text,) = answers.sentences(_results(_case({OURS: factor}, noise)))
    assert said in text
    assert ("--rounds" in text or "quieter machine" in text) == ("too noisy" in said)


def test_the_advice_is_the_rounds_that_bring_the_noise_down_to_the_size():
    assert answers.rounds_for(11, noise=2.0, size=1.0) == 45  # four times as many, odd
    assert answers.rounds_for(11, noise=0.5, size=1.0) == 11
    assert answers.advice(11, 2.0, 1.0) == "try --rounds 45"
    assert "quieter machine (at this noise it would take about 1101 rounds)" in answers.advice(11, 10.0, 1.0)


def test_a_sentence_is_about_what_runs_by_default():
    case = _case({"reft_kernels native fused": 1.5, "reft_kernels triton": 1.3, OURS: 1.1})
    results = _results(case)
    assert answers.ours(results, case.systems) == OURS
    results.machine["gpu"] = {"name": "g"}
    assert answers.ours(results, case.systems) == "reft_kernels triton"
    assert answers.ours(results, ["eager hooks", "reft_kernels reference"]) is None
    assert answers.sentences(_results(_case({"eager hooks": 1.1}))) == []


def test_sentences_name_what_differs_between_cases():
    cases = [_case({OURS: 1.1}, batch=batch, positions="f3+l1", adapters=1) for batch in (8, 64)]
    texts = answers.sentences(_results(*cases))
    assert texts[0].startswith("decode, first 3 and last prompt tokens, 1 adapter, batch 8: ")
    assert "batch 64" in texts[1] and "rank" not in texts[1]


def test_every_system_is_explained():
    known = {
        "overhead": systems.all_systems(),
        "train": training.all_systems(),
        "kernels": kernel_systems.all_systems(),
        "host": host.all_systems(),
    }
    for command, found in known.items():
        for line in names.explained(command, [name for one in found for name in (one, one + names.AGAIN)]):
            assert "no description" not in line, line
    assert "no description" in names.explained("overhead", ["odd"])[0]


@pytest.mark.parametrize("command", ["kernels", "overhead", "train"])
def test_recorded_results_begin_with_what_they_say(bench, tmp_path, command):
    shutil.copy(RECORDS / command / record.FILE, tmp_path)
    status, said = bench("report", tmp_path, "--no-plots")
    text = (tmp_path / report.REPORT).read_text()
    results = record.load(tmp_path)
    found = answers.sentences(results)
    assert status == 0 and found and all(" ".join(f"• {line}".split()) in said for line in found)
    begin = text.index(f"- {found[0]}\n")
    assert text[:begin].count("\n") == 4 and begin < text.index("Where it was measured")
    for name in {name for case in results.cases for name in case.systems}:
        assert f"- **{name}**: " in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows and all(row.count("|") <= 6 for row in rows), "more than five columns"


# Charts --------------------------------------------------------------------------------------------------


def test_the_axis_is_set_by_the_largest_effect_of_ours():
    assert bars.reach([Interval(2.0, 1.9, 2.1), Interval(-3.0, -3.5, -2.9)]) == 6.0
    assert bars.reach([Interval(0.1, -4.0, 5.0)]) == pytest.approx(5.5)  # which its interval fits into
    assert bars.reach([Interval(0.1, 0.0, 0.2)]) == bars.LEAST_REACH


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved, by the name of their file."""
    pytest.importorskip("matplotlib")
    assert plots.missing() is None
    kept = {}
    for module in (bars, plots):
        monkeypatch.setattr(module, "save", lambda figure, path: kept.setdefault(path.name, figure) and path)
    yield kept
    from matplotlib import pyplot

    pyplot.close("all")


def _texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_bars_beyond_the_axis_are_cut_and_labelled(drawn, tmp_path):
    results = _results(_case({OURS: 1.03, "PEFT LoRA unmerged": 1.02, "pyreft": 2.3, "PEFT LoRA mixed": 0.5}))
    ((title, path),) = bars.phases(results, results.cases, tmp_path, most=6)
    assert title == "decode: ReFT costs up to 3.0 % over merged LoRA" and path.name == "overhead-decode.png"
    (axis,) = drawn[path.name].axes
    assert axis.get_xscale() == "linear"
    limit = axis.get_xlim()[1]
    assert 5.8 < limit < 6.2 and axis.get_xlim()[0] == -limit
    cut = [text for text in _texts(axis) if "±" not in text]
    assert cut == ["+130.1 %", "−50.0 %"]
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        "ReFT, native",
        "merged LoRA again (A/A)",
        "LoRA unmerged, one adapter",
        "pyreft, one adapter",
        "LoRA mixed, an adapter a row",
    ]
    ends = [x for patch in axis.patches for x in patch.get_path().vertices[:, 0]]
    assert max(ends) <= limit and "grey" in " ".join(t.get_text().lower() for t in drawn[path.name].texts)


def test_a_phase_has_one_chart_with_a_panel_for_each_case(drawn, tmp_path):
    cases = [
        _case({OURS: 1.03}, phase=phase, positions=positions)
        for positions in ("f1", "all")
        for phase in ("prefill", "decode")
    ]
    found = report._overhead_plots(_results(*cases), tmp_path)
    assert [path.name for _, path in found] == ["overhead-prefill.png", "overhead-decode.png"]
    assert [axis.get_title(loc="left") for axis in drawn["overhead-prefill.png"].axes] == [
        "first prompt token, 8 adapters",
        "every position, 8 adapters",
    ]


def test_a_sweep_is_drawn_on_a_linear_axis(drawn, tmp_path):
    cases = [_case({OURS: 1.01 + rank / 1000, "pyreft": 3.0}, rank=rank) for rank in (1, 8, 32)]
    cases += [_case({OURS: 1.02}, adapters=count) for count in (1, 4)]
    found = report._overhead_plots(_results(*cases), tmp_path)
    assert {path.name for _, path in found} == {
        "overhead-decode.png",
        "overhead-by-rank.png",
        "throughput.png",
    }
    (axis,) = drawn["overhead-by-rank.png"].axes
    assert axis.get_yscale() == "linear" and axis.get_ylim()[1] == pytest.approx(8.4, abs=0.3)
    assert "ReFT keeps" in drawn["throughput.png"].get_suptitle()
