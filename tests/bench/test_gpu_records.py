"""What a GPU run leaves behind, computed without a GPU: the floor's formula, and the table of targets."""

from __future__ import annotations

import json

import pytest
import torch
from reft_bench.commands import readme
from reft_bench.gpu import ceilings as gpu_ceilings
from reft_bench.gpu import targets, ways
from reft_bench.gpu.ceilings import GpuCeilings
from reft_bench.measure.ceilings import Work
from reft_bench.measure.timer import CALLS_OF_A_GRAPH, CpuClock, passes_of_a_graph
from reft_bench.records import record
from reft_bench.records.record import CaseResult, Results, SystemResult
from reft_bench.records.stats import Interval


@pytest.fixture
def ceilings(monkeypatch: pytest.MonkeyPatch) -> GpuCeilings:
    """With a CPU's copies and products in the GPU's place, and a latency of a tenth of a second."""
    monkeypatch.setattr(gpu_ceilings, "LARGE", 1 << 22)
    monkeypatch.setattr(gpu_ceilings, "SMALL", 1 << 16)
    monkeypatch.setattr(gpu_ceilings, "rows_in_cache", lambda work, device: 0 < work.of_rows < 1000)
    found = GpuCeilings("cpu", CpuClock(span=1e-4))
    found._latency = 0.1
    return found


def test_few_bytes_take_the_latency_of_a_load(ceilings: GpuCeilings) -> None:
    floor = ceilings.floor(Work(moved=2000, footprint=2000, operations=1, of_rows=500), torch.float32)
    assert floor["bytes_s"] == 0.1 + 500 / floor["cache_rate"]
    assert floor["floor_s"] == floor["empty_call_s"] + gpu_ceilings.UNAVOIDABLE + floor["bytes_s"]
    assert floor["copy_of_rows_s"] == floor["empty_call_s"] + 500 / floor["cache_rate"]


def test_many_bytes_take_a_copys_time(ceilings: GpuCeilings) -> None:
    moved = 10**13
    floor = ceilings.floor(Work(moved, moved, operations=1, of_rows=moved // 2), torch.float32)
    assert floor["bytes_in_cache"] == 0 and floor["bytes_s"] == moved / floor["copy_rate"] > 0.1
    assert floor["copy_of_rows_s"] == floor["empty_call_s"] + moved // 2 / floor["copy_rate"]


def test_many_operations_take_a_large_products_time(ceilings: GpuCeilings) -> None:
    floor = ceilings.floor(Work(8, 8, operations=10**15), torch.float32)
    assert floor["operations_s"] == 10**15 / floor["matrix_rate"] > floor["bytes_s"]
    assert floor["floor_s"] > floor["operations_s"]


def test_a_graph_is_long_beside_its_launch() -> None:
    for calls in (1, 5, 47, 48, 64):
        passes = passes_of_a_graph(calls)
        assert (passes - 1) * calls < CALLS_OF_A_GRAPH <= passes * calls


def test_the_chain_of_loads_is_one_cycle_and_is_walked() -> None:
    triton = pytest.importorskip("triton")
    from reft_bench.gpu import chase

    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off")
    chain = chase.chain_of(37, 4, "cpu")
    order, place = [], 0
    for _ in range(37):
        order.append(place)
        place = int(chain[place, 0])
    assert place == 0 and sorted(order) == list(range(37))
    out = torch.zeros(1, dtype=torch.int32)
    chase._chase[(1,)](chain, out, 5, 4)
    assert out.item() == order[5]


GPU = {"name": "NVIDIA Test", "capability": "9.0"}


def _run(command: str, params: dict, times: dict[str, float], floor: dict | None = None) -> Results:
    machine = {"gpu": GPU, "versions": {"torch": "2.11", "triton": "3.6"}}
    results = Results(command, {}, machine)
    systems = {
        name: SystemResult([t], Interval(t, t, t), Interval(t, t, t), "slower") for name, t in times.items()
    }
    results.cases.append(CaseResult("it", params, "base", "base (A/A)", systems, floor=floor))
    return results


KERNEL = {"dtype": "bfloat16", "width": 4096, "rank": 8, "mix": "distinct", "direction": "forward"}
KERNEL["pool_rows"] = 0
STEP = {"phase": "step", "compiled": True, "positions": "all", "batch": 64, "adapters": 64}


def test_what_was_reached_of_the_targets() -> None:
    floor = {"floor_s": 4.0, "copy_of_rows_s": 20.0}
    times = {"native": 5.0, "triton": 8.0, "shrink+expand": 10.0}
    runs = [_run("kernels", KERNEL | {"rows": 64, "adapters": 64}, times, floor)]
    runs.append(_run("kernels", KERNEL | {"rows": 4096, "adapters": 1}, {"native": 22.0}, floor))
    backward = KERNEL | {"rows": 4096, "adapters": 1, "direction": "backward"}
    runs.append(_run("kernels", backward, {"native": 77.0}, floor))
    large = KERNEL | {"rows": 64, "adapters": 64, "pool_rows": targets.LARGE_POOL}
    runs.append(_run("kernels", large, {"native": 6.0}, floor))
    for model, ratio in (("8b", 1.02), ("8b-quarter", 1.06)):
        runs.append(_run("overhead", STEP | {"model": model}, {"reft_kernels native": ratio}))
    host = _run("overhead", STEP | {"phase": "host", "model": "8b"}, {"reft_kernels native": 1.02})
    host.cases[0].systems["reft_kernels native"].extra["difference_s"] = {"median": 34e-6}
    runs.append(host)
    rows = {row[0]: row[1:] for row in targets.rows(runs)}
    assert len(rows) == 7
    (host,) = [row for text, row in rows.items() if text.startswith("the host's time")]
    assert host == ("at most 20 µs", "34 µs (missed)", "–")
    assert rows["the same, 64 rows, in a pool of 16384 rows"][1] == "1.50 (missed)"
    assert rows["op over its floor, 64 rows, as many adapters"] == ("at most 1.25", "1.25", "2.00 (missed)")
    assert rows["shrink and expand over the op, 64 rows"] == ("at least 1.50", "2.00", "1.25 (missed)")
    assert rows["op over copying h, 4096 rows, one adapter"] == ("at most 1.50", "1.10", "–")
    assert rows["backward over forward, 4096 rows, adapters: 1"][1] == "3.50 (missed)"
    (step,) = [row for text, row in rows.items() if text.startswith("compiled decode")]
    assert step == ("at most 5.0%", "6.0% (missed)", "–")  # of several models the worst


def test_which_way_was_the_fastest() -> None:
    """By rounds, each with its own; where noise explains it, neither."""
    times = {"native": [5.0, 7.0, 6.0], "native push": [4.0, 5.6, 4.8], "native ring": [5.1, 6.9, 6.0]}
    run = _run("kernels", KERNEL | {"rows": 64, "adapters": 64}, dict.fromkeys(times, 5.0))
    for name, samples in times.items():
        run.cases[0].systems[name].samples = samples
    other = _run("kernels", KERNEL | {"rows": 1, "adapters": 1}, {"native": 5.0, "native push": 6.0})
    other.cases[0].left_out["native ring"] = "failed: a block has one unit"
    backward = _run("kernels", KERNEL | {"direction": "backward"}, {"native": 5.0})
    backward.cases[0].left_out["native ring"] = "is for forward"
    push, ring, slower, left = ways.rows([run, other, backward])
    assert push[1:2] + push[3:] == ("push", "push") and push[2].startswith("0.8")
    assert ring[1:2] + ring[3:] == ("ring", "not distinguishable")
    assert slower[1:2] + slower[3:] == ("push", "the usual")
    assert left[1:] == ("ring", "–", "not timed: failed: a block has one unit")


def test_records_without_a_gpu_say_nothing_of_the_targets() -> None:
    run = _run("kernels", KERNEL | {"rows": 64, "adapters": 64}, {"native": 5.0}, {"floor_s": 4.0})
    run.machine["gpu"] = None
    assert targets.rows([run]) == []


def test_the_readme_has_a_table_for_each_gpu(tmp_path) -> None:
    floor = {"floor_s": 4.0, "copy_of_rows_s": 20.0}
    for folder, rows in (("gpu-a", 1), ("gpu-a-models", 64)):
        (tmp_path / folder).mkdir()
        run = _run("kernels", KERNEL | {"rows": rows, "adapters": rows}, {"native": 4.4}, floor)
        (tmp_path / folder / "kernels.json").write_text(json.dumps(run.to_json()))
    assert len(record.find(tmp_path)) == 2
    (runs,) = readme.gpu_runs(tmp_path).values()
    text = readme.gpu(runs)
    assert "NVIDIA Test" in text and text.count("| at most 1.25 | 1.10 |") == 2
