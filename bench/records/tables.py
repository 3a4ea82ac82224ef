"""Results as tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from . import answers
from .record import Results, SystemResult
from .stats import Interval


def time_text(seconds: float) -> str:
    """A time with a unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def interval_text(interval: Interval, scale: float = 1.0, digits: int = 3) -> str:
    scaled = interval.scaled(scale)
    return f"{scaled.median:.{digits}f} [{scaled.low:.{digits}f}, {scaled.high:.{digits}f}]"


def attributed_text(system: SystemResult) -> str:
    share = system.extra.get("attributed_share")
    return "" if share is None else interval_text(Interval.from_json(share), 100) + " %"


def conclude(console: Console, results: Results) -> None:
    """What a run says, a sentence a line."""
    for text in answers.sentences(results):
        console.print(f"• {text}", highlight=False)


def overhead_table(results: Results) -> Table:
    shown = Table(title=f"Over {results.settings['model']} with a merged LoRA", title_justify="left")
    for heading in ("case", "system"):
        shown.add_column(heading, no_wrap=heading == "system")
    for heading in ("time", "ratio [95%]", "attributed"):
        shown.add_column(heading, justify="right")
    shown.add_column("verdict")
    for case in results.cases:
        label = case.id
        for name, system in case.systems.items():
            ratio = "1" if system.ratio is None else interval_text(system.ratio)
            cells = (time_text(system.time.median), ratio, attributed_text(system), system.verdict or "")
            shown.add_row(label, name, *cells)
            label = ""
        shown.add_section()
    return shown


def train_table(results: Results) -> Table:
    title = f"Training steps on {results.settings['model']}, over one trainable vector"
    shown = Table(title=title, title_justify="left")
    for heading in ("case", "system"):
        shown.add_column(heading, no_wrap=heading == "system")
    for heading in ("time", "ratio [95%]", "peak memory", "trained"):
        shown.add_column(heading, justify="right")
    shown.add_column("verdict")
    for case in results.cases:
        label = case.id
        for name, system in case.systems.items():
            ratio = "1" if system.ratio is None else interval_text(system.ratio)
            peak = f"{system.extra['peak_bytes'] / 2**20:.1f} MiB"
            trained = f"{system.extra['trained_parameters']:,}"
            shown.add_row(
                label, name, time_text(system.time.median), ratio, peak, trained, system.verdict or ""
            )
            label = ""
        shown.add_section()
    return shown
