"""The command `reft-bench compare OLD NEW`: what got slower, and where noise would have hidden that.

Exit status, for people and for CI: 0 where nothing got slower and a change of the size asked about would have
shown; 1 where something got slower by that much; 2 for bad input; 3 where nothing shows as slower, but noise
hides a change of that size somewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..records import answers, record, stats
from ..records.record import CaseResult, ResultError, Results
from ..records.stats import Interval
from ..records.tables import interval_text

#: A run has many cases: at 95% one in forty would cry wolf on either side.
CONFIDENCE = 0.99
SLOWER, FASTER, SAME, HIDDEN = "slower", "faster", "no such change", "too noisy to tell"

NOTHING_SLOWER, SOMETHING_SLOWER, TOO_NOISY = 0, 1, 3


@dataclasses.dataclass(frozen=True)
class Change:
    """A system in a case: new over old, of its ratio to the baseline or of its time.

    noise: the least relative change that would have shown: from the median to the farther end of the
        interval, and how far the baseline stood from itself in either run.
    rounds: of the run that had fewer.
    """

    case: str
    system: str
    ratio: Interval
    noise: float
    verdict: str
    rounds: int


def _relative(case: CaseResult, name: str) -> np.ndarray:
    """Ratio to the baseline in each round; 1 where it is the baseline itself."""
    return np.asarray(case.systems[name].samples) / np.asarray(case.systems[case.baseline].samples)


def verdict(ratio: Interval, controls: float, size: float) -> tuple[str, float]:
    """What a ratio says of a change of this size, and the least change that would have shown.

    Args:
        ratio: new over old.
        controls: how far the baselines stood from themselves, as a share.
        size: relative change that is asked about.
    """
    noise = answers.half_width(ratio) + controls
    if ratio.low > 1 + controls and ratio.median >= 1 + size:
        return SLOWER, noise
    if ratio.high < 1 - controls and ratio.median <= 1 - size:
        return FASTER, noise
    return (SAME if noise < size else HIDDEN), noise


def changes(old: Results, new: Results, size: float, absolute: bool) -> list[Change]:
    """One change for every system of every case that both runs have.

    Args:
        size: relative change that is asked about.
        absolute: compare times; otherwise each run's ratios to its own baseline, which cancels a machine
            that was slower as a whole.
    """
    found = []
    for case in new.cases:
        before = old.case(case.id)
        if before is None:
            continue
        controls = answers.control_noise(case) + answers.control_noise(before)
        for name in case.systems:
            if name == case.control or name not in before.systems or (name == case.baseline and not absolute):
                continue
            if absolute:
                pair = case.systems[name].samples, before.systems[name].samples
            else:
                pair = _relative(case, name).tolist(), _relative(before, name).tolist()
            ratio = stats.share(*pair, confidence=CONFIDENCE)
            rounds = min(len(samples) for samples in pair)
            said, noise = verdict(ratio, controls, size)
            found.append(Change(case.id, name, ratio, noise, said, rounds))
    return found


def differences(old: Results, new: Results) -> list[str]:
    """Facts about machine and versions that differ and may be why."""
    found = []
    for key in ("cpu", "gpu", "threads", "device", "versions"):
        before, after = old.machine.get(key), new.machine.get(key)
        if before != after:
            found.append(f"{key}: {before} → {after}")
    return found


def size_of(text: str) -> float:
    """ "1%" or "0.01" → 0.01. Raises ResultError."""
    digits = text.strip()
    try:
        size = float(digits[:-1]) / 100 if digits.endswith("%") else float(digits)
    except ValueError:
        size = -1.0
    if not 0 < size < 1:
        raise ResultError(f"--change: must be above 0% and below 100%, as 1% or 0.01, was {text!r}")
    return size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--change",
        default="3%",
        metavar="SIZE",
        help="the change that is asked about, as 1%% or 0.01 (default: 3%%). Exit status 1: something got "
        "slower by that much; 3: nothing shows, but noise hides a change of that size somewhere",
    )
    parser.add_argument(
        "--absolute", action="store_true", help="compare times, not ratios to the run's own baseline"
    )
    parser.add_argument("--only", help="systems whose names contain this text")


def _table(found: list[Change], what: str) -> Table:
    shown = Table(title=f"{what}, new over old [99%]", title_justify="left")
    for heading in ("case", "system", "new / old", "noise hides less than", "verdict"):
        shown.add_column(heading)
    for change in found:
        style = {SLOWER: "red", FASTER: "green", HIDDEN: "yellow"}.get(change.verdict, "")
        cells = (interval_text(change.ratio), f"{change.noise:.1%}", change.verdict)
        shown.add_row(change.case, change.system, *cells, style=style)
    return shown


def summary(found: list[Change], size: float) -> list[str]:
    """What all changes say of one of this size."""
    slower = sum(change.verdict == SLOWER for change in found)
    said = [f"{slower} of {len(found)} got slower by {size:.1%} or more."]
    hidden = [change for change in found if change.verdict == HIDDEN]
    if hidden:
        worst = max(hidden, key=lambda change: change.noise)
        advice = answers.advice(worst.rounds, worst.noise, size)
        said.append(
            f"In {len(hidden)} of {len(found)} noise hides a change of {size:.1%}; one of {worst.noise:.1%} "
            f"would show in all (--change). To see {size:.1%}, measure both again: {advice}."
        )
    return said


def run(args: argparse.Namespace, console: Console) -> int:
    """Exit status as in the module's docstring; ResultError where the runs have nothing to compare."""
    old, new = record.load(args.old), record.load(args.new)
    size = size_of(args.change)
    if old.command != new.command:
        raise ResultError(f"{args.old} is of {old.command!r}, {args.new} of {new.command!r}")
    found = changes(old, new, size, args.absolute)
    if args.only:
        found = [change for change in found if args.only in change.system]
    if not found:
        raise ResultError(f"{args.old} and {args.new} have no system of a case in common")
    for difference in differences(old, new):
        console.print(f"[yellow]note:[/] {difference}", highlight=False)
    console.print(_table(found, "time" if args.absolute else "ratio to the baseline"))
    missing = sorted({case.id for case in old.cases} - {case.id for case in new.cases})
    if missing:
        console.print(f"[yellow]note:[/] not in the new run: {', '.join(missing)}", highlight=False)
    for text in summary(found, size):
        console.print(text, highlight=False)
    verdicts = {change.verdict for change in found}
    return SOMETHING_SLOWER if SLOWER in verdicts else TOO_NOISY if HIDDEN in verdicts else NOTHING_SLOWER
