"""One generation, timed token by token: time to the first token, each decode step, and the whole."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

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
    """Seconds of a generation's phases; decode is the median of the steps after the first token."""

    prefill: float
    decode: float
    generate: float

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


def timed(runner: Runner, tokens: int) -> Timing:
    """One generation of `tokens` (at least 2) tokens by the wall clock."""
    cuda = runner.setup.device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    return _generate(runner, tokens, now)


def attributed(runner: Runner, tokens: int, ledger: Ledger, costs: dict[str, float]) -> Timing:
    """The same by a ledger: what the attributed packages took of each phase."""
    ledger.reset()
    return _generate(runner, tokens, lambda: ledger.seconds(costs))
