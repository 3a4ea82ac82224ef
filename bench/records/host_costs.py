"""What the cases of `reft-bench host` say together: what a layer costs, and what a step does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import stats
from .record import CaseResult, Results
from .stats import Interval

#: By the mode of a case.
TITLES = {
    "generate": "A decode step of generate",
    "forward": "A decode step in a loop of one's own",
    "compiled": "A compiled decode step of generate",
}


def depths(results: Results) -> list[list[CaseResult]]:
    """The cases that differ in their number of layers only, fewest first."""
    found: dict[tuple[Any, ...], list[CaseResult]] = {}
    for case in results.cases:
        same = tuple((key, value) for key, value in case.params.items() if key != "layers")
        found.setdefault(same, []).append(case)
    return [sorted(cases, key=lambda case: case.params["layers"]) for cases in found.values()]


def costs(case: CaseResult, name: str) -> np.ndarray:
    """Seconds of a step over the bare model's, round by round."""
    return np.asarray(case.systems[name].samples) - np.asarray(case.systems[case.baseline].samples)


def split(cases: Sequence[CaseResult], name: str) -> tuple[Interval, Interval] | None:
    """(seconds a step, seconds a layer) of a system: a line through its costs at each depth.

    None where it was measured at one depth only. The depths were measured in the same rounds.
    """
    there = [case for case in cases if name in case.systems]
    if len(there) < 2:
        return None
    return stats.fitted_line([c.params["layers"] for c in there], [costs(c, name).tolist() for c in there])
