"""Known distributions in, right intervals out."""

from __future__ import annotations

import numpy as np
import pytest
from reft_bench import stats
from reft_bench.stats import Interval

REPEATS = 200


def _samples(rng: np.random.Generator, truth: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Times of a system and its baseline with skewed noise, and a drift that both see."""
    drift = np.exp(np.cumsum(rng.normal(0, 0.05, count)))
    noise = rng.lognormal(0, 0.03, (2, count))
    return truth * drift * noise[0], drift * noise[1]


@pytest.mark.parametrize("count", [15, 31])
def test_paired_intervals_hold_the_true_ratio(count):
    rng = np.random.default_rng(0)
    held = sum(stats.paired_ratio(*_samples(rng, 1.1, count)).holds(1.1) for _ in range(REPEATS))
    # 95% in the long run; a binomial of 200 lies within ±4% nearly always, and the bootstrap of a median
    # is known to be a little wide or narrow for few samples.
    assert 0.90 <= held / REPEATS <= 0.995


def test_pairing_cancels_a_drift_that_both_see():
    rng = np.random.default_rng(1)
    system, baseline = _samples(rng, 1.2, 31)
    paired = stats.paired_ratio(system, baseline)
    unpaired = stats.share(system, baseline)
    assert paired.holds(1.2)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_median_intervals_narrow_with_more_samples():
    rng = np.random.default_rng(2)
    widths = []
    for count in (10, 160):
        intervals = [stats.median_interval(rng.normal(5, 1, count)) for _ in range(50)]
        widths.append(np.mean([interval.high - interval.low for interval in intervals]))
    # As the square root of the count: a quarter.
    assert 0.15 < widths[1] / widths[0] < 0.4


def test_differences_have_the_samples_unit():
    difference = stats.paired_difference([3.0, 5.0, 9.0], [1.0, 3.0, 7.0])
    assert (difference.median, difference.low, difference.high) == (2.0, 2.0, 2.0)


def test_identical_systems_are_hardly_ever_told_apart():
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(REPEATS):
        system, baseline = _samples(rng, 1.0, 25)
        control, _ = _samples(rng, 1.0, 25)
        against = stats.paired_ratio(baseline * rng.lognormal(0, 0.04, 25), baseline)
        wrong += stats.verdict(stats.paired_ratio(system, baseline), against) != stats.SAME
    assert wrong / REPEATS <= 0.06


@pytest.mark.parametrize(
    ("ratio", "control", "said"),
    [
        (Interval(0.8, 0.7, 0.9), Interval(1.0, 0.99, 1.01), stats.FASTER),
        (Interval(1.3, 1.2, 1.4), Interval(1.0, 0.99, 1.01), stats.SLOWER),
        (Interval(0.98, 0.97, 0.99), Interval(1.0, 0.97, 1.01), stats.SAME),  # inside the control
        (Interval(0.9, 0.7, 1.1), Interval(1.0, 0.99, 1.01), stats.SAME),  # its own interval holds 1
    ],
)
def test_verdicts(ratio, control, said):
    assert stats.verdict(ratio, control) == said


@pytest.mark.parametrize(
    ("system", "baseline", "message"),
    [
        ([], [], "at least one sample"),
        ([1.0], [1.0, 2.0], "can't be paired"),
        ([1.0, float("nan")], [1.0, 2.0], "not finite"),
        ([1.0, 2.0], [1.0, 0.0], "not positive"),
    ],
)
def test_bad_samples_are_refused(system, baseline, message):
    with pytest.raises(ValueError, match=message):
        stats.paired_ratio(system, baseline)


def test_a_fitted_line_holds_the_truth():
    rng, places = np.random.default_rng(4), (2, 8, 32)
    held = np.zeros(2)
    for _ in range(REPEATS):
        samples = [(5 + 3 * place) + rng.normal(0, place, 25) for place in places]
        at_zero, slope = stats.fitted_line(places, samples)
        held += at_zero.holds(5), slope.holds(3)
    assert (held / REPEATS >= 0.90).all() and (held / REPEATS <= 0.995).all()


@pytest.mark.parametrize(
    ("places", "samples", "message"),
    [
        ([2], [[1.0]], "two or more"),
        ([2, 2], [[1.0], [1.0]], "all different"),
        ([0, 2], [[1.0], [1.0]], "positive"),
        ([1, 2], [[1.0]], "1 lists for 2 places"),
        ([1, 2], [[1.0], []], "at least one sample"),
    ],
)
def test_a_line_needs_places_and_samples(places, samples, message):
    with pytest.raises(ValueError, match=message):
        stats.fitted_line(places, samples)
