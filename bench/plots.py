"""PNG plots of results. Intervals are 95%; grey bands are the A/A control, the baseline against itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
}
ATTRIBUTED = "attributed"

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


def _pyplot() -> Any:
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    return pyplot


def _colour(name: str) -> str:
    return COLOURS.get(name, "#555555")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    _pyplot().close(figure)
    return path


def _bars(interval: Interval) -> tuple[float, list[list[float]]]:
    """A point and its error bars, as matplotlib takes them."""
    return interval.median, [[interval.median - interval.low], [interval.high - interval.median]]


def percent_over(ratio: Interval) -> Interval:
    """A ratio as the overhead in percent."""
    return Interval(*(100 * (value - 1) for value in (ratio.median, ratio.low, ratio.high)))


def attributed_percent(system: SystemResult) -> Interval | None:
    share = system.extra.get("attributed_share")
    return None if share is None else Interval.from_json(share).scaled(100)


def _systems(case: CaseResult) -> Iterator[tuple[str, SystemResult]]:
    """The systems beside the baseline and its control."""
    for name, system in case.systems.items():
        if name not in (case.baseline, case.control):
            yield name, system


def _symlog(axis: Any, which: str) -> None:
    getattr(axis, f"set_{which}scale")("symlog", linthresh=1.0, linscale=0.8)
    ticks = [-100, -10, -1, 0, 1, 10, 100, 1000]
    getattr(axis, f"set_{which}ticks")(ticks, [f"{tick}" for tick in ticks])


# One point of a sweep after the other: a forest plot -----------------------------------------------------


def _point_title(case: CaseResult) -> str:
    p = case.params
    tokens = f" of {p['new_tokens']} tokens" if p["phase"] == "generate" else ""
    return (
        f"{p['phase']}{tokens}: positions {p['positions']}, {p['adapters']} adapters\n"
        f"batch {p['batch']}, prompt {p['prompt']}, rank {p['rank']}, {p['layers']} layers"
    )


def forest(path: Path, cases: Sequence[CaseResult]) -> Path:
    """Overhead of every system in each case, in percent of the baseline."""
    pyplot = _pyplot()
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    size = (4.2 * columns + 0.8, 2.7 * lines + 0.4)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases):
        names = [name for name, _ in _systems(case)]
        control = case.systems[case.control].ratio
        assert control is not None
        band = percent_over(control)
        axis.axvspan(band.low, band.high, color="0.85", label="A/A control")
        axis.axvline(0, color="0.4", linewidth=0.8)
        for height, (name, system) in enumerate(_systems(case)):
            assert system.ratio is not None
            middle, bars = _bars(percent_over(system.ratio))
            axis.errorbar(middle, height, xerr=bars, fmt="o", ms=5, capsize=3, color=_colour(name))
            part = attributed_percent(system)
            if part is not None:
                middle, bars = _bars(part)
                axis.errorbar(
                    middle,
                    height - 0.28,
                    xerr=bars,
                    fmt="D",
                    ms=4,
                    capsize=2,
                    color=_colour(name),
                    mfc="white",
                )
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.7)
        _symlog(axis, "x")
        lowest = min(percent_over(system.ratio).low for system in case.systems.values() if system.ratio)
        axis.set_xlim(min(-2.0, 1.5 * lowest), None)
        axis.set_title(_point_title(case), fontsize=8)
        axis.set_xlabel(f"overhead over {case.baseline} (%)")
    _forest_legend(figure, pyplot)
    figure.tight_layout(rect=(0, 0.5 / size[1], 1, 1))
    return _save(figure, path)


def _forest_legend(figure: Any, pyplot: Any) -> None:
    from matplotlib.patches import Patch

    def handle(marker: str, **style: Any) -> Any:
        return pyplot.Line2D([], [], color="0.2", marker=marker, linestyle="-", linewidth=1, **style)

    figure.legend(
        [handle("o"), handle("D", mfc="white"), Patch(color="0.85")],
        ["from totals, 95% interval", "attributed to hooks, ops and plan", "A/A control"],
        loc="lower center",
        ncols=3,
        frameon=False,
    )


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


def overhead_lines(swept: Sequence[Line], path: Path) -> Path:
    """Overhead against an axis, a panel for each phase."""
    pyplot = _pyplot()
    size = (4.6 * len(swept) + 0.4, 4.6)
    figure, axes = pyplot.subplots(1, len(swept), figsize=size, squeeze=False, sharey=True)
    shown: dict[str, Any] = {}
    for axis, line in zip(axes.flat, swept):
        labels = [str(case.params[line.axis]) for case in line.cases]
        places = list(range(len(labels)))
        controls = [percent_over(c.systems[c.control].ratio) for c in line.cases]  # type: ignore[arg-type]
        shown["A/A control"] = axis.fill_between(
            places, [c.low for c in controls], [c.high for c in controls], color="0.85"
        )
        axis.axhline(0, color="0.4", linewidth=0.8)
        names = dict.fromkeys(name for case in line.cases for name, _ in _systems(case))
        for number, name in enumerate(names):
            there = [
                (place, case.systems[name]) for place, case in zip(places, line.cases) if name in case.systems
            ]
            shift = 0.06 * (number - (len(names) - 1) / 2)
            totals = [(place, percent_over(system.ratio)) for place, system in there if system.ratio]
            shown[name] = _draw(axis, totals, shift, fmt="o-", color=_colour(name), ms=4)
            parts = [(place, attributed_percent(system)) for place, system in there]
            kept = [(place, part) for place, part in parts if part is not None]
            if kept:
                style = {"fmt": "D:", "color": _colour(name), "mfc": "white", "ms": 4}
                shown[f"{name}, {ATTRIBUTED}"] = _draw(axis, kept, shift, **style)
        axis.set_xticks(places, labels)
        _symlog(axis, "y")
        phase = line.fixed["phase"]
        fixed = {
            k: line.fixed[k] for k in ("positions", "rank", "layers", "adapters", "batch") if k in line.fixed
        }
        axis.set_title(f"{phase}\n" + ", ".join(f"{k} {v}" for k, v in fixed.items()), fontsize=8)
        axis.set_xlabel(AXIS_LABELS.get(line.axis, line.axis))
    axes[0][0].set_ylabel(f"overhead over {swept[0].cases[0].baseline} (%), 95% intervals")
    figure.legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    return _save(figure, path)


def _draw(axis: Any, points: Sequence[tuple[float, Interval]], shift: float, **style: Any) -> Any:
    """Points with error bars, a little beside their place so that intervals don't cover each other."""
    xs = [place + shift for place, _ in points]
    ys = [interval.median for _, interval in points]
    low = [interval.median - interval.low for _, interval in points]
    high = [interval.high - interval.median for _, interval in points]
    return axis.errorbar(xs, ys, yerr=[low, high], capsize=2, linewidth=1.2, **style)


def throughput(swept: Sequence[Line], path: Path) -> Path:
    """Tokens a second against the number of distinct adapters, a panel for each phase."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(swept), figsize=(4.6 * len(swept) + 0.4, 4.2), squeeze=False)
    shown: dict[str, Any] = {}
    for axis, line in zip(axes.flat, swept):
        labels = [str(case.params["adapters"]) for case in line.cases]
        names = dict.fromkeys(n for c in line.cases for n in c.systems if n != c.control)
        for number, name in enumerate(names):
            points = []
            for place, case in enumerate(line.cases):
                system = case.systems.get(name)
                if system is None or "tokens_per_s" not in system.extra:
                    continue
                count = system.extra["tokens_per_s"] * system.time.median
                points.append(
                    (
                        place,
                        Interval(
                            count / system.time.median, count / system.time.high, count / system.time.low
                        ),
                    )
                )
            single = line.cases[-1].systems.get(name)
            label = name
            if single is not None and single.extra.get("adapters_served") == 1:
                label += " (one adapter for all)"
            shift = 0.05 * (number - (len(names) - 1) / 2)
            colour = "0.3" if name == line.cases[0].baseline else _colour(name)
            shown[label] = _draw(axis, points, shift, fmt="o-", color=colour, ms=4)
        axis.set_xticks(range(len(labels)), labels)
        axis.set_ylim(0, None)
        axis.set_title(
            f"{line.fixed['phase']}, positions {line.fixed['positions']}, batch {line.fixed['batch']}",
            fontsize=9,
        )
        axis.set_xlabel(AXIS_LABELS["adapters"])
    axes[0][0].set_ylabel("tokens a second, 95% intervals")
    figure.legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    return _save(figure, path)


# The op alone, and training ------------------------------------------------------------------------------


def kernel_lines(results: Results) -> list[Line]:
    """Sweeps over T; each has a panel."""
    return lines(results, "rows")


def kernels(results: Results, path: Path, fractions: bool) -> Path:
    """Time of a call against T with its floor, or the fraction of the floor that is reached."""
    pyplot = _pyplot()
    swept = kernel_lines(results)
    figure, axes = pyplot.subplots(
        1, len(swept), figsize=(4.4 * len(swept) + 0.4, 4.2), squeeze=False, sharey=True
    )
    shown: dict[str, Any] = {}
    for axis, line in zip(axes.flat, swept):
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
                shown[name] = _draw(axis, points, 0.0, fmt="o-", color=_colour(name), ms=4)
        rows = [case.params["rows"] for case in line.cases]
        if fractions:
            axis.axhline(100, color="0.4", linewidth=0.8)
        else:
            floors = [1e6 * case.floor["floor_s"] for case in line.cases if case.floor]
            (shown["floor"],) = axis.plot(rows, floors, "k--", linewidth=1)
            axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xticks(rows, [str(value) for value in rows])
        p = line.fixed
        axis.set_title(
            f"{p['direction']}, {p['dtype']}, d = {p['width']}, rank {p['rank']}\n"
            f"{p['adapters']} adapters, {p['mix']}",
            fontsize=8,
        )
        axis.set_xlabel("rows of h in a call")
    unit = "fraction of the floor reached (%)" if fractions else "time of a call (µs)"
    axes[0][0].set_ylabel(f"{unit}, 95% intervals")
    figure.legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    return _save(figure, path)


def training(results: Results, path: Path) -> Path:
    """Step time over the baseline, and peak memory, of every system in each case."""
    pyplot = _pyplot()
    cases = results.cases
    size = (9.5, 2.6 * len(cases) + 0.6)
    figure, axes = pyplot.subplots(len(cases), 2, figsize=size, squeeze=False)
    for (left, right), case in zip(axes, cases):
        names = [name for name in case.systems if name != case.control]
        control = case.systems[case.control].ratio
        assert control is not None
        left.axvspan(control.low, control.high, color="0.85", label="A/A control")
        left.axvline(1, color="0.4", linewidth=0.8)
        for height, name in enumerate(names):
            system = case.systems[name]
            colour = "0.3" if system.ratio is None else _colour(name)
            middle, bars = _bars(system.ratio or Interval(1.0, 1.0, 1.0))
            left.errorbar(middle, height, xerr=bars, fmt="o", ms=5, capsize=3, color=colour)
            right.barh(height, system.extra["peak_bytes"] / 2**20, color=colour, height=0.6)
        for axis in (left, right):
            axis.set_yticks(range(len(names)), names if axis is left else [""] * len(names))
            axis.set_ylim(len(names) - 0.5, -0.5)
        p = case.params
        left.set_title(
            f"{p['model']}: positions {p['positions']}, rank {p['rank']} on {p['layers']} layers, "
            f"batch {p['batch']}",
            fontsize=8,
        )
        left.set_xlabel(f"step time over {case.baseline} (ratio, 95% interval)")
        left.legend(loc="upper right", fontsize=7)
        right.set_xlabel("peak memory of a step over what it began with (MiB)")
    figure.tight_layout()
    return _save(figure, path)
