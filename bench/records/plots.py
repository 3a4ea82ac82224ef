"""PNG plots of sweeps: one number along an axis. Intervals are 95 %. (Bar charts are in bars.py.)"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import answers, names
from .record import CaseResult, Results, SystemResult
from .stats import Interval

DPI = 130

#: Fixed colours, so that a system looks the same in every plot.
COLOURS = {
    "reft_kernels native": "#0b6e4f",
    "reft_kernels native fused": "#7cb518",
    "reft_kernels triton": "#12b886",
    "reft_kernels triton fused": "#b5e48c",
    "reft_kernels reference": "#8fd3b6",
    "native": "#0b6e4f",
    "triton": "#12b886",
    "reference": "#8fd3b6",
    "eager hooks": "#e8871e",
    "eager": "#e8871e",
    "pyreft": "#c1292e",
    "PEFT LoRA": "#235789",
    "PEFT LoRA unmerged": "#235789",
    "PEFT LoRA mixed": "#7ba6d0",
    "compiled": "#8d6a9f",
    "gather+bmm": "#c1292e",
    "shrink+expand": "#235789",
    "vllm": "#7ba6d0",
    "rk.functional": "#66a182",
}
OTHER = "#8a8a8a"

AXIS_LABELS = {
    "rank": "rank of the adapters",
    "layers": "edited layers",
    "positions": "edited positions of the prompt (f: first, l: last)",
    "adapters": "distinct adapters in the batch",
    "batch": "rows in the batch",
    "prompt": "prompt length (tokens)",
}


def missing() -> str | None:
    """Why plots can't be drawn, or None."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib): tables only, no plots"
    matplotlib.use("Agg")
    return None


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure; the size in inches."""
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    return pyplot.figure(figsize=size)


def save(figure: Any, path: Path, **options: Any) -> Path:
    """Writes a figure and forgets it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI, **options)
    pyplot.close(figure)
    return path


def colour(name: str) -> str:
    return COLOURS.get(name, OTHER)


def attributed_percent(system: SystemResult) -> Interval | None:
    share = system.extra.get("attributed_share")
    return None if share is None else Interval.from_json(share).scaled(100)


# Along one axis ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Line:
    """Cases that differ in one parameter only, in its order."""

    axis: str
    fixed: dict[str, Any]
    cases: list[CaseResult]


def _order(axis: str, case: CaseResult) -> tuple[int, str]:
    value = case.params[axis]
    if isinstance(value, int):
        return value, ""
    digits = "".join(c if c.isdigit() else " " for c in str(value)).split()
    return (sum(map(int, digits)) if digits else 10**9), str(value)


def lines(results: Results, axis: str) -> list[Line]:
    """The sweeps along an axis: at least two cases that agree in all else."""
    found: dict[tuple, Line] = {}
    for case in results.cases:
        fixed = {key: value for key, value in case.params.items() if key != axis}
        line = found.setdefault(tuple(fixed.items()), Line(axis, fixed, []))
        line.cases.append(case)
    for line in found.values():
        line.cases.sort(key=lambda case: _order(axis, case))
    return [line for line in found.values() if len({c.params[axis] for c in line.cases}) > 1]


def _panels(count: int, wide: float = 4.4, high: float = 3.4, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure with so many panels and room for a title above and a legend below."""
    across = min(count, columns)
    down = -(-count // across)
    figure = new_figure((max(wide * across, 8.0), high * down + 0.9))
    axes = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _finish(figure: Any, title: str, shown: dict[str, Any], path: Path) -> Path:
    """Title above, legend below, and the panels in what is left."""
    columns = 3
    room = 0.2 * -(-len(shown) // columns) + 0.15
    high = figure.get_size_inches()[1]
    figure.suptitle(textwrap.fill(title, 92), fontsize=10.5, fontweight="bold", x=0.02, ha="left")
    handles, labels = list(shown.values()), list(shown)
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, room / high, 1, 1))
    return save(figure, path)


def _fixed_text(line: Line, shown: Sequence[str]) -> str:
    parts = [f"{name} {line.fixed[name]}" for name in shown if name in line.fixed]
    return ", ".join([*parts, *names.unusual(line.fixed)])


def _ends_title(results: Results, swept: Sequence[Line]) -> str:
    """What ReFT costs at either end of the axis."""
    ends = []
    for end in (0, -1):
        cases = [line.cases[end] for line in swept]
        costs = [
            100 * (case.systems[name].ratio.median - 1)  # type: ignore[union-attr]
            for case in cases
            if (name := answers.ours(results, case.systems))
        ]
        if costs:
            cost = answers.span(costs, "{:.1f}").replace("-", "−")
            ends.append(f"{cost} % at {cases[0].params[swept[0].axis]}")
    text = f"ReFT over {swept[0].cases[0].baseline}, by {AXIS_LABELS[swept[0].axis]}"
    return f"{text}: {', '.join(ends)}"


def overhead_lines(results: Results, swept: Sequence[Line], limit: float, path: Path) -> tuple[str, Path]:
    """Overhead of ours, and of a LoRA that is not merged, against an axis; a panel for each phase.

    Args:
        limit: percent at which the axis ends on either side.
    """
    figure, axes = _panels(len(swept))
    shown: dict[str, Any] = {}
    for axis, line in zip(axes, swept):
        labels = [str(case.params[line.axis]) for case in line.cases]
        places = list(range(len(labels)))
        controls = [answers.percent_over(case.systems[case.control].ratio) for case in line.cases]  # type: ignore[arg-type]
        band = axis.fill_between(places, [c.low for c in controls], [c.high for c in controls], color="0.88")
        shown[f"{line.cases[0].baseline} again (A/A): noise"] = band
        axis.axhline(0, color="0.4", linewidth=0.8)
        there = dict.fromkeys(name for case in line.cases for name in case.systems)
        drawn = [name for name in there if names.is_ours(results.command, name) or name.endswith(" unmerged")]
        for number, name in enumerate(drawn):
            points = [
                (place, answers.percent_over(case.systems[name].ratio))  # type: ignore[arg-type]
                for place, case in zip(places, line.cases)
                if name in case.systems
            ]
            shift = 0.08 * (number - (len(drawn) - 1) / 2)
            style = {"fmt": "o-", "color": colour(name), "ms": 4}
            shown[names.label(results.command, name)] = _draw(axis, points, shift, **style)
        axis.set_xticks(places, labels)
        axis.set_ylim(-limit, limit)
        phase = names.phase_text(line.cases[0].params)
        fixed = _fixed_text(line, [n for n in ("positions", "rank", "layers", "adapters") if n != line.axis])
        axis.set_title(f"{phase}\n{fixed}", fontsize=8, loc="left")
        axis.set_xlabel(AXIS_LABELS[line.axis])
    axes[0].set_ylabel(f"time over {swept[0].cases[0].baseline} (%)")
    title = _ends_title(results, swept)
    return title, _finish(figure, title, shown, path)


def _rate(case: CaseResult, name: str) -> Interval | None:
    """Tokens a second."""
    system = case.systems.get(name)
    if system is None or "tokens_per_s" not in system.extra:
        return None
    tokens = system.extra["tokens_per_s"] * system.time.median
    return Interval(tokens / system.time.median, tokens / system.time.high, tokens / system.time.low)


def _kept(results: Results, line: Line) -> float | None:
    """Of the rate with the fewest adapters, what ours keeps with the most."""
    name = answers.ours(results, line.cases[0].systems)
    ends = [name and _rate(case, name) for case in (line.cases[0], line.cases[-1])]
    return ends[1].median / ends[0].median if ends[0] and ends[1] else None


def throughput(results: Results, swept: Sequence[Line], path: Path) -> tuple[str, Path]:
    """Tokens a second against the number of distinct adapters, a panel for each phase."""
    figure, axes = _panels(len(swept))
    shown: dict[str, Any] = {}
    for axis, line in zip(axes, swept):
        labels = [str(case.params["adapters"]) for case in line.cases]
        there = dict.fromkeys(n for c in line.cases for n in c.systems if n != c.control)
        for number, name in enumerate(there):
            rates = [(place, _rate(case, name)) for place, case in enumerate(line.cases)]
            points = [(place, rate) for place, rate in rates if rate is not None]
            shift = 0.05 * (number - (len(there) - 1) / 2)
            drawn = "0.3" if name == line.cases[0].baseline else colour(name)
            shown[names.label(results.command, name)] = _draw(
                axis, points, shift, fmt="o-", color=drawn, ms=4
            )
        axis.set_xticks(range(len(labels)), labels)
        axis.set_ylim(0, None)
        fixed = _fixed_text(line, ("positions", "batch"))
        axis.set_title(f"{names.phase_text(line.cases[0].params)}\n{fixed}", fontsize=8, loc="left")
        axis.set_xlabel(AXIS_LABELS["adapters"])
        axis.tick_params(labelleft=True)
    axes[0].set_ylabel("tokens a second")
    kept = [share for line in swept if (share := _kept(results, line))]
    few, many = (swept[0].cases[end].params["adapters"] for end in (0, -1))
    title = "Tokens a second against distinct adapters"
    if kept:  # ours may have been left out
        share = answers.span([100 * part for part in kept], "{:.0f}")
        title += f": with {many}, ReFT keeps {share} % of its rate with {few}"
    return title, _finish(figure, title, shown, path)


# The op alone --------------------------------------------------------------------------------------------


def kernel_lines(results: Results) -> list[Line]:
    """Sweeps over T; each has a panel."""
    return lines(results, "rows")


def kernels(results: Results, path: Path, fractions: bool) -> tuple[str, Path]:
    """Time of a call against T with its floor, or the fraction of the floor that is reached."""
    swept = kernel_lines(results)
    figure, axes = _panels(len(swept), columns=2)
    shown: dict[str, Any] = {}
    for axis, line in zip(axes, swept):
        for name in dict.fromkeys(n for c in line.cases for n in c.systems if n != c.control):
            points = []
            for case in line.cases:
                system = case.systems.get(name)
                if system is None or case.floor is None:
                    continue
                time = system.time
                if not fractions:
                    points.append((case.params["rows"], time.scaled(1e6)))
                elif "floor_fraction" in system.extra:
                    floor = 100 * case.floor["floor_s"]
                    ends = Interval(floor / time.median, floor / time.high, floor / time.low)
                    points.append((case.params["rows"], ends))
            if points:
                style = {"fmt": "o-", "color": colour(name), "ms": 4}
                shown[names.label(results.command, name)] = _draw(axis, points, 0.0, **style)
        rows = [case.params["rows"] for case in line.cases]
        if fractions:
            axis.axhline(100, color="0.4", linewidth=0.8)
            axis.set_ylim(0, None)
        else:
            floors = [1e6 * case.floor["floor_s"] for case in line.cases if case.floor]
            (shown["floor"],) = axis.plot(rows, floors, "k--", linewidth=1)
            axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xticks(rows, [str(value) for value in rows])
        p = line.fixed
        axis.set_title(
            f"{p['direction']}, {p['dtype']}, d = {p['width']}, rank {p['rank']}, {p['adapters']} adapters "
            f"({p['mix']})",
            fontsize=8,
            loc="left",
        )
        axis.set_xlabel("rows of h in a call")
        unit = "of the floor's speed (%)" if fractions else "time of a call (µs)"
        axis.set_ylabel(unit)
    title = answers.kernels_headline([case for line in swept for case in line.cases], results, fractions)
    return title, _finish(figure, title, shown, path)


def _draw(axis: Any, points: Sequence[tuple[float, Interval]], shift: float, **style: Any) -> Any:
    """Points with error bars, a little beside their place so that intervals don't cover each other."""
    xs = [place + shift for place, _ in points]
    ys = [interval.median for _, interval in points]
    low = [interval.median - interval.low for _, interval in points]
    high = [interval.high - interval.median for _, interval in points]
    return axis.errorbar(xs, ys, yerr=[low, high], capsize=2, linewidth=1.2, **style)
