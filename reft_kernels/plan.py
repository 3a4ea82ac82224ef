"""The plan: which rows of h take which pool rows, in the form that kernels read.

Two levels. `Rows` depends on a batch: the flat rows of h sorted by segment, cut into tiles, made on the
host with numpy and sent to the device in one copy. The spans table ([S, 2], pool range of each segment)
depends only on the set of adapters. A `Plan` (of `ops.arguments`) is the pair, for one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .ops.arguments import Plan
from .ops.schema import TILE
from .pool import Pool, Span, claims_of

__all__ = [
    "Plan",
    "Rows",
    "SegmentRows",
    "check_pool",
    "check_rows",
    "cover",
    "make_plan",
    "one_segment",
    "pack_rows",
    "pack_spans",
    "to_device",
]

#: On a GPU, rows that are only normed are a tile each in steps of so few rows: nothing is shared between
#: them, and a program for each is done soonest.
_ALONE = 1024


class Rows(NamedTuple):
    """Rows of h by segment: rows [n], tiles [n_tiles, 3], offsets [S + 1]; int32, views of one buffer."""

    rows: Tensor
    tiles: Tensor
    offsets: Tensor


class SegmentRows(NamedTuple):
    """Rows of h on the host: rows [n], those of the first segment first; counts [S], how many each has."""

    rows: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, by_segment: Sequence[np.ndarray]) -> SegmentRows:
        """From an array of rows for each segment."""
        counts = np.fromiter((len(rows) for rows in by_segment), dtype=np.int64, count=len(by_segment))
        rows = np.concatenate(by_segment) if len(by_segment) else np.zeros(0, dtype=np.int64)
        return cls(rows, counts)


def _tiles(counts: np.ndarray, tile: np.ndarray) -> np.ndarray:
    """[n_tiles, 3] (segment, start, count) for segments of these row counts and largest tiles."""
    per_segment = -(-counts // tile)
    total = int(per_segment.sum())
    segment = np.repeat(np.arange(len(counts)), per_segment)
    first_tile = np.cumsum(per_segment) - per_segment
    within = (np.arange(total) - first_tile[segment]) * tile[segment]
    starts = np.cumsum(counts) - counts
    table = np.empty((total, 3), dtype=np.int32)
    table[:, 0] = segment
    table[:, 1] = starts[segment] + within
    table[:, 2] = np.minimum(counts[segment] - within, tile[segment])
    return table


def pack_rows(
    by_segment: Sequence[np.ndarray] | SegmentRows, device: torch.device | str, tile: int = TILE
) -> Rows:
    """Lays the rows of each segment (1-D integer arrays) into one int32 buffer on `device`, in one copy."""
    listed = by_segment if isinstance(by_segment, SegmentRows) else SegmentRows.of(by_segment)
    return _pack(listed, len(listed.counts), device, tile)


def cover(
    by_segment: Sequence[np.ndarray] | SegmentRows, total: int, device: torch.device | str, tile: int = TILE
) -> Rows:
    """`pack_rows`, and all others of h's `total` rows in tiles of segment −1, which edit nothing.

    For `intervene_norm_`, which norms every row. The offsets speak of the segments alone.
    """
    listed = by_segment if isinstance(by_segment, SegmentRows) else SegmentRows.of(by_segment)
    return _pack(_covering(listed, total), len(listed.counts), device, tile)


def _covering(listed: SegmentRows, total: int) -> SegmentRows:
    """The same, with a last list of the rows below `total` that no segment names."""
    unnamed = np.ones(total, dtype=bool)
    unnamed[listed.rows] = False
    others = np.flatnonzero(unnamed)
    return SegmentRows(np.concatenate([listed.rows, others]), np.append(listed.counts, len(others)))


def _pack(listed: SegmentRows, segments: int, device: torch.device | str, tile: int) -> Rows:
    """The rows beyond the first `segments` lists have no segment (−1)."""
    rows, counts = listed
    n = len(rows)
    largest = np.full(len(counts), tile)
    if n <= _ALONE and torch.device(device).type == "cuda":
        largest[segments:] = 1
    tiles = _tiles(counts, largest)
    tiles[tiles[:, 0] >= segments, 0] = -1
    buffer = np.empty(n + 3 * len(tiles) + segments + 1, dtype=np.int32)
    buffer[:n] = rows
    middle = n + 3 * len(tiles)
    buffer[n:middle] = tiles.ravel()
    buffer[middle] = 0
    np.cumsum(counts[:segments], out=buffer[middle + 1 :])
    data = to_device(buffer, device)
    return Rows(data[:n], data[n:middle].view(-1, 3), data[middle:])


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """The array as a tensor on `device`: in one copy that the host does not wait for."""
    data, device = torch.from_numpy(array), torch.device(device)
    if device.type == "cuda":
        return data.pin_memory().to(device, non_blocking=True)
    return data if device.type == "cpu" else data.to(device)


# No inference tensor: a table is kept, and may be trained through after a generate made it.
@torch.inference_mode(False)
def pack_spans(spans: Sequence[Span], device: torch.device | str, name: str = "spans") -> Tensor:
    """The spans table [S, 2] of one layer. It remembers the pool that gave them out, for `check_pool`.

    Raises ValueError that begins with `name` and an index: a span that was removed, or spans of two pools.
    """
    claims = claims_of(spans, name)
    table = torch.tensor([tuple(span) for span in spans], dtype=torch.int32, device=device).view(-1, 2)
    if claims is not None:
        claims.version = table._version
        table._reft_claims = claims  # type: ignore[attr-defined]
    return table


def check_pool(spans: Tensor, pool: Pool) -> None:
    """Refuses a spans table of another pool, or of ranges that were removed. Reads nothing of the device."""
    claims = getattr(spans, "_reft_claims", None)
    if claims is not None:
        claims.check(spans, pool)


def _as_span(entry: Any, name: str) -> Span:
    """The span of an entry of `make_plan`."""
    if not isinstance(entry, tuple | list) or len(entry) != 2 or not isinstance(entry[0], tuple):
        raise ValueError(f"{name}: must be a pair of a Span and rows of h, was {entry!r}")
    span = entry[0]
    if len(span) != 2 or not all(isinstance(part, int | np.integer) and 0 <= part < 2**31 for part in span):
        raise ValueError(f"{name}: its Span must have two integers, 0 or more, was {span!r}")
    return span if isinstance(span, Span) else Span(*span)


def _as_rows(rows: Tensor | Sequence[int] | np.ndarray, name: str) -> np.ndarray:
    try:
        array = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: rows must be a list of integers, were {rows!r}") from None
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype == bool or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: rows must be integers, were {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: rows must be one-dimensional, had shape {array.shape}")
    return array.astype(np.int64)


def _check_distinct(rows: np.ndarray, limit: int, name: str) -> None:
    if not rows.size:
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: rows must lie in [0, {limit}); found {low if low < 0 else high}")
    unique, counts = np.unique(rows, return_counts=True)
    if len(unique) != len(rows):
        raise ValueError(f"{name}: row {int(unique[counts > 1][0])} is named twice; a row takes one edit")


def check_rows(rows: Tensor | Sequence[int], limit: int) -> None:
    """Refuses host rows that are no integers, out of [0, limit) or named twice; device rows are not read."""
    if isinstance(rows, Tensor) and rows.device.type != "cpu":
        return
    _check_distinct(_as_rows(rows, "rows"), limit, "rows")


def one_segment(rows: Tensor | Sequence[int] | None, count: int, rank: int, device: torch.device) -> Plan:
    """A plan of one segment at pool rows [0, rank), by tensor operations on `device` (no copy, no sync)."""
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    flat = torch.arange(count, **ints) if rows is None else torch.as_tensor(rows, **ints)
    n = flat.shape[0]
    starts = torch.arange(0, n, TILE, **ints)
    tiles = torch.stack([torch.zeros_like(starts), starts, (n - starts).clamp(max=TILE)], dim=1)
    spans = torch.arange(2, **ints).view(1, 2) * rank  # [[0, rank]]
    offsets = torch.arange(2, **ints) * n
    return Plan(rows=flat, tiles=tiles, spans=spans, offsets=offsets)


def make_plan(
    entries: Sequence[tuple[Span, Tensor | Sequence[int] | np.ndarray]],
    device: torch.device | str = "cpu",
    total_rows: int | None = None,
    cover: bool = False,
) -> Plan:
    """A plan for one layer from (pool range, flat rows of h) pairs.

    >>> make_plan([(Span(0, 2), [0, 4]), (Span(2, 1), [1])], total_rows=6).rows.tolist()
    [0, 4, 1]

    Args:
        entries: for each segment its range of the pool and the rows of h.view(-1, d) that take it.
        device: where h and the pool are.
        total_rows: the number of rows of h; if given, rows beyond it are refused here.
        cover: names the rows that no entry takes, too, in tiles that edit nothing: what
            `functional.intervene_norm_` needs. Takes total_rows.

    Raises:
        ValueError: a negative row, a row ≥ total_rows, a row named twice (its edits would race); a range
            that was removed from its pool, ranges of two pools; or cover without total_rows.
    """
    if total_rows is not None and (not isinstance(total_rows, int) or total_rows < 0):
        raise ValueError(f"total_rows: must be an integer, 0 or more, or None, was {total_rows!r}")
    if cover and total_rows is None:
        raise ValueError("cover: needs total_rows, the number of rows of h")
    if not isinstance(entries, Sequence) or isinstance(entries, Span | str):
        raise ValueError(f"entries: must be a list of pairs of a Span and rows of h, was {entries!r}")
    spans = [_as_span(entry, f"entries[{number}]") for number, entry in enumerate(entries)]
    by_segment = [_as_rows(rows, f"entries[{number}]") for number, (_, rows) in enumerate(entries)]
    everything = np.concatenate(by_segment) if by_segment else np.zeros(0, dtype=np.int64)
    _check_distinct(everything, 2**31 if total_rows is None else total_rows, "entries")
    listed = SegmentRows.of(by_segment)
    if cover and total_rows is not None:
        listed = _covering(listed, total_rows)
    packed = _pack(listed, len(by_segment), device, TILE)
    table = pack_spans(spans, device, "entries")
    return Plan(rows=packed.rows, tiles=packed.tiles, spans=table, offsets=packed.offsets)
