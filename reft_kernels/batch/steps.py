"""`StepTables`: the rows and tiles of an engine's steps, refilled in place.

A `Planner` makes a plan for a batch whose requests stay. In a serving engine they come and go with every
step, hundreds of them, and a CUDA graph reads its tables where they lay when it was captured. So here a
request's positions are resolved once, when it comes, and a step is a few operations of numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..ops.schema import TILE
from ..plan import _tiles
from .intervals import NO_END, intervals_of
from .stages import LOW_RANK, SiteKey
from .store import AdapterStore


@dataclasses.dataclass
class _Steady:
    """Decode steps of the same requests, of which the tables hold the same rows.

    starts: of the step that comes next. left: how many there are, until an edit begins or ends.
    """

    requests: np.ndarray
    starts: np.ndarray
    left: int


class StepTables:
    """What the ops read in the steps of an engine, at addresses that stay.

    Args:
        store: of the adapters. With a capacity, so that its pools stay too.
        sites: where the model can be edited.
        max_tokens: rows of hidden states in one step.
        max_requests: that are known at a time.
        max_segments: position groups, of all adapters that are laid down together.
        device: of the hidden states.
        overlap: how many segments may name one row (at different sites); see `most_together`.

    Attributes:
        rows: [max_tokens · overlap] int32. tiles: [max_tokens · overlap, 3] int32.
        spans: [sites, max_segments, 2] int32.
        used: (rows, tiles) of the last step; (0, 0) where it edits nothing.
    """

    def __init__(
        self,
        store: AdapterStore,
        sites: Sequence[SiteKey],
        max_tokens: int,
        max_requests: int,
        max_segments: int,
        device: torch.device | str = "cpu",
        overlap: int = 2,
    ) -> None:
        self.store, self.sites = store, {key: number for number, key in enumerate(sites)}
        self.device = torch.device(device)
        self.max_tokens, self.overlap = max_tokens, overlap
        room = max_tokens * overlap
        with torch.inference_mode(False):
            self.rows = torch.zeros(room, dtype=torch.int32, device=self.device)
            self.tiles = torch.zeros(room, 3, dtype=torch.int32, device=self.device)
            self.spans = torch.zeros(len(self.sites), max_segments, 2, dtype=torch.int32, device=self.device)
        self.used = (0, 0)
        self._filled = 0
        self._steady: _Steady | None = None
        self._free = list(range(max_segments))[::-1]
        self._segments: dict[str, list[int]] = {}
        #: (segment, first, end) of each request, by its row.
        self._intervals = np.zeros((3, max_requests, 4), dtype=np.int64)

    # Adapters ----------------------------------------------------------------------------------------------

    def lay(self, name: str) -> None:
        """Gives the position groups of an adapter of the store their segments."""
        groups = len(self.store.groups(name))
        if groups > len(self._free):
            raise RuntimeError(
                f"max_segments: {name!r} has {groups} position groups, {len(self._free)} are left"
            )
        segments = [self._free.pop() for _ in range(groups)]
        self._segments[name] = segments
        self._write_spans(name)

    def renew(self) -> None:
        """Writes the spans of all adapters anew, after the store moved them."""
        for name in self._segments:
            self._write_spans(name)

    def lift(self, name: str) -> None:
        """Takes an adapter's segments back. No request may have it."""
        segments = self._segments.pop(name)
        self.spans[:, segments] = 0
        self._free += segments

    def _write_spans(self, name: str) -> None:
        segments = self._segments[name]
        ranges = self.store.ranges(tuple((name, group) for group in range(len(segments))))
        spans = np.zeros((len(self.sites), len(segments), 2), dtype=np.int32)
        for stage, number in self.store.numbers.items():
            if stage.form == LOW_RANK and not stage.turn:
                spans[self.sites[stage.site]] = ranges[number]
        self.spans[:, segments] = torch.from_numpy(spans).to(self.device)

    # Requests ----------------------------------------------------------------------------------------------

    def put(self, row: int, name: str, prompt_length: int) -> None:
        """The request of that row takes an adapter that was laid down. See `intervals_of` for errors."""
        found = intervals_of(self.store.groups(name), prompt_length)
        missing = len(found) - self._intervals.shape[2]
        if missing > 0:
            self._intervals = np.pad(self._intervals, ((0, 0), (0, 0), (0, missing)))
        self.clear(row)
        self._intervals[0, row, : len(found)] = np.array(self._segments[name])[found[:, 0]]
        self._intervals[1:, row, : len(found)] = found[:, 1:].T

    def clear(self, row: int) -> None:
        """The request of that row takes none."""
        self._steady = None
        self._intervals[:, row] = 0

    # Steps -------------------------------------------------------------------------------------------------

    def idle(self) -> None:
        """The next forward edits nothing."""
        self._steady = None
        if self.used != (0, 0):
            self._clear()

    def _clear(self) -> None:
        self._write(np.zeros(0, dtype=np.int32), np.zeros((0, 3), dtype=np.int32))

    def fill(self, requests: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        """The next forward computes of requests[i] the tokens starts[i] … starts[i] + counts[i] − 1 of its
        sequence, one request behind the other. requests: their rows. All int64 [n]."""
        steady = self._steady
        if (
            steady is not None
            and steady.left > 0
            and np.array_equal(steady.starts, starts)
            and np.array_equal(steady.requests, requests)
            and (counts == 1).all()
        ):
            steady.left -= 1
            steady.starts += 1
            return
        self._steady = None
        self._fill(requests, starts, counts)
        if (counts == 1).all():
            _, first, end = self._intervals[:, requests]
            now = starts[:, None]
            ahead = np.where(now < first, first, end) - now  # steps until it begins, or ends
            left = int(ahead[ahead > 0].min(initial=NO_END)) - 1
            self._steady = _Steady(requests.copy(), starts + 1, left)

    def _fill(self, requests: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> None:
        segment, first, end = self._intervals[:, requests]
        offset = np.cumsum(counts) - counts
        first = np.maximum(first, starts[:, None])
        length = np.minimum(end, (starts + counts)[:, None]) - first
        there = length > 0
        if not there.any():
            if self.used != (0, 0):
                self._clear()
            return
        segment, length = segment[there], length[there]
        begin = (first + (offset - starts)[:, None])[there]
        order = np.argsort(segment, kind="stable")
        segment, length, begin = segment[order], length[order], begin[order]
        total = int(length.sum())
        if total > len(self.rows):
            raise RuntimeError(f"max_tokens: a step edits {total} rows, there is room for {len(self.rows)}")
        rows = np.repeat(begin - (np.cumsum(length) - length), length) + np.arange(total)
        heads = np.flatnonzero(np.append(True, segment[1:] != segment[:-1]))
        tiles = _tiles(np.add.reduceat(length, heads), np.full(len(heads), TILE))
        tiles[:, 0] = segment[heads][tiles[:, 0]]
        self._write(rows.astype(np.int32), tiles)

    def _write(self, rows: np.ndarray, tiles: np.ndarray) -> None:
        self.used = (len(rows), len(tiles))
        if self.device.type == "cuda":
            # A graph reads more tiles than a step has: what the last one left is overwritten with empty ones.
            stale = max(self._filled - len(tiles), 0)
            tiles = np.concatenate([tiles, np.zeros((stale, 3), dtype=np.int32)])
        self._filled = self.used[1]
        for tensor, array in ((self.rows, rows), (self.tiles, tiles)):
            if len(array):
                host = torch.from_numpy(array)
                # Pinned memory of torch's is not given out again before the copy is done.
                host = host.pin_memory() if self.device.type == "cuda" else host
                tensor[: len(array)].copy_(host, non_blocking=True)

    def tables(self, tokens: int, captured: bool = False) -> tuple[Tensor, Tensor]:
        """rows and tiles for that many rows of hidden states; if `captured`, their size follows from it."""
        rows, tiles = self.used
        if captured:
            rows = tiles = min(tokens, self.max_tokens) * self.overlap
        return self.rows[:rows], self.tiles[:tiles]


def most_together(groups: Sequence) -> int:
    """A bound on how many of these position specs may name one token."""
    return max((sum(one.overlaps(other) for other in groups) for one in groups), default=0)
