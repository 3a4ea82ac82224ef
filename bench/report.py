"""The command `reft-bench report DIR`: Markdown tables and PNG plots of what was recorded there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from . import host_report, paper_plots, plots, record, targets
from .record import CaseResult, ResultError, Results
from .stats import Interval
from .tables import attributed_text, interval_text, time_text

REPORT = "report.md"

#: Cases in the plot of single cases; in a longer run only those that no other plot shows.
MOST_PANELS = 12


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _machine(results: Results) -> str:
    facts = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    device = facts["gpu"]["name"] if facts["gpu"] else facts["cpu"]["model"]
    features = " ".join(facts["cpu"]["features"])
    state = "complete" if results.finished else "interrupted"
    return (
        f"{device}, {facts['cpu']['cores']} CPU cores ({features}), {facts['threads']} threads. {versions}. "
        f"Commit {facts['commit'] or 'unknown'}. {results.settings['rounds']} interleaved rounds, "
        f"started {results.started}, {state}.\n"
    )


def _ratio(case: CaseResult, name: str) -> str:
    system = case.systems[name]
    if system.ratio is None:
        return "1"
    text = interval_text(system.ratio)
    return f"{text}, {system.verdict}" if system.verdict == "not distinguishable" else text


def _kernels(results: Results) -> str:
    rows = []
    for case in results.cases:
        p = case.params
        label = [
            p["direction"],
            p["dtype"],
            str(p["rows"]),
            str(p["width"]),
            str(p["rank"]),
            f"{p['adapters']} {p['mix']}",
        ]
        for name, system in case.systems.items():
            fraction = system.extra.get("floor_fraction")
            over = system.extra.get("ratio_over_gather")
            floor = ["", ""]
            if fraction is not None and case.floor is not None:
                floor = [f"{fraction:.0%}", f"{case.floor['moved_bytes'] / 1e6:.2f}"]
            rows.append([*label, name, f"{system.time.median * 1e6:.1f}", _ratio(case, name)])
            rows[-1] += ["" if over is None else interval_text(Interval.from_json(over)), *floor]
            label = [""] * len(label)
    headings = ["direction", "dtype", "T", "d", "rank", "adapters", "system", "µs a call"]
    headings += ["over eager [95%]", "over gather+bmm [95%]", "of the floor", "MB moved"]
    return _markdown(headings, rows)


def _overhead(results: Results) -> str:
    rows = []
    for case in results.cases:
        p = case.params
        phase = f"generate {p['new_tokens']}" if p["phase"] == "generate" else p["phase"]
        phase = f"compiled {phase}" if p.get("compiled") else phase
        label = [
            p["model"],
            phase,
            *(str(p[key]) for key in ("batch", "prompt", "rank", "layers", "positions", "adapters")),
        ]
        for name, system in case.systems.items():
            served = system.extra.get("adapters_served")
            shown = f"{name} (one adapter)" if served == 1 != p["adapters"] and system.ratio else name
            rate = system.extra.get("tokens_per_s")
            cells = [time_text(system.time.median), _ratio(case, name), attributed_text(system)]
            rows.append([*label, shown, *cells, "" if rate is None else f"{rate:.0f}"])
            label = [""] * len(label)
    headings = ["model", "phase", "batch", "prompt", "rank", "layers", "positions", "adapters"]
    headings += ["system", "time"]
    shown = _markdown([*headings, "ratio [95%]", "attributed [95%]", "tokens/s"], rows)
    return f"{_agreement(results)}\n{shown}"


def _agreement(results: Results) -> str:
    """Whether attributed time lies within the interval of the difference of totals."""
    found = [
        system.extra["attributed_agrees"]
        for case in results.cases
        for system in case.systems.values()
        if "attributed_agrees" in system.extra
    ]
    return (
        f"Attributed time and the difference of totals agree within their intervals in {sum(found)} of "
        f"{len(found)} measurements.\n"
    )


def _train(results: Results) -> str:
    rows = []
    for case in results.cases:
        p = case.params
        label = [
            p["model"],
            str(p["batch"]),
            f"{p['prompt']}+{p['completion']}",
            str(p["rank"]),
            str(p["layers"]),
            p["positions"],
        ]
        for name, system in case.systems.items():
            peak = f"{system.extra['peak_bytes'] / 2**20:.1f}"
            trained = f"{system.extra['trained_parameters']:,}"
            rows.append([*label, name, time_text(system.time.median), _ratio(case, name), peak, trained])
            label = [""] * len(label)
    headings = ["model", "batch", "tokens", "rank", "layers", "positions", "system", "step", "ratio [95%]"]
    return _markdown([*headings, "peak memory (MiB)", "trained parameters"], rows)


def _host(results: Results) -> str:
    return "\n".join(
        f"### {table.title}\n\n{_markdown(table.headings, table.rows)}"
        for table in host_report.tables(results)
    )


def _host_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    return [(host_report.PLOT, host_report.draw(results, folder / "host.png"))] if results.cases else []


def _overhead_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    drawn = paper_plots.draw(results, folder)
    on_a_line = {
        id(case) for axis in plots.AXIS_LABELS for line in plots.lines(results, axis) for case in line.cases
    }
    for axis in ("rank", "layers", "positions", "prompt", "batch"):
        if drawn and axis in paper_plots.PANELS:
            continue  # the figure above has them
        swept = plots.lines(results, axis)
        if swept:
            path = folder / f"overhead-{axis}.png"
            drawn.append((f"Overhead against {plots.AXIS_LABELS[axis]}", plots.overhead_lines(swept, path)))
    swept = plots.lines(results, "adapters")
    if swept:
        drawn.append(
            ("Throughput against distinct adapters", plots.throughput(swept, folder / "throughput.png"))
        )
    cases = results.cases
    if len(cases) > MOST_PANELS:
        cases = [case for case in cases if id(case) not in on_a_line]
    if cases:
        path = folder / "overhead-cases.png"
        drawn.append(("Every system in each case", plots.forest(path, cases[:MOST_PANELS])))
    return drawn


def _kernel_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    if not plots.kernel_lines(results):
        return []
    return [
        ("Time of a call", plots.kernels(results, folder / "kernels-time.png", False)),
        ("Fraction of the floor reached", plots.kernels(results, folder / "kernels-floor.png", True)),
    ]


def _train_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    return [("Training steps", plots.training(results, folder / "train.png"))] if results.cases else []


KINDS: dict[str, tuple[str, Any, Any]] = {
    "kernels": ("The op alone", _kernels, _kernel_plots),
    "overhead": ("Overhead over merged LoRA", _overhead, _overhead_plots),
    "host": ("The host's time", _host, _host_plots),
    "train": ("Training", _train, _train_plots),
}


def section(results: Results, folder: Path, base: Path, with_plots: bool) -> str:
    """The Markdown of one result file; its plots are drawn into `folder` and linked from `base`."""
    title, tabulate, draw = KINDS[results.command]
    model = f" on {results.settings['model']}" if "model" in results.settings else ""
    parts = [f"## {title}{model}\n", _machine(results)]
    if results.ceilings:
        parts.append(_ceilings(results))
    if results.notes:
        parts.append("Left out:\n\n" + "\n".join(f"- {note}" for note in results.notes) + "\n")
    if with_plots:
        for text, path in draw(results, folder):
            parts.append(f"![{text}]({path.relative_to(base).as_posix()})\n")
    parts.append(tabulate(results))
    return "\n".join(parts)


def _ceilings(results: Results) -> str:
    found = next(iter(results.ceilings.values()))
    copies = found["copy_bytes_per_s"]
    rates = ", ".join(f"{rate / 1e9:.1f} GB/s at {int(size) / 1e6:.2f} MB" for size, rate in copies.items())
    matrix = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {dtype.removeprefix('torch.')}"
        for dtype, rate in found["matrix_operations_per_s"].items()
    )
    empty = found["empty_call_s"] * 1e6
    latency = found.get("latency_s")
    more = "" if latency is None else f"; a dependent load {latency * 1e6:.2f} µs"
    return (
        f"Measured in the same run: copy {rates}; matrix product {matrix}; an empty op call {empty:.2f} µs"
        f"{more}.\n"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a folder with results.json in it or below")
    parser.add_argument("--no-plots", action="store_true", help="tables only")


def run(args: argparse.Namespace, console: Console) -> int:
    files = record.find(args.folder)
    base = args.folder if args.folder.is_dir() else args.folder.parent
    reason = "--no-plots was given" if args.no_plots else plots.missing()
    if reason is not None:
        console.print(f"[yellow]note:[/] {reason}", highlight=False)
    record.prepare_folder(base)
    loaded = {file: record.load(file) for file in files}
    sections = ["# Results of reft-bench\n"]
    reached = targets.rows(list(loaded.values()))
    if reached:
        sections.append("## Targets\n\n" + _markdown(targets.HEADINGS, reached))
    for file, results in loaded.items():
        if results.command not in KINDS:
            raise ResultError(f"{file}: unknown command {results.command!r}")
        # Several files of one folder have a folder for their plots each.
        folder = file.parent if file.name == record.FILE else file.with_suffix("")
        if reason is None:
            folder.mkdir(exist_ok=True)
        sections.append(section(results, folder, base, reason is None))
    (base / REPORT).write_text("\n".join(sections))
    console.print(f"Written: {base / REPORT}", highlight=False)
    return 0
