"""What the machine can do at best, measured in the same run: copy rate, matrix rate, an empty call.

A floor is built from them: an op must move its bytes and do its operations, and be called.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .timer import Candidate, Clock

SAMPLES = 9

#: Order of the matrices whose product gives the matrix rate.
MATRIX_ORDER = {"cpu": 1024, "cuda": 8192}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call must do at least.

    Attributes:
        moved: bytes read and written, every distinct byte once each way.
        footprint: bytes of memory that it touches; the copy that it is held against touches as many.
        operations: floating-point operations of its products (2 for a multiply-add).
        of_rows: how many of `moved` are h's and its norm's, which on a GPU come from and go to the L2 cache
            where they are few: the op before has just written them.
    """

    moved: int
    footprint: int
    operations: int
    of_rows: int = 0


class Ceilings:
    """Measures rates on a device with a clock, each once, by the fastest of some samples.

    Args:
        copies: how many buffers the copy rotates through, as the ops do with their inputs.
    """

    def __init__(self, device: str, clock: Clock, copies: int = 1) -> None:
        self.device, self.clock, self.copies = device, clock, copies
        self._copy: dict[int, float] = {}
        self._matrix: dict[torch.dtype, float] = {}
        self._empty: float | None = None

    def _time(self, name: str, calls: list[Any]) -> float:
        candidate = Candidate(name, calls)
        passes = self.clock.prepare(candidate)
        return min(self.clock.sample(candidate, passes) for _ in range(SAMPLES))

    def copy_rate(self, footprint: int) -> float:
        """Bytes a second, read and written together, of a copy that touches `footprint` bytes."""
        half = max(footprint // 2, 64)
        if half not in self._copy:
            pairs = [
                (
                    torch.ones(half, dtype=torch.uint8, device=self.device),
                    torch.empty(half, dtype=torch.uint8, device=self.device),
                )
                for _ in range(self.copies)
            ]
            if half % 8 == 0:
                pairs = [(a.view(torch.float64), b.view(torch.float64)) for a, b in pairs]
            calls = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]
            self._copy[half] = 2 * half / self._time("copy", calls)
        return self._copy[half]

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a large square matrix product in this dtype."""
        if dtype not in self._matrix:
            order = MATRIX_ORDER.get(torch.device(self.device).type, 1024)
            # Random numbers: a GPU multiplies equal ones faster, as it then draws less power.
            a, b = torch.randn(2, order, order, device=self.device).to(dtype)
            out = torch.empty_like(a)
            self._matrix[dtype] = 2 * order**3 / self._time("matrix", [lambda: torch.mm(a, b, out=out)])
        return self._matrix[dtype]

    def empty_call(self) -> float:
        """Seconds of the cheapest op call: in place, on a GPU a launch over one element, else over none."""
        if self._empty is None:
            nothing = torch.zeros(1 if self.device != "cpu" else 0, device=self.device)
            self._empty = self._time("empty", [lambda: nothing.zero_()])
        return self._empty

    def floor(self, work: Work, dtype: torch.dtype) -> dict[str, float]:
        """The least time in seconds for this work, with its parts (as they stand in a result's `floor`)."""
        rate, matrix, empty = self.copy_rate(work.footprint), self.matrix_rate(dtype), self.empty_call()
        bytes_s, operations_s = work.moved / rate, work.operations / matrix
        return {
            "moved_bytes": work.moved,
            "operations": work.operations,
            "copy_rate": rate,
            "matrix_rate": matrix,
            "bytes_s": bytes_s,
            "operations_s": operations_s,
            "empty_call_s": empty,
            "floor_s": max(bytes_s, operations_s) + empty,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "copy_bytes_per_s": {str(2 * half): rate for half, rate in self._copy.items()},
            "matrix_operations_per_s": {str(dtype): rate for dtype, rate in self._matrix.items()},
            "empty_call_s": self._empty,
        }
