"""Statistics of interleaved timings: medians, bootstrap intervals of paired ratios, and verdicts.

Samples are paired: sample i of every system was taken in round i, within moments of each other, so slow
drifts of the machine (clock rate, a neighbour's load) cancel in the ratio of a round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95

FASTER, SLOWER, SAME = "faster", "slower", "not distinguishable"


@dataclasses.dataclass(frozen=True)
class Interval:
    """A median with its bootstrap confidence interval; the unit is that of the samples."""

    median: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high

    def scaled(self, factor: float) -> Interval:
        return Interval(self.median * factor, self.low * factor, self.high * factor)

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, float]) -> Interval:
        return cls(float(data["median"]), float(data["low"]), float(data["high"]))


def _checked(samples: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: must hold at least one sample, had shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds a sample that is not finite")
    return array


def _resampled(
    estimate: Callable[[np.ndarray], np.ndarray], count: int, seed: int, resamples: int
) -> np.ndarray:
    """`estimate` of index arrays [resamples, count], drawn with replacement."""
    rng = np.random.default_rng(seed)
    return estimate(rng.integers(0, count, size=(resamples, count)))


def _ends(values: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """The median of samples with its percentile bootstrap interval."""
    array = _checked(samples, "samples")
    medians = _resampled(lambda index: np.median(array[index], axis=1), len(array), seed, RESAMPLES)
    return Interval(float(np.median(array)), *_ends(medians, confidence))


def _paired(system: Sequence[float], baseline: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(system, "system"), _checked(baseline, "baseline")
    if len(a) != len(b):
        raise ValueError(f"system: {len(a)} samples can't be paired with the baseline's {len(b)}")
    return a, b


def paired_ratio(
    system: Sequence[float], baseline: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """The median of the rounds' ratios system / baseline; the bootstrap draws whole rounds.

    Args:
        system, baseline: one sample a round, in the same order; positive.

    Raises:
        ValueError: no samples, lengths that differ, or a baseline sample that is not positive.
    """
    a, b = _paired(system, baseline)
    if (b <= 0).any():
        raise ValueError("baseline: holds a sample that is not positive")
    return median_interval(a / b, confidence, seed)


def paired_difference(
    system: Sequence[float], baseline: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """The median of the rounds' differences system − baseline, in the samples' unit."""
    a, b = _paired(system, baseline)
    return median_interval(a - b, confidence, seed)


def fitted_line(
    places: Sequence[float],
    samples: Sequence[Sequence[float]],
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[Interval, Interval]:
    """(value at 0, slope) of the line through the medians of the samples that were taken at each place.

    The medians weigh 1 / place: what is measured at a place is taken to scatter in proportion to it. Each
    place's samples are resampled by themselves.

    Args:
        places: at least two, positive and all different.

    Raises:
        ValueError: for other places, or if they are not as many as the lists of samples.
    """
    x = np.asarray(places, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2 or len(set(x)) != len(x) or not (x > 0).all():
        raise ValueError(f"places: must be two or more positive numbers, all different, were {list(places)}")
    if len(samples) != len(x):
        raise ValueError(f"samples: {len(samples)} lists for {len(x)} places")
    arrays = [_checked(taken, "samples") for taken in samples]
    weights = 1.0 / x
    solve = np.linalg.pinv(weights[:, None] * np.stack([np.ones_like(x), x], axis=1)) * weights
    drawn = [
        _resampled(lambda index, a=array: np.median(a[index], axis=1), len(array), seed + number, RESAMPLES)
        for number, array in enumerate(arrays)
    ]
    found = solve @ np.array([np.median(array) for array in arrays])
    at_zero, slope = (
        Interval(float(middle), *_ends(values, confidence))
        for middle, values in zip(found, solve @ np.stack(drawn))
    )
    return at_zero, slope


def share(
    part: Sequence[float], whole: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """median(part) / median(whole) of samples that are not paired, both resampled by themselves."""
    a, b = _checked(part, "part"), _checked(whole, "whole")
    top = _resampled(lambda index: np.median(a[index], axis=1), len(a), seed, RESAMPLES)
    bottom = _resampled(lambda index: np.median(b[index], axis=1), len(b), seed + 1, RESAMPLES)
    return Interval(float(np.median(a) / np.median(b)), *_ends(top / bottom, confidence))


def verdict(ratio: Interval, control: Interval) -> str:
    """What a ratio says, given the A/A control (the baseline against itself in the same run).

    "not distinguishable" where the ratio lies inside the control's interval or its own interval holds 1;
    otherwise "faster" or "slower" than the baseline.
    """
    if control.holds(ratio.median) or ratio.holds(1.0):
        return SAME
    return FASTER if ratio.median < 1.0 else SLOWER
