"""What `reft-bench serve` found, as tables and a figure: throughput and waiting by adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import plots
from .record import CaseResult, Results
from .serve_costs import (
    BARE,
    CONTROL,
    EXPLAINED,
    IDLE,
    LORA,
    PROMPT_ONLY,
    REFT,
    THROUGH,
    by_way,
    interval,
    setting,
    share,
)
from .stats import SAME, Interval
from .tables import time_text

_COLOURS = {BARE: "0.3", REFT: "#0b6e4f", PROMPT_ONLY: "#7cb518", LORA: "#235789", IDLE: "#8fd3b6"}

PLOT = "Throughput, time to the first token and time between tokens against distinct adapters"


class Table(NamedTuple):
    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _times_text(case: CaseResult, name: str) -> tuple[str, str]:
    extra = case.systems[name].extra
    return time_text(extra["first_s"]), time_text(extra["between_s"])


def tables(results: Results) -> list[Table]:
    """A table for each way: throughput over the baseline's and waiting, of each system by adapters."""
    found = []
    for way, cases in by_way(results).items():
        rows = []
        for case in cases:
            label = str(case.params["adapters"] or "none")
            for name, system in case.systems.items():
                over = "1 (the baseline)" if system.ratio is None else interval(share(system))
                if system.verdict == SAME:
                    over += ", not distinguishable"
                rate = f"{system.extra['tokens_per_s']:.0f}"
                rows.append((label, name, f"{over} ({rate}/s)", *_times_text(case, name)))
                label = ""
        title = f"{THROUGH[way][0].upper()}{THROUGH[way][1:]}: {setting(cases[0])}"
        headings = ("adapters", "system", "throughput over bare [95%] (tokens)", "first token", "next ones")
        found.append(Table(title, headings, rows))
    return found


# The figure ----------------------------------------------------------------------------------------------


def _times(case: CaseResult, name: str, key: str) -> Interval:
    values = sorted(1e3 * one for one in case.systems[name].extra[f"{key}_samples"])
    middle = 1e3 * case.systems[name].extra[f"{key}_s"]
    return Interval(middle, values[0], values[-1])


def draw(results: Results, path: Path) -> Path:
    """A row of three panels for each way: throughput over bare, first token and next ones by adapters."""
    ways = by_way(results)
    figure = plots.new_figure((11.0, 3.3 * len(ways) + 0.6))
    axes = figure.subplots(len(ways), 3, squeeze=False)
    shown: dict[str, Any] = {}
    for row, (way, cases) in zip(axes, ways.items()):
        counts = [case.params["adapters"] for case in cases]
        places = {count: place for place, count in enumerate(counts)}
        _draw_noise(row[0], cases, shown)
        names = [n for n in (BARE, IDLE, REFT, PROMPT_ONLY, LORA) if any(n in c.systems for c in cases)]
        for number, name in enumerate(names):
            having = [case for case in cases if name in case.systems]
            xs = [places[case.params["adapters"]] + 0.06 * (number - len(names) / 2) for case in having]
            parts = (
                [share(case.systems[name]) for case in having],
                [_times(case, name, "first") for case in having],
                [_times(case, name, "between") for case in having],
            )
            for axis, part in zip(row, parts):
                if axis is row[0] and name == BARE:
                    continue
                low, high = [i.median - i.low for i in part], [i.high - i.median for i in part]
                bars = axis.errorbar(
                    xs, [i.median for i in part], yerr=[low, high], fmt="o-", ms=4, capsize=2,
                    linewidth=1.2, color=_COLOURS[name],
                )  # fmt: skip
                shown[EXPLAINED[name][0]] = bars
        titles = ("throughput over bare vLLM", "time to the first token (ms)", "time between tokens (ms)")
        for axis, title in zip(row, titles):
            axis.set_xticks(range(len(counts)), [str(count or "none") for count in counts])
            axis.set_title(f"{title}\n{THROUGH[way]}", fontsize=8, loc="left")
            axis.set_xlim(-0.5, len(counts) - 0.5)
            axis.set_ylim(0, None)
    for axis in axes[-1]:
        axis.set_xlabel("distinct adapters in the batch")
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=6, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.35 / figure.get_size_inches()[1], 1, 1))
    return plots.save(figure, path)


def _draw_noise(axis: Any, cases: Sequence[CaseResult], shown: dict[str, Any]) -> None:
    for place, case in enumerate(cases):
        noise = share(case.systems[CONTROL])
        ends = (place - 0.4, place + 0.4)
        shown["vLLM again (A/A): noise"] = axis.fill_between(ends, noise.low, noise.high, color="0.88")
    axis.axhline(1, color="0.4", linewidth=0.8)
