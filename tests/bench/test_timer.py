"""Sampling: interleaved, paired, and as long as it says."""

from __future__ import annotations

import gc
import time

import pytest
from reft_bench.measure.timer import Candidate, CpuClock, interleave, interleaved


def _busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_every_round_takes_every_name_once_in_changing_order():
    taken: list[str] = []
    rounds: list[list[str]] = []

    def on_round() -> None:
        rounds.append(taken[-3:])

    samples = interleaved(["a", "b", "c"], lambda name: taken.append(name) or len(taken), 12, 0, on_round)
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2
    assert [taken[place - 1] for place in samples["b"]] == ["b"] * 12
    assert gc.isenabled()


@pytest.mark.parametrize(("names", "rounds", "message"), [(["a"], 1, "at least 2"), (["a", "a"], 3, "twice")])
def test_bad_requests_are_refused(names, rounds, message):
    with pytest.raises(ValueError, match=message):
        interleaved(names, lambda name: 0, rounds)


def test_samples_are_seconds_of_one_call():
    calls = {"short": 2e-5, "long": 2e-4}
    candidates = [Candidate(name, [lambda s=s: _busy(s)]) for name, s in calls.items()]
    samples = interleave(candidates, CpuClock(span=1e-3), rounds=9)
    for name, seconds in calls.items():
        # The fastest sample is the one that nothing disturbed.
        assert seconds <= min(samples[name]) < 1.5 * seconds


def test_what_runs_before_a_call_is_not_timed():
    order: list[str] = []

    def before() -> None:
        order.append("before")
        _busy(3e-3)

    candidate = Candidate("a", [lambda: order.append("call")], before=before)
    samples = interleave([candidate], CpuClock(warmup=1), rounds=5)
    assert order == ["before", "call"] * 6
    assert min(samples["a"]) < 1e-3


def test_rotated_inputs_are_all_called():
    seen: list[int] = []
    calls = [lambda n=n: seen.append(n) for n in range(3)]
    CpuClock().sample(Candidate("a", calls), passes=2)
    assert seen == [0, 1, 2, 0, 1, 2]
