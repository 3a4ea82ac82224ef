"""One generation, timed token by token: time to the first token, each decode step, and the whole.

On a GPU, in a generation of its own, also what the device alone takes for a decode step: a kernel that waits
keeps it busy while the host prepares the step, so that no time of the host's is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .attribution import Ledger
from .systems.base import Runner


class _Stamps:
    """A stopping criterion of transformers that never stops and notes when each token was there."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.stamps.append(self.read())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a generation's phases; decode is the median of the steps after the first token.

    step: the median of what the device took for these steps, from their inputs to their logits; not measured
        with the rest, and NaN where it was not asked for.
    """

    prefill: float
    decode: float
    generate: float
    step: float = float("nan")

    def less(self, other: Timing) -> Timing:
        """Phase by phase."""
        return Timing(
            self.prefill - other.prefill, self.decode - other.decode, self.generate - other.generate
        )


def _phases(start: float, stamps: list[float], end: float) -> Timing:
    steps = [later - earlier for earlier, later in zip(stamps, stamps[1:])]
    return Timing(stamps[0] - start, statistics.median(steps), end - start)


def _generate(runner: Runner, tokens: int, read: Callable[[], float]) -> Timing:
    from transformers import StoppingCriteriaList

    noted = _Stamps(read)
    with runner.context(), torch.no_grad():
        start = read()
        runner.generate(tokens, stopping_criteria=StoppingCriteriaList([noted]))
        end = read()
    if len(noted.stamps) != tokens:
        raise RuntimeError(f"{len(noted.stamps)} tokens came, {tokens} were asked for")
    return _phases(start, noted.stamps, end)


def timed(runner: Runner, tokens: int, phases: Collection[str] = ("decode",)) -> Timing:
    """One generation of `tokens` (at least 2) tokens by the wall clock; for the phase "step" another one."""
    cuda = runner.setup.device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    nothing = float("nan")
    found = Timing(nothing, nothing, nothing)
    if set(phases) != {"step"}:
        found = _generate(runner, tokens, now)
    if "step" in phases:
        found = dataclasses.replace(found, step=device_step(runner, tokens, CudaMarks()))
    return found


def on_clock(runner: Runner, tokens: int, read: Callable[[], float]) -> Timing:
    """One generation of `tokens` (at least 2) tokens by any clock that gives seconds."""
    return _generate(runner, tokens, read)


def by_hand(runner: Runner, steps: int, read: Callable[[], float]) -> float:
    """Median seconds of a decode step where the model is called in a loop of one's own, without generate."""
    spans = []
    with runner.context(), torch.no_grad():
        runner.prefill()
        for _ in range(steps):
            start = read()
            runner.decode()
            spans.append(read() - start)
    runner.cache = None
    return statistics.median(spans)


class Marks(Protocol):
    """Notes when a device reaches the begin and the end of a step."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def seconds(self) -> list[float]:
        """From each begin to the end after it."""
        ...


class CudaMarks:
    """Events on the current stream, each begin behind a kernel that does nothing for a while."""

    #: Cycles of that kernel: some 15 ms, in which the host prepares and launches a step.
    WAIT = 25_000_000

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        torch.cuda._sleep(self.WAIT)
        self._events[-1][0].record()

    def end(self) -> None:
        self._events[-1][1].record()

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in self._events]


@contextlib.contextmanager
def _marking(model: Any, marks: Marks) -> Iterator[None]:
    """Every step of a generation begins where its inputs are prepared."""
    prepare = model.prepare_inputs_for_generation
    own = vars(model).get("prepare_inputs_for_generation")

    @functools.wraps(prepare)  # transformers reads its signature
    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.begin()
        return prepare(*args, **kwargs)

    model.prepare_inputs_for_generation = marked
    try:
        yield
    finally:
        if own is None:
            del model.prepare_inputs_for_generation
        else:
            model.prepare_inputs_for_generation = own


def device_step(runner: Runner, tokens: int, marks: Marks) -> float:
    """Median seconds of a decode step by `marks`, in one generation of `tokens` tokens."""
    from transformers import LogitsProcessorList

    def at_logits(input_ids: Tensor, scores: Tensor) -> Tensor:
        marks.end()
        return scores

    with runner.context(), torch.no_grad(), _marking(runner.model, marks):
        runner.generate(tokens, logits_processor=LogitsProcessorList([at_logits]))
    steps = marks.seconds()
    if len(steps) != tokens:
        raise RuntimeError(f"{len(steps)} steps were marked, {tokens} were asked for")
    return statistics.median(steps[1:])


def attributed(runner: Runner, tokens: int, ledger: Ledger, costs: dict[str, float]) -> Timing:
    """The same by a ledger: what the attributed packages took of each phase."""
    ledger.reset()
    return _generate(runner, tokens, lambda: ledger.seconds(costs))
