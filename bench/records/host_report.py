"""Tables and the plot of `reft-bench host`: what a layer costs, and what a step does whatever its layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from . import plots
from .host_costs import TITLES, depths, split
from .record import CaseResult, Results
from .stats import SAME, Interval
from .tables import interval_text

PLOT = "Time over the bare model's step"


class TextTable(NamedTuple):
    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(results: Results) -> list[TextTable]:
    """One table for each mode: its deepest model, and what the fit over all depths says."""
    found = []
    for cases in depths(results):
        deepest, p = cases[-1], cases[-1].params
        bare = deepest.systems[deepest.baseline].time.median
        title = (
            f"{TITLES[p['mode']]}: {p['layers']} layers of d {p['width']}, batch {p['batch']}, "
            f"{p['adapters']} adapters where mixed; bare {bare * 1e6:.0f} µs"
        )
        over = ", ".join(str(case.params["layers"]) for case in cases)
        headings = ("system", "over bare [95%]", "µs a layer, all in all [95%]")
        headings += (f"fit over {over} layers: µs a layer", "and µs a step") if len(cases) > 1 else ()
        rows = []
        for name in deepest.systems:
            if name == deepest.baseline:
                continue
            rows.append(_row(cases, name))
        if rows:
            found.append(TextTable(title, headings, rows))
    return found


def _row(cases: Sequence[CaseResult], name: str) -> tuple[str, ...]:
    system = cases[-1].systems[name]
    assert system.ratio is not None
    ratio = interval_text(system.ratio)
    if system.verdict == SAME:
        ratio += f", {SAME}"
    if system.extra.get("recompiles"):
        ratio += f"; another mix compiles {system.extra['recompiles']} more"
    cells = [name, ratio, interval_text(Interval.from_json(system.extra["layer_s"]), 1e6, 1)]
    if len(cases) > 1:
        fitted = split(cases, name)
        parts = ("", "") if fitted is None else (interval_text(one, 1e6, 1) for one in reversed(fitted))
        cells += parts
    return tuple(cells)


def shown(table: TextTable) -> Table:
    """For the terminal."""
    drawn = Table(title=table.title, title_justify="left")
    for number, heading in enumerate(table.headings):
        drawn.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


#: (how a name begins, its colour)
_FAMILIES = (
    ("reft_kernels fused", "#7cb518"),
    ("reft_kernels", "#0b6e4f"),
    ("one torch op", "#8d6a9f"),
    ("eager hooks", "#e8871e"),
    ("PEFT", "#235789"),
    ("pyreft", "#c1292e"),
)
_STYLES = (("idle", "s:"), ("prompt only", "^:"), ("mixed", "D--"))


def _style(name: str) -> dict[str, Any]:
    colour = next((colour for begin, colour in _FAMILIES if name.startswith(begin)), "0.6")
    return {"color": colour, "fmt": next((style for end, style in _STYLES if name.endswith(end)), "o-")}


def draw(results: Results, path: Path) -> Path:
    """µs of a step over the bare model's against the number of layers, a panel for each mode."""
    from matplotlib import pyplot

    groups = depths(results)
    size = (4.8 * len(groups) + 0.4, 4.8)
    figure, axes = pyplot.subplots(1, len(groups), figsize=size, squeeze=False)
    handles: dict[str, Any] = {}
    for axis, cases in zip(axes.flat, groups):
        axis.axhline(0, color="0.4", linewidth=0.8)
        for name in dict.fromkeys(n for case in cases for n in case.systems if n != case.baseline):
            there = [case for case in cases if name in case.systems]
            found = [Interval.from_json(c.systems[name].extra["cost_s"]).scaled(1e6) for c in there]
            low = [interval.median - interval.low for interval in found]
            high = [interval.high - interval.median for interval in found]
            handles[name] = axis.errorbar(
                [case.params["layers"] for case in there],
                [interval.median for interval in found],
                yerr=[low, high],
                capsize=2,
                linewidth=1.2,
                markersize=4,
                **_style(name),
            )
        axis.set_xticks([case.params["layers"] for case in cases])
        axis.set_xlim(0, None)
        axis.grid(alpha=0.3)
        axis.set_title(TITLES[cases[0].params["mode"]], fontsize=9)
        axis.set_xlabel("layers, all edited")
    axes[0][0].set_ylabel("µs of a step over the bare model's, 95% intervals")
    figure.legend(
        handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False
    )
    figure.tight_layout()
    figure.savefig(path, dpi=plots.DPI, bbox_inches="tight")
    pyplot.close(figure)
    return path
