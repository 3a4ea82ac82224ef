"""Which columns of which rows each adapter edits, for all forwards over the same prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..plan import SegmentRows
from ..positions import Positions, ragged_arange
from .prompts import Prompts

if TYPE_CHECKING:
    from ..adapter import Adapter

#: What a segment is: (adapter name, index of its position group).
Segment = tuple[str, int]

_NOTHING = np.zeros(0, dtype=np.int64)


@dataclasses.dataclass
class Selection:
    """What each segment edits: some columns below `width`, and every column from there on of some rows.

    Attributes:
        names: the adapter of each row, None for the bare model.
        segments: in the order in which plans list them.
        rows, columns: int64 [n], the edited (row, column) pairs below `width`, sorted by segment.
        counts: how many of them each segment has, int64 [S].
        generated: rows of which every column from `width` on is edited, int64, sorted by segment.
        generated_counts: how many of them each segment has, int64 [S].
        from_column: for each row the column from which on it is generated, int64 [batch]; None for `width`.
        owners: the adapters behind the names, as they were when this was made.
    """

    names: tuple[str | None, ...]
    segments: tuple[Segment, ...]
    rows: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    generated: np.ndarray
    generated_counts: np.ndarray
    width: int
    from_column: np.ndarray | None = None
    owners: dict[str, Adapter] = dataclasses.field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.names)

    @functools.cached_property
    def _owners(self) -> np.ndarray:
        """The segment of each (row, column) pair."""
        return np.repeat(np.arange(len(self.segments)), self.counts)

    def window(self, start: int, length: int, repeat: int = 1) -> SegmentRows | None:
        """Flat rows by segment for a forward over columns [start, start + length), or None if there are none.

        repeat: how often each row of the selection stands in the forward's batch, side by side (beams).
        """
        found: list[SegmentRows] = []
        copies = np.arange(repeat)
        if start < self.width and len(self.rows):
            rows, columns, counts = self.rows, self.columns, self.counts
            if start > 0 or length < self.width:
                inside = (columns >= start) & (columns < start + length)
                rows, columns = rows[inside], columns[inside] - start
                counts = np.bincount(self._owners[inside], minlength=len(counts))
            flat = ((rows[:, None] * repeat + copies) * length + columns[:, None]).ravel()
            found.append(SegmentRows(flat, counts * repeat))
        fresh = np.arange(max(self.width, start) - start, length)
        if len(fresh) and len(self.generated):
            rows = (self.generated[:, None] * repeat + copies).ravel()
            flat = (rows[:, None] * length + fresh).ravel()
            found.append(SegmentRows(flat, self.generated_counts * (repeat * len(fresh))))
        return _merged(found)

    def chunks(self, starts: np.ndarray, counts: np.ndarray) -> SegmentRows | None:
        """Flat rows by segment for a flat batch: of row i the columns [starts[i], starts[i] + counts[i]),
        row after row. None if nothing in it is edited. For prompts that have no padding (`Prompts.unpadded`).
        """
        ends, offsets = starts + counts, np.cumsum(counts) - counts
        found: list[SegmentRows] = []
        if len(self.rows):
            rows, columns = self.rows, self.columns
            inside = (columns >= starts[rows]) & (columns < ends[rows])
            rows, columns = rows[inside], columns[inside]
            by_segment = np.bincount(self._owners[inside], minlength=len(self.counts))
            found.append(SegmentRows(offsets[rows] + columns - starts[rows], by_segment))
        if len(self.generated):
            first = np.full(self.batch, self.width) if self.from_column is None else self.from_column
            rows = self.generated
            begin = np.maximum(first[rows], starts[rows])
            fresh = np.maximum(ends[rows] - begin, 0)
            total = int(fresh.sum())
            if total:
                shift = np.repeat(offsets[rows] + begin - starts[rows] - (np.cumsum(fresh) - fresh), fresh)
                owners = np.repeat(np.arange(len(self.segments)), self.generated_counts)
                by_segment = np.bincount(owners, weights=fresh, minlength=len(self.counts)).astype(np.int64)
                found.append(SegmentRows(np.arange(total) + shift, by_segment))
        return _merged(found)


def _merged(found: list[SegmentRows]) -> SegmentRows | None:
    """One list of two that are each sorted by segment; None for no rows."""
    found = [part for part in found if len(part.rows)]
    if len(found) < 2:
        return found[0] if found else None
    owners = np.concatenate([np.repeat(np.arange(len(part.counts)), part.counts) for part in found])
    order = np.argsort(owners, kind="stable")
    rows = np.concatenate([part.rows for part in found])[order]
    return SegmentRows(rows, found[0].counts + found[1].counts)


def select(
    names: Sequence[str | None],
    prompts: Prompts,
    groups_of: Callable[[str], tuple[Positions, ...]],
) -> Selection:
    """Resolves every row's adapter to columns. names: one a row, None for the bare model.

    Rows that share a position spec are resolved at once, whichever adapters they have.

    Raises ValueError: an empty prompt where positions need one, an index that a prompt lacks.
    """
    segments: list[Segment] = []
    specs: dict[Positions, tuple[list[int], list[int]]] = {}  # rows, and the segment of each
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows_of.setdefault(name, []).append(row)
    for name in sorted(rows_of):
        for group, positions in enumerate(groups_of(name)):
            listed, owned = specs.setdefault(positions, ([], []))
            listed += rows_of[name]
            owned += [len(segments)] * len(rows_of[name])
            segments.append((name, group))
    picked = [(_NOTHING, _NOTHING, _NOTHING)]
    generated = [(_NOTHING, _NOTHING)]
    for positions, (listed, owned) in specs.items():
        rows, owners = np.array(listed), np.array(owned)
        which, columns = _columns(positions, prompts, rows, names)
        picked.append((owners[which], rows[which], columns))
        if positions.generated:
            generated.append((owners, rows))
    owners, rows, columns = (np.concatenate(parts) for parts in zip(*picked))
    order = np.argsort(owners, kind="stable")
    late_owners, late = (np.concatenate(parts) for parts in zip(*generated))
    late_order = np.argsort(late_owners, kind="stable")
    # Without padding a row's generated tokens begin where its own prompt ends.
    ends = prompts.lengths if prompts.width == 0 else None
    return Selection(
        tuple(names),
        tuple(segments),
        rows[order],
        columns[order],
        np.bincount(owners, minlength=len(segments)),
        late[late_order],
        np.bincount(late_owners, minlength=len(segments)),
        prompts.width,
        ends,
    )


def _columns(
    positions: Positions, prompts: Prompts, rows: np.ndarray, names: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """(index into `rows`, column) of what these rows edit below `prompts.width`, in the order of `rows`."""
    lengths = prompts.lengths[rows]
    which, index = _NOTHING, _NOTHING
    if positions.word != "generated":
        with_prompt = np.flatnonzero(lengths)
        if len(with_prompt) < len(rows) and prompts.complete and positions.needs_prompt:
            row = int(rows[lengths == 0].min())
            raise ValueError(
                f"row {row} has an empty prompt, but adapter {names[row]!r} edits {positions} of it; "
                "give prompt_lengths, labels that leave a prompt out, or an attention_mask with tokens"
            )
        try:
            found, index = positions.resolve_all(lengths[with_prompt])
        except ValueError:
            _say_which(positions, prompts, rows[with_prompt], names)
            raise
        which = with_prompt[found]
    if positions.generated:
        answered, beyond = ragged_arange(prompts.tokens[rows] - lengths)
        which = np.concatenate([which, answered])
        index = np.concatenate([index, beyond + lengths[answered]])
    return which, prompts.column(rows[which], index)


def _say_which(positions: Positions, prompts: Prompts, rows: np.ndarray, names: Sequence[str | None]) -> None:
    """Raises the error of the first row whose prompt lacks a position."""
    for row in sorted(rows.tolist()):
        try:
            positions.resolve(int(prompts.lengths[row]))
        except ValueError as error:
            raise ValueError(f"row {row}, adapter {names[row]!r}: {error}") from None
