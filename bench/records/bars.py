"""Bar charts on a linear axis that ours sets: what goes beyond it is cut and labelled with its number."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import answers, names
from .plots import attributed_percent, colour, new_figure, save
from .record import CaseResult, Results
from .stats import Interval

#: The axis reaches to so many times the largest effect of ours, and holds its intervals.
REACH, MARGIN = 2.0, 1.1

#: Percent that the axis reaches to at least.
LEAST_REACH = 1.0

#: Inches: wide; a bar; between panels; above and below all panels.
WIDE, LINE, GAP, HEAD, FOOT = 8.6, 0.27, 0.34, 0.66, 0.92

#: Letters in a line of the title, and what each further line takes.
TITLE_WIDTH, TITLE_LINE = 92, 0.18

#: Half the thickness of a bar, and how much of the axis the point of a cut one takes.
HALF, POINT = 0.31, 0.035

INTERVALS = "Bar: median of the rounds. Line: its 95 % interval."
NOISE = " Grey: the baseline beside itself (A/A), which is noise alone."
CUT = " Pointed: cut at the axis' end; the number says how far it goes."
MARK = " White diamond: what the system's own code takes, timed apart."


@dataclasses.dataclass(frozen=True)
class Bar:
    """label: what stands before it; text: after it. mark: what was timed apart."""

    label: str
    value: Interval
    text: str
    colour: str
    mark: float | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """Bars under a title. noise: the control's interval, drawn behind them."""

    title: str
    bars: list[Bar]
    noise: Interval | None = None


def reach(effects: Sequence[Interval]) -> float:
    """Where an axis for these effects of ours ends on either side of 0."""
    found = LEAST_REACH
    for effect in effects:
        found = max(found, REACH * abs(effect.median), MARGIN * max(abs(effect.low), abs(effect.high)))
    return found


def order(command: str, case: CaseResult) -> list[str]:
    """The systems with a ratio: ours, the control, then the others."""
    there = [name for name, system in case.systems.items() if system.ratio is not None]
    return sorted(there, key=lambda name: 0 if names.is_ours(command, name) else 1 + (name != case.control))


def signed(value: float) -> str:
    """ "+1.0", with a minus as wide as the plus; never −0.0."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


def _bar(axis: Any, bar: Bar, height: int, ends: tuple[float, float]) -> None:
    low, high = ends
    value = bar.value
    if low <= value.median <= high:
        axis.barh(height, value.median, height=2 * HALF, color=bar.colour, zorder=2)
        if value.low < value.high:
            axis.hlines(height, max(value.low, low), min(value.high, high), "0.1", linewidth=1.1, zorder=3)
            seen = [end for end in (value.low, value.high) if low <= end <= high]
            axis.plot(seen, [height] * len(seen), "|", markersize=6, color="0.1", zorder=3)
    else:
        tip = low if value.median < low else high
        back = tip - POINT * (high - low) * (1 if tip == high else -1)
        upper, lower = height - HALF, height + HALF
        axis.fill(
            [0, back, tip, back, 0], [upper, upper, height, lower, lower], color=bar.colour, lw=0, zorder=2
        )
        style = {"color": "white", "fontsize": 8, "fontweight": "bold", "va": "center", "zorder": 4}
        axis.text(
            back, height, bar.text.split(" ±")[0] + " %", ha="right" if tip == high else "left", **style
        )
    if bar.mark is not None and low <= bar.mark <= high:
        axis.plot([bar.mark], [height], "D", markersize=5, mfc="white", mec="0.1", mew=1.0, zorder=4)
    axis.text(1.015, height, bar.text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)


def chart(
    panels: Sequence[Panel], ends: tuple[float, float], title: str, unit: str, note: str, path: Path
) -> Path:
    """Panels one below the other, all on one axis.

    Args:
        ends: of the axis.
        title: what is seen. unit: what the axis shows. note: how to read it, below all.
    """
    title = textwrap.fill(title, TITLE_WIDTH)
    head = HEAD + TITLE_LINE * title.count("\n")
    tall = head + FOOT + sum(LINE * len(panel.bars) + GAP for panel in panels) - GAP
    figure = new_figure((WIDE, tall))
    top = tall - head
    for panel in panels:
        height = LINE * len(panel.bars)
        axis = figure.add_axes((0.245, (top - height) / tall, 0.6, height / tall))
        top -= height + GAP
        if panel.noise is not None:
            axis.axvspan(max(panel.noise.low, ends[0]), min(panel.noise.high, ends[1]), color="0.88", lw=0)
        axis.axvline(0, color="0.3", linewidth=0.9)
        for place, bar in enumerate(panel.bars):
            _bar(axis, bar, place, ends)
        axis.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelbottom=panel is panels[-1])
        axis.set_ylim(len(panel.bars) - 0.5, -0.5)
        axis.set_xlim(*ends)
        axis.grid(axis="y", visible=False)
        axis.set_title(panel.title, fontsize=9, loc="left")
    axis.set_xlabel(unit)
    figure.text(0.02, 1 - 0.1 / tall, title, fontsize=10.5, fontweight="bold", va="top")
    figure.text(0.02, 0.08 / tall, note, fontsize=7.5, color="0.3", va="bottom", linespacing=1.4)
    return save(figure, path)


def _note(panels: Sequence[Panel], limit: float) -> str:
    bars = [bar for panel in panels for bar in panel.bars]
    text = INTERVALS + (NOISE if any(panel.noise for panel in panels) else "")
    more = CUT if any(abs(bar.value.median) > limit for bar in bars) else ""
    more += MARK if any(bar.mark is not None for bar in bars) else ""
    return text + "\n" + more.strip()


def overheads(
    command: str, cases: Sequence[CaseResult], titles: Sequence[str], title: str, path: Path, more: int = 0
) -> Path:
    """The times of all systems over the baseline, a panel for each case; `more` cases are in tables alone."""
    panels, of_ours = [], []
    for case, text in zip(cases, titles):
        bars = []
        for name in order(command, case):
            system = case.systems[name]
            assert system.ratio is not None
            over, apart = answers.percent_over(system.ratio), attributed_percent(system)
            if names.is_ours(command, name):
                of_ours.append(over)
            shown = f"{signed(over.median)} ± {answers.half_width(over):.1f} %"
            mark = apart and apart.median
            bars.append(Bar(names.label(command, name), over, shown, colour(name), mark))
        control = case.systems[case.control].ratio
        panels.append(Panel(text, bars, control and answers.percent_over(control)))
    limit = reach(of_ours)
    unit = f"time over {answers.baseline_text(cases[0])} (%)"
    note = _note(panels, limit) + (f" {more} more cases: in the tables." if more else "")
    return chart(panels, (-limit, limit), title, unit, note, path)


def phases(results: Results, cases: Sequence[CaseResult], folder: Path, most: int) -> list[tuple[str, Path]]:
    """A chart for each phase, of at most so many cases; returns what each shows, and its file."""
    found: dict[str, list[CaseResult]] = {}
    for case in cases:
        found.setdefault(names.phase_text(case.params), []).append(case)
    varied = names.differing(case.params for case in cases)
    drawn = []
    for phase, there in found.items():
        shown, more = there[:most], len(there[most:])
        of_ours = [(case, name) for case in shown if (name := answers.ours(results, case.systems))]
        title = answers.headline(phase, of_ours) if of_ours else f"{phase}: time over {there[0].baseline}"
        titles = [names.case_text(case.params, varied) for case in shown]
        of_file = [results.command, there[0].params["phase"]]
        of_file += ["compiled"] if there[0].params.get("compiled") else []
        path = folder / f"{'-'.join(dict.fromkeys(of_file))}.png"
        if path in (before for _, before in drawn):  # generations of another length
            path = path.with_stem(f"{path.stem}-{there[0].params['new_tokens']}")
        drawn.append((title, overheads(results.command, shown, titles, title, path, more)))
    return drawn


def memory(results: Results, path: Path) -> tuple[str, Path]:
    """Peak memory of training steps beyond the baseline's; returns what is seen, and the file."""
    panels, most = [], 0.0
    varied = names.differing(case.params for case in results.cases)
    for case in results.cases:
        bars = []
        for name in order("train", case):
            if name != case.control:
                beyond = answers.mebibytes_beyond(case, name)
                most = max(most, abs(beyond))
                value = Interval(beyond, beyond, beyond)
                bars.append(Bar(names.label("train", name), value, f"{signed(beyond)} MiB", colour(name)))
        panels.append(Panel(names.case_text(case.params, varied), bars))
    title = answers.memory_headline(results)
    base = answers.baseline_text(results.cases[0])
    unit = f"peak memory beyond that of {base} (MiB)"
    lowest = min(bar.value.median for panel in panels for bar in panel.bars)
    ends = (-1.1 * most if lowest < -0.02 * most else 0.0, 1.1 * most)
    note = "What a step allocates at its peak, beyond what there was when it began."
    return title, chart(panels, ends, title, unit, note, path)
