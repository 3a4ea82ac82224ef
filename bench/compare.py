"""The command `reft-bench compare OLD NEW`: what got slower beyond the noise, for people and for CI."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from . import record, stats
from .record import CaseResult, ResultError, Results
from .stats import Interval
from .tables import interval_text

#: A run has many cases: at 95% one in forty would cry wolf on either side.
CONFIDENCE = 0.99
SLOWER, FASTER, SAME = "slower", "faster", "within the noise"


@dataclasses.dataclass(frozen=True)
class Change:
    """A system in a case: new over old, of its ratio to the baseline or of its time."""

    case: str
    system: str
    ratio: Interval
    margin: float
    verdict: str


def _relative(case: CaseResult, name: str) -> np.ndarray:
    """Ratio to the baseline in each round; 1 where it is the baseline itself."""
    return np.asarray(case.systems[name].samples) / np.asarray(case.systems[case.baseline].samples)


def _control_margin(case: CaseResult) -> float:
    """How far the baseline stood from itself: the control's interval, farther end."""
    control = case.systems[case.control].ratio
    return 0.0 if control is None else max(abs(control.low - 1), abs(control.high - 1))


def changes(old: Results, new: Results, threshold: float, absolute: bool) -> list[Change]:
    """One change for every system of every case that both runs have.

    Args:
        threshold: least relative change that counts; each run's A/A control is added to it.
        absolute: compare times; otherwise each run's ratios to its own baseline, which cancels a machine
            that was slower as a whole.
    """
    found = []
    for case in new.cases:
        before = old.case(case.id)
        if before is None:
            continue
        margin = threshold + _control_margin(case) + _control_margin(before)
        for name in case.systems:
            if name == case.control or name not in before.systems or (name == case.baseline and not absolute):
                continue
            if absolute:
                pair = case.systems[name].samples, before.systems[name].samples
            else:
                pair = _relative(case, name).tolist(), _relative(before, name).tolist()
            ratio = stats.share(*pair, confidence=CONFIDENCE)
            verdict = SLOWER if ratio.low > 1 + margin else FASTER if ratio.high < 1 - margin else SAME
            found.append(Change(case.id, name, ratio, margin, verdict))
    return found


def differences(old: Results, new: Results) -> list[str]:
    """Facts about machine and versions that differ and may be why."""
    found = []
    for key in ("cpu", "gpu", "threads", "device", "versions"):
        before, after = old.machine.get(key), new.machine.get(key)
        if before != after:
            found.append(f"{key}: {before} → {after}")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.03, help="least relative change that counts (0.03)"
    )
    parser.add_argument(
        "--absolute", action="store_true", help="compare times, not ratios to the run's own baseline"
    )
    parser.add_argument("--only", help="systems whose names contain this text")


def run(args: argparse.Namespace, console: Console) -> int:
    """0: nothing got slower; 1: something did; 2 (ResultError): the runs have nothing to compare."""
    old, new = record.load(args.old), record.load(args.new)
    if not 0 <= args.threshold < 1:
        raise ResultError(f"--threshold: must be in [0, 1), was {args.threshold}")
    if old.command != new.command:
        raise ResultError(f"{args.old} is of {old.command!r}, {args.new} of {new.command!r}")
    found = changes(old, new, args.threshold, args.absolute)
    if args.only:
        found = [change for change in found if args.only in change.system]
    if not found:
        raise ResultError(f"{args.old} and {args.new} have no system of a case in common")
    for difference in differences(old, new):
        console.print(f"[yellow]note:[/] {difference}", highlight=False)
    what = "time" if args.absolute else "ratio to the baseline"
    shown = Table(title=f"{what}, new over old [99%]", title_justify="left")
    for heading in ("case", "system", "new / old", "noise and threshold", "verdict"):
        shown.add_column(heading)
    for change in found:
        style = {SLOWER: "red", FASTER: "green"}.get(change.verdict, "")
        cells = (interval_text(change.ratio), f"±{change.margin:.1%}", change.verdict)
        shown.add_row(change.case, change.system, *cells, style=style)
    console.print(shown)
    slower = [change for change in found if change.verdict == SLOWER]
    missing = sorted({case.id for case in old.cases} - {case.id for case in new.cases})
    if missing:
        console.print(f"[yellow]note:[/] not in the new run: {', '.join(missing)}", highlight=False)
    console.print(f"{len(slower)} of {len(found)} got slower beyond the noise.")
    return 1 if slower else 0
