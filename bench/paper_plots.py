"""One figure of four panels: the overhead over merged LoRA against rank, layers, positions and adapters.

The axis is linear, so that what the eye compares is what a user pays. A peer that costs many times as much
would press all else to the floor; where one leaves its panel, a line of text says how high it goes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import plots
from .plots import AXIS_LABELS, Line, attributed_percent, percent_over
from .record import Results
from .stats import Interval

PANELS = ("rank", "layers", "positions", "adapters")

#: A panel reaches so many times as high as this package's highest interval, and so many percent at least.
HEADROOM, LEAST_TOP = 2.0, 5.0

OURS = "reft_kernels"


def lines_of(results: Results, phase: str) -> dict[str, Line] | None:
    """Of a phase the longest sweep along each axis; None unless there is one along all four."""
    found: dict[str, Line] = {}
    for axis in PANELS:
        swept = [line for line in plots.lines(results, axis) if line.fixed["phase"] == phase]
        if not swept:
            return None
        found[axis] = max(swept, key=lambda line: len(line.cases))
    return found


def draw(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """A file for each phase that was swept along all four axes: (its title, its path)."""
    drawn = []
    for phase in dict.fromkeys(case.params["phase"] for case in results.cases):
        swept = lines_of(results, phase)
        if swept is None:
            continue
        path = folder / f"overhead-four-{phase}.png"
        shown = figure(swept)
        shown.savefig(path, dpi=plots.DPI, bbox_inches="tight")
        _pyplot().close(shown)
        drawn.append((f"Overhead of {phase} against rank, layers, positions and adapters", path))
    return drawn


def _pyplot() -> Any:
    from matplotlib import pyplot

    return pyplot


def points(line: Line, name: str) -> tuple[list[tuple[int, Interval]], list[tuple[int, Interval]]]:
    """(from totals, attributed) of a system: (place along the axis, percent of the baseline)."""
    totals, parts = [], []
    for place, case in enumerate(line.cases):
        system = case.systems.get(name)
        if system is None or system.ratio is None:
            continue
        totals.append((place, percent_over(system.ratio)))
        part = attributed_percent(system)
        if part is not None:
            parts.append((place, part))
    return totals, parts


def figure(swept: dict[str, Line]) -> Any:
    """The four panels of one phase, side by side in two rows."""
    shown, axes = _pyplot().subplots(2, 2, figsize=(9.6, 8.0))
    handles: dict[str, Any] = {}
    for panel, line in zip(axes.flat, swept.values()):
        _draw_panel(panel, line, handles)
    for panel in axes[:, 0]:
        panel.set_ylabel(f"overhead over {next(iter(swept.values())).cases[0].baseline} (%), 95% intervals")
    shown.legend(
        handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False
    )
    shown.tight_layout()
    return shown


def _draw_panel(panel: Any, line: Line, handles: dict[str, Any]) -> None:
    first = line.cases[0]
    places = range(len(line.cases))
    controls = [percent_over(case.systems[case.control].ratio) for case in line.cases]  # type: ignore[arg-type]
    handles["A/A control"] = panel.fill_between(
        places, [c.low for c in controls], [c.high for c in controls], color="0.85"
    )
    panel.axhline(0, color="0.4", linewidth=0.8)
    others = (first.baseline, first.control)
    names = dict.fromkeys(name for case in line.cases for name in case.systems if name not in others)
    top, bottom = max(LEAST_TOP, *(c.high for c in controls)), min(-2.0, *(c.low for c in controls))
    highest: dict[str, float] = {}
    for number, name in enumerate(names):
        totals, parts = points(line, name)
        shift = 0.05 * (number - (len(names) - 1) / 2)
        colour = plots.COLOURS.get(name, "0.5")
        handles[name] = _errorbar(panel, totals, shift, fmt="o-", color=colour)
        if parts:
            style = {"fmt": "D:", "color": colour, "markerfacecolor": "white"}
            handles[f"{name}, {plots.ATTRIBUTED}"] = _errorbar(panel, parts, shift, **style)
        highest[name] = max((interval.median for _, interval in totals), default=0.0)
        bottom = min(bottom, *(interval.low for _, interval in (*totals, *parts)))
        if name.startswith(OURS):
            top = max(top, *(HEADROOM * interval.high for _, interval in (*totals, *parts)))
    above = [f"{name} up to {value:.0f}%" for name, value in highest.items() if value > top]
    if above:
        text = "above: " + "\n".join(above)
        panel.text(0.02, 0.98, text, transform=panel.transAxes, va="top", fontsize=7, color="0.3")
    panel.set_ylim(1.1 * bottom, top)
    panel.set_xticks(list(places), [str(case.params[line.axis]) for case in line.cases])
    panel.grid(alpha=0.3)
    panel.set_xlabel(AXIS_LABELS[line.axis])
    kept = [key for key in (*PANELS, "batch", "prompt") if key in line.fixed]
    panel.set_title(", ".join(f"{key} {line.fixed[key]}" for key in kept), fontsize=8)


def _errorbar(panel: Any, found: list[tuple[int, Interval]], shift: float, **style: Any) -> Any:
    low = [interval.median - interval.low for _, interval in found]
    high = [interval.high - interval.median for _, interval in found]
    return panel.errorbar(
        [place + shift for place, _ in found],
        [interval.median for _, interval in found],
        yerr=[low, high],
        capsize=2,
        linewidth=1.2,
        markersize=4,
        **style,
    )
