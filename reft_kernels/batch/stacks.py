"""Several adapters on one row, each times a number: what a call says of them, and which tokens they share.

Edits that meet at a token add up, each of the unedited hidden state. In the pool that is one range that holds
the rows of all of them, so no kernel knows of it (`AdapterStore.ranges` lays it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..plan import SegmentRows
from .names import SCALE
from .sequence import Sequence as InTurn


class Term(NamedTuple):
    """An adapter of a row, what its edit is multiplied by, and its turn: those of turn 1 edit what those of
    turn 0 left, and so on."""

    name: str
    scale: float = 1.0
    turn: int = 0

    def __repr__(self) -> str:
        return repr(self.name) if self.scale == 1 else f"{self.name!r} times {self.scale:g}"


class Mix(NamedTuple):
    """What a row takes where that is not one adapter as it is. No name twice, in the order of the names."""

    terms: tuple[Term, ...]

    def __repr__(self) -> str:
        in_turn = sorted(self.terms, key=lambda term: term.turn)
        return (" then " if in_turn[-1].turn else " and ").join(map(repr, in_turn))


#: What a row takes: None is the bare model, a name an adapter as it is.
RowNames = str | Mix | None


def terms_of(row: RowNames) -> tuple[Term, ...]:
    """The adapters of a row."""
    if row is None:
        return ()
    return row.terms if isinstance(row, Mix) else (Term(row),)


def names_of(rows: Sequence[RowNames]) -> list[str]:
    """The adapters of all rows, each once."""
    found: dict[str, None] = {}
    for row in dict.fromkeys(rows):
        if isinstance(row, str):
            found[row] = None
        elif row is not None:
            found.update((term.name, None) for term in row.terms)
    return list(found)


def row_of(terms: Sequence[Term]) -> RowNames:
    """The shortest form of these terms. An edit times 0 is none at all."""
    left = [term for term in terms if term.scale != 0]
    turns = {turn: number for number, turn in enumerate(sorted({term.turn for term in left}))}
    kept = tuple(sorted(term._replace(turn=turns[term.turn]) for term in left))
    if not kept:
        return None
    return kept[0].name if len(kept) == 1 and kept[0].scale == 1 else Mix(kept)


# What plans list ----------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A position group of an adapter, times a number, in its turn."""

    name: str
    group: int
    scale: float = 1.0
    turn: int = 0


class Stack(NamedTuple):
    """A segment that is not one position group as it is: several on the same tokens, times a number, or in a
    turn behind others."""

    parts: tuple[Part, ...]


#: What a segment is: an adapter's name and the index of its position group, or several.
Segment = tuple[str, int] | Stack


def segment_of(term: Term, group: int) -> Segment:
    if term.scale == 1 and term.turn == 0:
        return (term.name, group)
    return Stack((Part(term.name, group, term.scale, term.turn),))


def parts_of(segment: Segment) -> tuple[Part, ...]:
    """What a segment is made of."""
    return segment.parts if isinstance(segment, Stack) else (Part(*segment),)


def joined(
    segments: tuple[Segment, ...], by_segment: SegmentRows, meet: Callable[[Segment, Segment], bool]
) -> tuple[tuple[Segment, ...], SegmentRows]:
    """Segments of which no row of h is in two that meet: such rows get a segment of their own, a stack.

    meet: whether two segments edit at a common site.
    """
    rows, counts = by_segment
    owners = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((owners, rows))
    rows, owners = rows[order], owners[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    lengths = np.diff(starts, append=len(rows))
    keep, found = np.ones(len(rows), dtype=bool), list(segments)
    numbers: dict[Stack, int] = {}
    for many in np.unique(lengths[lengths > 1]).tolist():
        mine = starts[lengths == many]
        sets, which = np.unique(owners[mine[:, None] + np.arange(many)], axis=0, return_inverse=True)
        for index, members in enumerate(sets.tolist()):
            several = [segments[member] for member in members]
            if not any(meet(a, b) for i, a in enumerate(several) for b in several[:i]):
                continue
            stack = Stack(tuple(sorted(part for one in several for part in parts_of(one))))
            if stack not in numbers:
                numbers[stack] = len(found)
                found.append(stack)
            begin = mine[which.ravel() == index]
            owners[begin] = numbers[stack]
            keep[(begin[:, None] + np.arange(1, many)).ravel()] = False
    if not numbers:
        return segments, by_segment
    rows, owners = rows[keep], owners[keep]
    order = np.argsort(owners, kind="stable")
    return tuple(found), SegmentRows(rows[order], np.bincount(owners, minlength=len(found)))


# What a call says ---------------------------------------------------------------------------------------


def with_scales(rows: Sequence[tuple[str, ...]], given: Any) -> tuple[RowNames, ...]:
    """What each row takes: names, and the `scale` of a call.

    rows: the names of each row's adapters, of a `sequence.Sequence` in their turn. given: None; a number, for
    all of them; numbers by adapter; or a list with one entry a row: a number, or one for each of the row's
    names.

    Raises ValueError that names `scale`.
    """
    if given is None:
        return tuple(row_of(_terms(row, [1.0] * len(row))) for row in rows)
    if isinstance(given, Mapping):
        unknown = [name for name in given if not any(name in row for row in rows)]
        if unknown:
            raise ValueError(f"{SCALE}: names {unknown[0]!r}, which no row of the batch has")
        numbers = [[_number(given.get(name, 1.0), repr(name)) for name in row] for row in rows]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != len(rows):
            raise ValueError(f"{SCALE}: has {len(given)} entries for a batch of {len(rows)} rows")
        numbers = [_numbers(entry, row, f"row {i}") for i, (entry, row) in enumerate(zip(given, rows))]
    else:
        numbers = [[_number(given, "all rows")] * len(row) for row in rows]
    return tuple(row_of(_terms(row, scales)) for row, scales in zip(rows, numbers))


def _terms(row: tuple[str, ...], scales: list[float]) -> list[Term]:
    follow = isinstance(row, InTurn)
    return [Term(name, scale, turn if follow else 0) for turn, (name, scale) in enumerate(zip(row, scales))]


def _numbers(entry: Any, row: tuple[str, ...], where: str) -> list[float]:
    if not isinstance(entry, Sequence) or isinstance(entry, str):
        return [_number(entry, where)] * len(row)
    if len(entry) != len(row):
        raise ValueError(f"{SCALE}: {where} has {len(entry)} numbers for {len(row)} adapters")
    return [_number(one, where) for one in entry]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{SCALE}: must be a finite number for {where}, was {value!r}")
    return float(value)
