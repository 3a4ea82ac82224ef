"""Each command once on a tiny case, and what it says where something is missing."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from reft_bench.measure import machine
from reft_bench.records import plots, record

KERNELS = ("kernels", "--device", "cpu", "--rows", "1,8", "--width", "64", "--rank", "2", "--adapters", "3")
#: All but those that would run through Triton's interpreter.
OVERHEAD = "reft_kernels native,eager hooks,pyreft,PEFT LoRA unmerged,PEFT LoRA mixed"
TRAIN = "reft_kernels native,PEFT LoRA,pyreft"
TINY = ("--device", "cpu", "--model", "tiny", "--batch", "2", "--prompt", "8", "--rank", "2", "--rounds", "3")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with a run of each measuring command."""
    from reft_bench.cli import main

    folder = tmp_path_factory.mktemp("recorded")
    systems = "native,reference,gather+bmm"
    words = (*KERNELS, "--direction", "forward,backward", "--dtype", "float32", "--rounds", "3")
    assert main([*words, "--systems", systems, "--out", str(folder / "kernels")]) == 0
    words = ("overhead", *TINY, "--adapters", "1,2", "--positions", "f1+l1,all", "--new-tokens", "3")
    assert main([*words, "--layers", "1,9", "--systems", OVERHEAD, "--out", str(folder / "overhead")]) == 0
    words = ("train", *TINY, "--completion", "4", "--positions", "f1+l1", "--systems", TRAIN)
    assert main([*words, "--out", str(folder / "train")]) == 0
    return folder


def test_kernels_records_ratios_and_floors(recorded):
    results = record.load(recorded / "kernels")
    assert results.finished and len(results.cases) == 6
    for case in results.cases:
        assert {"eager", "eager (A/A)", "reference", "gather+bmm"} <= set(case.systems)
        gather = case.systems["gather+bmm"]
        assert len(gather.samples) == 3 and gather.error < 1e-4 and gather.ratio is not None
        assert 0 < gather.extra["floor_fraction"] == case.floor["floor_s"] / gather.time.median
    assert results.machine["versions"]["torch"] == importlib.metadata.version("torch")
    assert results.machine["threads"] == torch.get_num_threads()


def test_overhead_records_every_phase_with_attributed_time(recorded):
    results = record.load(recorded / "overhead")
    assert [case.params["phase"] for case in results.cases[:3]] == ["prefill", "decode", "generate"]
    for case in results.cases:
        hooks = case.systems["eager hooks"]
        share = hooks.extra["attributed_share"]
        assert 0 < share["low"] <= share["median"] <= share["high"]
        assert case.systems["merged LoRA"].ratio is None
        phases = {c.params["phase"]: c for c in results.cases if c.params["positions"] == "all"}
    whole = phases["generate"].systems["eager hooks"].time.median
    assert whole > phases["prefill"].systems["eager hooks"].time.median
    assert any("9 layers are to be edited, the model has 2" in note for note in results.notes)


def test_overhead_of_methods_at_a_site(tmp_path, bench):
    """A case a method; what it was is in the record and in the report's sentences."""
    site, words = "head_attention_value_output", ("--method", "vector,lofit", "--positions", "all")
    tiny = ("--device", "cpu", "--model", "tiny", "--batch", "2", "--prompt", "8", "--rounds", "3")
    systems = ("--systems", "reft_kernels native,bare model,eager hooks", "--phases", "decode")
    status, _ = bench(
        "overhead", *tiny, *words, "--site", site, *systems, "--new-tokens", "2", "--out", tmp_path
    )
    results = record.load(tmp_path)
    assert status == 0 and results.finished
    assert [(c.params["method"], c.params["rank"], c.params["heads"]) for c in results.cases] == [
        ("vector", 1, 1),
        ("lofit", 1, 1),
    ]
    for case in results.cases:
        assert case.params["site"] == site and case.id.endswith("heads=1")
        assert {"merged LoRA", "bare model", "merged LoRA (A/A)", "reft_kernels native"} == set(case.systems)
        assert "block_output" in case.left_out["eager hooks"]
        assert case.systems["reft_kernels native"].error < 1e-3
    status, _ = bench("report", tmp_path)
    assert status == 0 and f"lofit, at {site}, 1 head: ReFT" in (tmp_path / "report.md").read_text()


def test_train_records_peak_memory(recorded):
    (case,) = record.load(recorded / "train").cases
    for name, system in case.systems.items():
        assert system.extra["peak_bytes"] > 0, name
    assert case.systems["PEFT LoRA"].extra["trained_parameters"] > 0


def test_report_writes_tables_and_plots(recorded, bench):
    status, said = bench("report", recorded)
    text = (recorded / "report.md").read_text()
    assert status == 0 and "report.md" in said
    for heading in ("The op alone", "Overhead over merged LoRA on tiny", "Training on tiny"):
        assert heading in text
    linked = [line[line.rindex("(") + 1 : -1] for line in text.splitlines() if line.startswith("![")]
    assert len(linked) == 7
    for path in linked:
        assert (recorded / path).read_bytes().startswith(b"\x89PNG")


def test_report_without_matplotlib_gives_tables(recorded, bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "not installed" in plots.missing()
    status, said = bench("report", recorded / "kernels")
    assert status == 0 and "matplotlib is not installed" in said
    assert "![" not in (recorded / "kernels" / "report.md").read_text()


def test_a_run_compares_with_itself(recorded, bench):
    status, said = bench("compare", recorded / "train", recorded / "train")
    assert status in (0, 3) and "0 of 3 got slower" in said  # three rounds: noise may hide 3 %


def test_resume_of_a_complete_run_measures_nothing(recorded, bench, monkeypatch):
    before = json.loads((recorded / "kernels" / record.FILE).read_text())
    monkeypatch.setattr(machine, "commit", lambda: before["machine"]["commit"])
    words = (*KERNELS, "--direction", "forward,backward", "--dtype", "float32", "--rounds", "3")
    systems = ("--systems", "native,reference,gather+bmm", "--out", recorded / "kernels", "--resume")
    status, said = bench(*words, *systems)
    assert status == 0 and "6 cases are there already" in said
    assert json.loads((recorded / "kernels" / record.FILE).read_text())["cases"] == before["cases"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("kernels", "--rows", "x"), "--rows: must be integers"),
        (("kernels", "--rank", "128", "--width", "64"), "more than the width"),
        (("kernels", "--mix", "odd"), "unknown 'odd'"),
        (("kernels", "--systems", "odd"), "unknown 'odd'"),
        (("kernels", "--rounds", "1"), "at least 2"),
        (("kernels", "--device", "toaster"), "not a device"),
        (("kernels", "--threads", "0"), "at least 1"),
        (("kernels", "--resume"), "needs the --out"),
        (("overhead", *TINY, "--positions", "x9"), "--positions"),
        (("overhead", *TINY, "--phases", "odd"), "unknown 'odd'"),
        (("overhead", *TINY, "--new-tokens", "1"), "at least 2"),
        (("overhead", *TINY, "--method", "loreft,folded"), "--method: must be among loreft, noreft"),
        (("overhead", *TINY, "--method", "lofit"), "--site block_output: site: lofit means something at"),
        (("overhead", *TINY, "--site", "mlp_ouput"), "--site: site: must be one of"),
        (("overhead", *TINY, "--site", "*.attn.output"), "--site *.attn.output: site:"),
        (("overhead", *TINY, "--site", "head_key_output", "--heads", "5"), "the model has 4 heads"),
        (("overhead", *TINY, "--heads", "2"), "heads: needed for the sites of one head"),
        (("overhead", *TINY, "--site", "lm_head_input", "--layers", "1"), "is in no layer"),
        (("overhead", *TINY[:2], "--model", "."), "can't be loaded"),
        (("overhead", *TINY[:2], "--model", "llama-100x2"), "multiple of 64"),
        (("train", *TINY, "--completion", "0"), "at least 1"),
        (("report", "/no/such/folder"), "no results.json"),
    ],
)
def test_bad_input_is_a_message(bench, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    status, said = bench(*words)
    assert status == 2 and message in said
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_a_message(bench, tmp_path):
    status, said = bench("kernels", "--device", "cuda", "--out", tmp_path)
    assert status == 2 and "finds no CUDA device" in said


def test_an_unwritable_folder_is_a_message(bench, tmp_path):
    (tmp_path / "file").touch()
    status, said = bench(*KERNELS, "--out", tmp_path / "file" / "below")
    assert status == 2 and "can't be written" in said


def test_a_peer_that_is_not_installed_is_left_out_with_a_word(bench, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pyreft" else find(name, *a)
    )
    words = ("--systems", "pyreft,eager hooks", "--positions", "all", "--adapters", "1", "--new-tokens", "2")
    status, said = bench("overhead", *TINY, *words, "--phases", "prefill", "--out", tmp_path)
    assert status == 0 and "pyreft is not installed" in said
    (case,) = record.load(tmp_path).cases
    assert "eager hooks" in case.systems and case.left_out["pyreft"].startswith("pyreft is not installed")


def test_without_peft_the_baseline_is_the_bare_model(bench, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    words = ("--systems", "eager hooks,PEFT LoRA unmerged", "--positions", "all", "--adapters", "1")
    status, said = bench(
        "overhead", *TINY, *words, "--new-tokens", "2", "--phases", "decode", "--out", tmp_path
    )
    assert status == 0 and "the baseline is the bare model" in said
    (case,) = record.load(tmp_path).cases
    assert {"merged LoRA", "eager hooks"} <= set(case.systems)
    assert case.left_out["PEFT LoRA unmerged"].startswith("PEFT is not installed")
