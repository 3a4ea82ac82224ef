"""The command `reft-bench report DIR`: what was recorded there, as sentences, plots and tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..gpu import targets, ways
from ..records import answers, bars, host_report, names, paper_plots, plots, record, serve_report
from ..records.record import CaseResult, ResultError, Results, SystemResult
from ..records.stats import SAME, Interval
from ..records.tables import attributed_text, conclude, interval_text, time_text

REPORT = "report.md"

#: Cases in one bar chart; in a longer run those that no plot along an axis shows come first.
MOST_PANELS = 6

#: Values on an axis that make a plot along it.
LEAST_VALUES = 3


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


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


def _ratio(system: SystemResult) -> str:
    if system.ratio is None:
        return "1 (the baseline)"
    text = interval_text(system.ratio)
    return f"{text}, {system.verdict}" if system.verdict == SAME else text


# Tables: one for each case -------------------------------------------------------------------------------

_RATIO = (
    "**ratio [95%]**: time over the baseline's, as the median over rounds and its interval; \"not "
    'distinguishable" where noise explains it.'
)


def _of_cases(
    results: Results, title: Any, headings: Sequence[str], cells: Any, explained: Sequence[str]
) -> str:
    """A heading and a table for each case; before them what systems and columns mean."""
    systems = [name for case in results.cases for name in case.systems]
    parts = ["### What the names mean\n", _listed([*names.explained(results.command, systems), *explained])]
    for case in results.cases:
        rows = [[name, *cells(case, name, system)] for name, system in case.systems.items()]
        parts += [f"### {title(case)}\n", _markdown(["system", *headings], rows)]
    return "\n".join(parts)


def _kernels(results: Results) -> str:
    def title(case: CaseResult) -> str:
        p = case.params
        moved = f", {case.floor['moved_bytes'] / 1e6:.2f} MB moved" if case.floor else ""
        adapters = f"{p['adapters']} {p['mix']} adapter{'s' * (p['adapters'] != 1)}"
        rows = f"{p['rows']} row{'s' * (p['rows'] != 1)}"
        return (
            f"{p['direction']}, {p['dtype']}, {rows}, d = {p['width']}, rank {p['rank']}, {adapters}{moved}"
        )

    def cells(case: CaseResult, name: str, system: SystemResult) -> list[str]:
        over, fraction = system.extra.get("ratio_over_gather"), system.extra.get("floor_fraction")
        return [
            f"{system.time.median * 1e6:.1f}",
            _ratio(system),
            "" if over is None else interval_text(Interval.from_json(over)),
            "" if fraction is None else f"{fraction:.0%}",
        ]

    headings = ["µs a call", "ratio [95%]", "over gather+bmm [95%]", "of the floor"]
    explained = [
        "**forward, norm, backward**: the edit; the edit with Llama's RMSNorm after it; its gradients.",
        _RATIO,
        "**of the floor**: how much of the speed is reached that the machine allows: the time to copy the "
        "bytes that must move, or to do the operations, at rates measured in the same run, and a call. Of "
        "systems with one adapter for all rows nothing is said, as they move fewer bytes.",
    ]
    return _of_cases(results, title, headings, cells, explained)


def _overhead(results: Results) -> str:
    def title(case: CaseResult) -> str:
        return f"{names.phase_text(case.params)}: {names.case_text(case.params)}"

    def cells(case: CaseResult, name: str, system: SystemResult) -> list[str]:
        rate = system.extra.get("tokens_per_s")
        times = [time_text(system.time.median), _ratio(system), attributed_text(system)]
        return [*times, "" if rate is None else f"{rate:.0f}"]

    explained = [
        _RATIO,
        "**attributed [95%]**: the time inside that system's own wrappers, hooks, plan and ops, over the "
        f"baseline's time. {_agreement(results)}",
    ]
    return _of_cases(
        results, title, ["time", "ratio [95%]", "attributed [95%]", "tokens/s"], cells, explained
    )


def _agreement(results: Results) -> str:
    """Whether attributed time lies within the interval of the difference of totals."""
    found = [
        system.extra["attributed_agrees"]
        for case in results.cases
        for system in case.systems.values()
        if "attributed_agrees" in system.extra
    ]
    if not found:
        return "It was not measured here."
    return (
        f"It agrees with the difference of totals within their intervals in {sum(found)} of {len(found)} "
        "measurements."
    )


def _train(results: Results) -> str:
    def title(case: CaseResult) -> str:
        return f"{names.phase_text(case.params)}: {names.case_text(case.params)}"

    def cells(case: CaseResult, name: str, system: SystemResult) -> list[str]:
        peak = f"{system.extra['peak_bytes'] / 2**20:.1f}"
        trained = f"{system.extra['trained_parameters']:,}"
        return [time_text(system.time.median), _ratio(system), peak, trained]

    explained = [
        _RATIO,
        "**peak memory**: what a step allocates at its peak, beyond what there was when it began.",
    ]
    headings = ["step", "ratio [95%]", "peak memory (MiB)", "trained parameters"]
    return _of_cases(results, title, headings, cells, explained)


def _host(results: Results) -> str:
    systems = [name for case in results.cases for name in case.systems]
    explained = [
        _RATIO,
        "**µs a layer, µs a step**: what a step takes over the bare model's, as a line over the depths: its "
        "slope, and its value at no layers. All is CPU time of the one thread that runs the model.",
    ]
    parts = ["### What the names mean\n", _listed([*names.explained(results.command, systems), *explained])]
    for table in host_report.tables(results):
        parts += [f"### {table.title}\n", _markdown(table.headings, table.rows)]
    return "\n".join(parts)


def _serve(results: Results) -> str:
    systems = [name for case in results.cases for name in case.systems]
    explained = [
        "**throughput**: tokens a second over the baseline's, of a batch of requests from its first to its "
        "last token, as the median over rounds.",
        "**first token, next ones**: the median over requests of the time to the first token, and of the "
        "mean time between the others, as the median over rounds.",
    ]
    parts = ["### What the names mean\n", _listed([*names.explained(results.command, systems), *explained])]
    for table in serve_report.tables(results):
        parts += [f"### {table.title}\n", _markdown(table.headings, table.rows)]
    return "\n".join(parts)


# Plots ---------------------------------------------------------------------------------------------------


def _overhead_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    swept = {
        axis: [line for line in plots.lines(results, axis) if len(line.cases) >= LEAST_VALUES]
        for axis in plots.AXIS_LABELS
    }
    on_a_line = {id(case) for found in swept.values() for line in found for case in line.cases}
    cases = sorted(results.cases, key=lambda case: id(case) in on_a_line)
    drawn = bars.phases(results, cases, folder, MOST_PANELS)
    effects = [
        answers.percent_over(case.systems[name].ratio)  # type: ignore[arg-type]
        for case in results.cases
        if (name := answers.ours(results, case.systems))
    ]
    four = paper_plots.draw(results, folder)
    drawn += four
    for axis, found in swept.items():
        if four and axis in paper_plots.PANELS and axis != "adapters":
            continue  # the figure above has them
        if found and axis == "adapters":
            drawn.append(plots.throughput(results, found, folder / "throughput.png"))
        elif found:
            path = folder / f"overhead-by-{axis}.png"
            drawn.append(plots.overhead_lines(results, found, bars.reach(effects), path))
    return drawn


def _kernel_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    if not plots.kernel_lines(results):
        return []
    return [
        plots.kernels(results, folder / "kernels-time.png", fractions=False),
        plots.kernels(results, folder / "kernels-floor.png", fractions=True),
    ]


def _host_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    return [(host_report.PLOT, host_report.draw(results, folder / "host.png"))] if results.cases else []


def _train_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    if not results.cases:
        return []
    drawn = bars.phases(results, results.cases, folder, MOST_PANELS)
    return [*drawn, bars.memory(results, folder / "train-memory.png")]


def _serve_plots(results: Results, folder: Path) -> list[tuple[str, Path]]:
    return [(serve_report.PLOT, serve_report.draw(results, folder / "serve.png"))] if results.cases else []


KINDS: dict[str, tuple[str, Any, Any]] = {
    "kernels": ("The op alone", _kernels, _kernel_plots),
    "overhead": ("Overhead over merged LoRA", _overhead, _overhead_plots),
    "host": ("The host's time", _host, _host_plots),
    "train": ("Training", _train, _train_plots),
    "serve": ("Serving with vLLM", _serve, _serve_plots),
}


def section(results: Results, folder: Path, base: Path, with_plots: bool) -> str:
    """The Markdown of one result file: what it says, its plots, where it comes from, all numbers.

    The plots are drawn into `folder` and linked from `base`.
    """
    title, tabulate, draw = KINDS[results.command]
    model = f" on {results.settings['model']}" if "model" in results.settings else ""
    parts = [f"## {title}{model}\n", _listed(answers.sentences(results))]
    if with_plots:
        for text, path in draw(results, folder):
            parts.append(f"![{text}]({path.relative_to(base).as_posix()})\n")
    parts += ["### Where it was measured\n", _machine(results)]
    if results.ceilings:
        parts.append(_ceilings(results))
    if results.notes:
        parts.append("Left out:\n\n" + _listed(results.notes))
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
    raced = ways.rows(list(loaded.values()))
    for file, results in loaded.items():
        if results.command not in KINDS:
            raise ResultError(f"{file}: unknown command {results.command!r}")
        # Several files of one folder have a folder for their plots each.
        folder = file.parent if file.name == record.FILE else file.with_suffix("")
        if reason is None:
            folder.mkdir(exist_ok=True)
        sections.append(section(results, folder, base, reason is None))
        conclude(console, results)
    if raced:
        sections.append("## Ways of the CUDA kernels\n\n" + _markdown(ways.HEADINGS, raced))
    if reached:
        sections.append("## Targets\n\n" + _markdown(targets.HEADINGS, reached))
    (base / REPORT).write_text("\n".join(sections))
    console.print(f"Written: {base / REPORT}", highlight=False)
    return 0
