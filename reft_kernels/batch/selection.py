"""Which columns of which rows each adapter edits, for all forwards over the same prompts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..plan import SegmentRows
from ..positions import Positions, ragged_arange
from .lists import Lists
from .prompts import Prompts
from .stacks import RowNames, Segment, Term, segment_of, terms_of

if TYPE_CHECKING:
    from ..adapter import Adapter

_NOTHING = np.zeros(0, dtype=np.int64)


class Asked(NamedTuple):
    """Rows of which each step asks anew what is edited in it (`Positions.dynamic`): owners [k] are their
    segments, ascending."""

    positions: Positions
    owners: np.ndarray
    rows: np.ndarray


@dataclasses.dataclass
class Selection:
    """What each segment edits: some columns below `width`, and every column from there on of some rows.

    Attributes:
        names: what each row takes: an adapter's name, several (a `Mix`), or None for the bare model.
        segments: in the order in which plans list them.
        rows, columns: int64 [n], the edited (row, column) pairs below `width`, sorted by segment.
        counts: how many of them each segment has, int64 [S].
        generated: rows of which every column from `width` on is edited, int64, sorted by segment.
        generated_counts: how many of them each segment has, int64 [S].
        from_column: for each row the column from which on it is generated, int64 [batch]; None for `width`.
        asked: segments of which neither of these is known before a step.
        prompts: that this was made for.
        owners: the adapters behind the names, as they were when this was made.
        stacked: whether a token may be in several segments that edit at a common site.
    """

    names: tuple[RowNames, ...]
    segments: tuple[Segment, ...]
    rows: np.ndarray
    columns: np.ndarray
    counts: np.ndarray
    generated: np.ndarray
    generated_counts: np.ndarray
    width: int
    from_column: np.ndarray | None = None
    asked: tuple[Asked, ...] = ()
    prompts: Prompts | None = None
    owners: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    stacked: bool = False

    @property
    def batch(self) -> int:
        return len(self.names)

    @property
    def needs_ids(self) -> bool:
        """Whether a step's token ids must be known."""
        return any(one.positions.needs_ids for one in self.asked)

    @functools.cached_property
    def _owners(self) -> np.ndarray:
        """The segment of each (row, column) pair."""
        return np.repeat(np.arange(len(self.segments)), self.counts)

    def window(
        self, start: int, length: int, repeat: int = 1, ids: np.ndarray | None = None
    ) -> SegmentRows | None:
        """Flat rows by segment for a forward over columns [start, start + length), or None if there are none.

        repeat: how often each row of the selection stands in the forward's batch, side by side (beams).
        ids: the forward's tokens, [batch · repeat, length], where `needs_ids`.
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
        columns = np.arange(start, start + length)
        for asked in self.asked:
            rows = (asked.rows[:, None] * repeat + copies).ravel()
            mine = np.repeat(asked.rows, repeat)[:, None]
            edited = self._edited(asked, mine, columns[None, :], None if ids is None else ids[rows])
            which, column = np.nonzero(edited)
            owners = np.repeat(asked.owners, repeat)[which]
            by_segment = np.bincount(owners, minlength=len(self.counts))
            found.append(SegmentRows(rows[which] * length + column, by_segment))
        return _merged(found)

    def _edited(
        self, asked: Asked, rows: np.ndarray, columns: np.ndarray, ids: np.ndarray | None
    ) -> np.ndarray:
        """Whether tokens are edited, each given by its row and column."""
        assert self.prompts is not None
        index = self.prompts.index(rows, columns)
        return asked.positions.mask(index, self.prompts.lengths[rows], ids) & (index >= 0)

    def chunks(
        self, starts: np.ndarray, counts: np.ndarray, ids: np.ndarray | None = None
    ) -> SegmentRows | None:
        """Flat rows by segment for a flat batch: of row i the columns [starts[i], starts[i] + counts[i]),
        row after row. None if nothing in it is edited. For prompts that have no padding (`Prompts.unpadded`).

        ids: the tokens of the flat batch, [sum of counts], where `needs_ids`.
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
        for asked in self.asked:
            which, within = ragged_arange(counts[asked.rows])
            rows = asked.rows[which]
            flat = offsets[rows] + within
            edited = self._edited(asked, rows, starts[rows] + within, None if ids is None else ids[flat])
            by_segment = np.bincount(asked.owners[which[edited]], minlength=len(self.counts))
            found.append(SegmentRows(flat[edited], by_segment))
        return _merged(found)


def _merged(found: list[SegmentRows]) -> SegmentRows | None:
    """One list of several that are each sorted by segment; None for no rows."""
    found = [part for part in found if len(part.rows)]
    if len(found) < 2:
        return found[0] if found else None
    owners = np.concatenate([np.repeat(np.arange(len(part.counts)), part.counts) for part in found])
    order = np.argsort(owners, kind="stable")
    rows = np.concatenate([part.rows for part in found])[order]
    return SegmentRows(rows, np.sum([part.counts for part in found], axis=0))


def select(
    names: Sequence[RowNames],
    prompts: Prompts,
    groups_of: Callable[[str], tuple[Positions, ...]],
    lists: Lists | None = None,
) -> Selection:
    """Resolves every row's adapters to columns. names: what each row takes, None for the bare model.

    lists: of rows that were given theirs. Rows that share a position spec are resolved at once, whichever
    adapters they have.

    Raises ValueError: an empty prompt where positions need one, an index that a prompt lacks, and positions
    that count generated tokens where nobody knows how many there were.
    """
    terms, which, pair_rows = _pairs(names)
    groups = [groups_of(term.name if isinstance(term, Term) else term) for term in terms]
    sizes = np.fromiter(map(len, groups), dtype=np.int64, count=len(groups))
    first = np.cumsum(sizes) - sizes  # segment of each term
    segments: tuple[Segment, ...] = tuple(
        [
            segment_of(term, group) if isinstance(term, Term) else (term, group)
            for term, mine in zip(terms, groups)
            for group in range(len(mine))
        ]
    )
    picked = [(_NOTHING, _NOTHING, _NOTHING)]
    if lists:
        listed = np.isin(pair_rows, list(lists))
        for number, row in zip(which[listed].tolist(), pair_rows[listed].tolist()):
            for owner, columns in zip(range(first[number], first[number] + sizes[number]), lists[row]):
                picked.append((np.full(len(columns), owner), np.full(len(columns), row), columns))
        which, pair_rows = which[~listed], pair_rows[~listed]
    specs = _by_spec(groups, first, which, pair_rows)
    generated = [(_NOTHING, _NOTHING)]
    dynamic: list[Asked] = []
    for positions, owners, rows in specs:
        if positions.dynamic:
            _check(positions, prompts, rows, names)
            dynamic.append(Asked(positions, owners, rows))
            continue
        found, columns = _columns(positions, prompts, rows, names)
        picked.append((owners[found], rows[found], columns))
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
        segments,
        rows[order],
        columns[order],
        np.bincount(owners, minlength=len(segments)),
        late[late_order],
        np.bincount(late_owners, minlength=len(segments)),
        prompts.width,
        ends,
        tuple(dynamic),
        prompts,
    )


def _pairs(names: Sequence[RowNames]) -> tuple[Sequence[str | Term], np.ndarray, np.ndarray]:
    """The terms of a batch, sorted, and which rows have them: (term, row) pairs, by term and then by row.

    Where all are adapters as they are, the terms are their names.
    """
    distinct = dict.fromkeys(names)
    numbers: dict[RowNames, tuple[int, ...]]
    plain = [taken for taken in distinct if isinstance(taken, str)]
    terms: Sequence[str | Term]
    if len(plain) + (None in distinct) == len(distinct):
        terms = plain = sorted(plain)
        numbers = {name: (number,) for number, name in enumerate(plain)}
        numbers[None] = ()
    else:
        terms = several = sorted({term for taken in distinct for term in terms_of(taken)})
        number_of = {term: number for number, term in enumerate(several)}
        numbers = {taken: tuple([number_of[term] for term in terms_of(taken)]) for taken in distinct}
    by_row = [numbers[taken] for taken in names]
    counts = np.fromiter(map(len, by_row), dtype=np.int64, count=len(by_row))
    which = np.fromiter(itertools.chain.from_iterable(by_row), dtype=np.int64, count=int(counts.sum()))
    order = np.argsort(which, kind="stable")
    return terms, which[order], np.repeat(np.arange(len(by_row)), counts)[order]


def _by_spec(
    groups: Sequence[tuple[Positions, ...]], first: np.ndarray, which: np.ndarray, rows: np.ndarray
) -> list[Asked]:
    """What each position spec is asked for: its segments and rows, sorted by segment.

    groups: of each term. first: the segment of its first group. which, rows: (term, row) pairs, by term.
    """
    # A store has one object for equal specs, and for equal tuples of them.
    alike: dict[int, tuple[tuple[Positions, ...], list[int]]] = {}
    for term, mine in enumerate(groups):
        alike.setdefault(id(mine), (mine, []))[1].append(term)
    kind_of = np.zeros(len(groups), dtype=np.int64)
    for kind, (_, terms) in enumerate(alike.values()):
        kind_of[terms] = kind
    kinds = kind_of[which]
    specs: dict[int, tuple[Positions, list[np.ndarray], list[np.ndarray]]] = {}
    for kind, (mine, _) in enumerate(alike.values()):
        inside = kinds == kind if len(alike) > 1 else slice(None)
        segment, taken = first[which[inside]], rows[inside]
        if len(taken):
            for group, positions in enumerate(mine):
                _, owners, taken_by = specs.setdefault(id(positions), (positions, [], []))
                owners.append(segment + group)
                taken_by.append(taken)
    found = []
    for positions, parts, taken_by in specs.values():
        of_all = np.concatenate(parts)
        order = np.argsort(of_all, kind="stable")
        found.append(Asked(positions, of_all[order], np.concatenate(taken_by)[order]))
    return found


def _check(positions: Positions, prompts: Prompts, rows: np.ndarray, names: Sequence[RowNames]) -> np.ndarray:
    """Raises ValueError where the prompts of these rows are not what positions need. Returns which have one,
    as indices into `rows`."""
    lengths = prompts.lengths[rows]
    with_prompt = np.flatnonzero(lengths)
    empty = len(with_prompt) < len(rows)
    if empty and prompts.complete and positions.edits_prompt and positions.needs_prompt:
        row = int(rows[lengths == 0].min())
        raise ValueError(
            f"row {row} has an empty prompt, but adapter {names[row]!r} edits {positions} of it; "
            "give prompt_lengths, labels that leave a prompt out, or an attention_mask with tokens"
        )
    if positions.counts_generated and not prompts.complete:
        row = int(rows.min())
        raise ValueError(
            f"row {row}, adapter {names[row]!r}: positions {str(positions)!r} count generated tokens, and "
            "a cache does not say where its prompt ended; give prompt_lengths"
        )
    try:
        positions.check(lengths[with_prompt])
    except ValueError:
        _say_which(positions, prompts, rows[with_prompt], names)
        raise
    return with_prompt


def _columns(
    positions: Positions, prompts: Prompts, rows: np.ndarray, names: Sequence[RowNames]
) -> tuple[np.ndarray, np.ndarray]:
    """(index into `rows`, column) of what these rows edit below `prompts.width`, in the order of `rows`."""
    lengths = prompts.lengths[rows]
    which, index = _NOTHING, _NOTHING
    if positions.edits_prompt:
        with_prompt = _check(positions, prompts, rows, names)
        found, index = positions.resolve_all(lengths[with_prompt])
        which = with_prompt[found]
    if positions.generated:
        answered, beyond = ragged_arange(prompts.tokens[rows] - lengths)
        which = np.concatenate([which, answered])
        index = np.concatenate([index, beyond + lengths[answered]])
    return which, prompts.column(rows[which], index)


def _say_which(positions: Positions, prompts: Prompts, rows: np.ndarray, names: Sequence[RowNames]) -> None:
    """Raises the error of the first row whose prompt lacks a position."""
    for row in sorted(rows.tolist()):
        try:
            positions.check(prompts.lengths[row : row + 1])
        except ValueError as error:
            raise ValueError(f"row {row}, adapter {names[row]!r}: {error}") from None
