"""What a GPU can do at best, measured in the same run: a graph's node, a dependent load, copies, products.

The floor of an op in a replayed graph (docs/kernels.md has its derivation):

    node + 0.7 µs + max(operations, max(latency, cold bytes / copy rate) + bytes in L2 / L2's copy rate)

The 0.7 µs are for what no kernel can overlap with its loads: the indices before them, the reduction and the
drain after them. All else is measured.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..measure.ceilings import Ceilings, Work
from ..measure.timer import CALLS_OF_A_GRAPH, Clock

#: Seconds of indices, reduction and drain.
UNAVOIDABLE = 0.7e-6

#: What stands for a dependent load from device memory where Triton is missing, which measures it.
USUAL_LATENCY = 0.8e-6

#: Bytes of each side of the copies: far beyond any L2, and far within one.
LARGE, SMALL = 1 << 29, 1 << 23

#: Rows count as lying in L2 if what is read and written of them is at most this share of it.
SHARE_OF_L2 = 1 / 4


def rows_in_cache(work: Work, device: str) -> bool:
    """Whether the rows are few enough to lie in the device's L2, where the op before left them."""
    return 0 < work.of_rows <= SHARE_OF_L2 * torch.cuda.get_device_properties(device).L2_cache_size


class GpuCeilings(Ceilings):
    """Ceilings of the current CUDA device, each measured once, by the fastest of some samples.

    Args:
        clock: of graph replays, for all but the latency.
    """

    def __init__(self, device: str, clock: Clock) -> None:
        super().__init__(device, clock)
        self._copies: dict[int, float] = {}
        self._latency: float | None = None

    def node(self) -> float:
        """Seconds of one node of a replayed graph: a kernel over one element."""
        if self._empty is None:
            one = torch.zeros(1, device=self.device)
            self._empty = self._time("node", [lambda: one.add_(1.0)] * CALLS_OF_A_GRAPH)
        return self._empty

    empty_call = node

    def copy_seconds(self, side: int) -> float:
        """Seconds to copy `side` bytes of random values, always the same ones; without the node."""
        if side not in self._copies:
            source = torch.randint(-(2**62), 2**62, (side // 8,), device=self.device)
            target = torch.empty_like(source)
            taken = self._time("copy", [lambda: target.copy_(source)])
            self._copies[side] = taken - self.node()
        return self._copies[side]

    def copy_rate(self, footprint: int = 2 * LARGE) -> float:
        """Bytes a second, read and written together, from and to device memory."""
        return 2 * LARGE / self.copy_seconds(LARGE)

    def cache_rate(self) -> float:
        """The same within L2."""
        return 2 * SMALL / self.copy_seconds(SMALL)

    def latency(self) -> float:
        """Seconds of a load from device memory whose address is the result of the load before it."""
        if self._latency is None:
            if importlib.util.find_spec("triton") is None:
                self._latency = USUAL_LATENCY
            else:
                from .chase import latency

                self._latency = latency(self.device)
        return self._latency

    def floor(self, work: Work, dtype: torch.dtype) -> dict[str, float]:
        hot = work.of_rows if rows_in_cache(work, self.device) else 0
        cold = work.moved - hot
        matrix, copy = self.matrix_rate(dtype), self.copy_rate()
        bytes_s = max(self.latency(), cold / copy) + hot / self.cache_rate()
        operations_s = work.operations / matrix
        return {
            "moved_bytes": work.moved,
            "bytes_in_cache": hot,
            "operations": work.operations,
            "copy_rate": copy,
            "cache_rate": self.cache_rate(),
            "matrix_rate": matrix,
            "latency_s": self.latency(),
            "bytes_s": bytes_s,
            "operations_s": operations_s,
            "empty_call_s": self.node(),
            "floor_s": self.node() + UNAVOIDABLE + max(bytes_s, operations_s),
            "copy_of_rows_s": self.node() + work.of_rows / (self.cache_rate() if hot else copy),
        }

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "copy_bytes_per_s": {str(2 * side): 2 * side / taken for side, taken in self._copies.items()},
            "latency_s": self._latency,
        }
