"""Interleaved sampling (A B C, B A C, …) in one process, with warm-up, on a CPU or a GPU.

A clock's sample is the time of one call in seconds, averaged over as many calls as fill a minimal span.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

Call = Callable[[], Any]
T = TypeVar("T")


@dataclasses.dataclass
class Candidate:
    """A system that is timed.

    Attributes:
        name: as in the results.
        calls: what is timed; more than one where inputs rotate so that no cache flatters.
        context: entered around every sample (a backend's choice, for instance), outside the timed span.
        before: run before every single call, outside the timed span (a cache cut back to its prompt).
    """

    name: str
    calls: Sequence[Call]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    before: Callable[[], None] | None = None


class Clock(Protocol):
    """Takes samples of candidates."""

    def building(self) -> contextlib.AbstractContextManager:
        """Entered where the calls of candidates are made."""

    def prepare(self, candidate: Candidate) -> int:
        """Warms a candidate up and returns how many passes over its calls make a sample."""

    def sample(self, candidate: Candidate, passes: int) -> float:
        """Seconds of one call."""


def _untimed_pass(candidate: Candidate) -> None:
    for call in candidate.calls:
        if candidate.before:
            candidate.before()
        call()


class CpuClock:
    """time.perf_counter around calls; a sample fills at least `span` seconds."""

    def __init__(self, span: float = 2e-3, warmup: int = 3) -> None:
        self.span, self.warmup = span, warmup

    building = staticmethod(contextlib.nullcontext)

    def prepare(self, candidate: Candidate) -> int:
        with candidate.context():
            for _ in range(self.warmup):
                _untimed_pass(candidate)
        if candidate.before:
            return 1
        passes = 1
        while True:
            took = self.sample(candidate, passes) * passes * len(candidate.calls)
            if took >= self.span or passes >= 1 << 20:
                return passes
            passes = max(passes + 1, min(10 * passes, int(1.2 * passes * self.span / max(took, 1e-9))))

    def sample(self, candidate: Candidate, passes: int) -> float:
        now = time.perf_counter
        with candidate.context():
            if candidate.before:
                total = 0.0
                for _ in range(passes):
                    for call in candidate.calls:
                        candidate.before()
                        start = now()
                        call()
                        total += now() - start
            else:
                calls = candidate.calls
                start = now()
                for _ in range(passes):
                    for call in calls:
                        call()
                total = now() - start
        return total / (passes * len(candidate.calls))


class CudaEventClock:
    """CUDA events around calls that are launched one by one, as an eager program does."""

    def __init__(self, span: float = 2e-3, warmup: int = 5) -> None:
        self.span, self.warmup = span, warmup
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def building(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def prepare(self, candidate: Candidate) -> int:
        with candidate.context():
            for _ in range(self.warmup):
                _untimed_pass(candidate)
        torch.cuda.synchronize()
        if candidate.before:
            return 1
        took = self.sample(candidate, 1) * len(candidate.calls)
        return max(1, int(self.span / max(took, 1e-7)))

    def _timed(self, launch: Call) -> float:
        self._start.record()
        launch()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3

    def sample(self, candidate: Candidate, passes: int) -> float:
        def launch_all() -> None:
            for _ in range(passes):
                for call in candidate.calls:
                    call()

        with candidate.context():
            if candidate.before:
                total = 0.0
                for call in candidate.calls:
                    candidate.before()
                    total += self._timed(call)
                return total / len(candidate.calls)
            return self._timed(launch_all) / (passes * len(candidate.calls))


#: Calls that a graph holds at least: its own launch, some microseconds, is then a small part of each.
CALLS_OF_A_GRAPH = 48


def passes_of_a_graph(calls: int) -> int:
    """How often a graph holds each of a candidate's calls."""
    return -(-CALLS_OF_A_GRAPH // calls)


class CudaGraphClock(CudaEventClock):
    """CUDA events around replays of a graph that holds every call of a candidate, in turn, once or more.

    The host's launch cost is gone; what remains is the time that a captured decode step would see. All runs
    on a stream of its own, where the calls must be made, too: autograd runs a backward where its forward ran.
    """

    def __init__(self, span: float = 2e-3, warmup: int = 5) -> None:
        super().__init__(span, warmup)
        self._stream = torch.cuda.Stream()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def prepare(self, candidate: Candidate) -> int:
        with candidate.context():
            with self.building():
                for _ in range(self.warmup):
                    _untimed_pass(candidate)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                for _ in range(passes_of_a_graph(len(candidate.calls))):
                    _untimed_pass(candidate)
        self._graphs[id(candidate)] = graph
        graph.replay()
        torch.cuda.synchronize()
        took = self._timed(graph.replay)
        return max(1, int(self.span / max(took, 1e-7)))

    def sample(self, candidate: Candidate, passes: int) -> float:
        graph = self._graphs[id(candidate)]

        def replay_all() -> None:
            for _ in range(passes):
                graph.replay()

        calls = len(candidate.calls)
        return self._timed(replay_all) / (passes * passes_of_a_graph(calls) * calls)


def interleaved(
    names: Sequence[str],
    take: Callable[[str], T],
    rounds: int,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[T]]:
    """What `take` gives for each name, once a round; the order within a round is shuffled.

    The shuffle keeps a system from always finding the caches as the same neighbour left them.

    Returns: name → `rounds` samples, paired by round.
    """
    if rounds < 2:
        raise ValueError(f"rounds: must be at least 2 to give an interval, was {rounds}")
    if len(set(names)) != len(names):
        raise ValueError(f"names: one stands twice in {list(names)}")
    samples: dict[str, list[T]] = {name: [] for name in names}
    order, rng = list(names), random.Random(seed)
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                samples[name].append(take(name))
            on_round()
    finally:
        if collected:
            gc.enable()
    return samples


def interleave(
    candidates: Sequence[Candidate],
    clock: Clock,
    rounds: int,
    seed: int = 0,
    on_round: Callable[[], None] = lambda: None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Samples of every candidate in seconds a call, interleaved; see `interleaved`.

    Args:
        on_failure: is given a candidate's name and what its preparation raised (one that no graph can hold,
            say); it is then left out. Without it that is raised.
    """
    named = {candidate.name: candidate for candidate in candidates}
    passes = {}
    for name, candidate in named.items():
        try:
            passes[name] = clock.prepare(candidate)
        except Exception as failure:
            if on_failure is None:
                raise
            on_failure(name, failure)
    return interleaved(
        list(passes),
        lambda name: clock.sample(named[name], passes[name]),
        rounds,
        seed,
        on_round,
    )
