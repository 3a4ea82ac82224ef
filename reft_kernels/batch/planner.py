"""From a batch's adapter names and prompts to its plan. What every front door stands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plan import SegmentRows
from .batch_plan import BatchPlan
from .lists import read_lists
from .names import BASE, POSITIONS
from .prompts import Prompts
from .selection import Selection, select
from .sequence import Sequence as InTurn
from .stacks import Mix, RowNames, joined, names_of, terms_of, with_scales
from .stages import SiteKey
from .store import AdapterStore

if TYPE_CHECKING:
    from ..adapter import Intervention

#: What a list of adapter names mostly holds.
_PLAIN = {str, type(None)}


class Planner:
    """Makes the plans for the adapters of one store."""

    def __init__(self, store: AdapterStore) -> None:
        self.store = store
        #: The last list of plain names that was found right, the store's version then, and what it means.
        self._right: tuple[list[str | None], int, tuple[RowNames, ...]] | None = None

    def check_names(self, given: Any, batch: int, scale: Any = None) -> tuple[RowNames, ...]:
        """What each row takes, None for the bare model.

        given: a list with one entry a row, an adapter's name, a list of several, or a `Sequence` of them.
        scale: what their edits are multiplied by; see `stacks.with_scales`.

        Raises ValueError that names `adapter_names` or `scale`.
        """
        right, store = self._right, self.store
        if (
            right is not None
            and scale is None
            and type(given) is list
            and given == right[0]
            and len(given) == batch
            and right[1] == store.version
            and not store.merged
        ):
            return right[2]  # as in each step of a loop
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ValueError(f"adapter_names: must be a list with one name a row, was {given!r}")
        if len(given) != batch:
            raise ValueError(f"adapter_names: has {len(given)} names for a batch of {batch} rows")
        if scale is None and set(map(type, given)) <= _PLAIN:  # as most calls are: one name a row
            plain = tuple(None if name == BASE else name for name in given)
            self._check_known([name for name in dict.fromkeys(plain) if name is not None])
            self._right = (list(given), store.version, plain)
            return plain
        rows = [self._names_of_row(row, entry) for row, entry in enumerate(given)]
        self._check_known([name for row in rows for name in row])
        names = with_scales(rows, scale)
        self._check_scales(names)
        return names

    def _names_of_row(self, row: int, entry: Any) -> tuple[str, ...]:
        """The adapters of one row: none for the bare model, one for a name, those in a list or a sequence."""
        listed = tuple(entry) if isinstance(entry, list | tuple) else (entry,)
        for name in listed:
            if not isinstance(name, str | None):
                raise ValueError(f"adapter_names: must hold names, or lists of names, held {name!r}")
        named = tuple(name for name in listed if name is not None and name != BASE)
        if len(listed) > 1 and len(named) < len(listed):
            raise ValueError(f"adapter_names: row {row} names the bare model beside adapters: {entry!r}")
        if len(set(named)) < len(named):
            raise ValueError(f"adapter_names: row {row} has an adapter twice: {entry!r}; give scale instead")
        return InTurn(*named) if isinstance(entry, InTurn) else named

    def _check_known(self, names: Sequence[str]) -> None:
        adapters = self.store.adapters
        for name in names:
            if name not in adapters:
                if name not in self.store.subspaces:
                    raise ValueError(f"adapter_names: {self.store.unknown(name)}")
                name = self.store.owner(name)
            if name in self.store.merged:
                raise ValueError(
                    f"adapter_names: {name!r} is merged into the weights, so every row has it; "
                    "unmerge_adapter makes it one to name again"
                )

    def _check_scales(self, names: Sequence[RowNames]) -> None:
        for term in dict.fromkeys(term for row in names for term in terms_of(row)):
            self.store.find(term.name).check_scale(term.scale)

    def needs_prompt(self, names: Sequence[RowNames]) -> bool:
        """Whether what these adapters edit depends on which tokens are prompt."""
        return any(positions.needs_prompt for positions in self.store.positions_of(names_of(names)))

    def needs_ids(self, names: Sequence[RowNames]) -> bool:
        """Whether what these adapters edit depends on token ids."""
        return any(positions.needs_ids for positions in self.store.positions_of(names_of(names)))

    def select(self, names: Sequence[RowNames], prompts: Prompts, positions: Any = None) -> Selection:
        """What the adapters of a batch's rows edit in its prompts and after them. See `selection.select`.

        positions: for each row the tokens to edit in place of the adapter's own; see `lists.read_lists`.

        Raises ValueError for an unknown name, too.
        """
        listed = names_of(names)
        self._check_known(listed)
        lists = None
        if positions is not None:
            lists = read_lists(positions, _single(names), prompts, self.store.find)
        selection = select(names, prompts, self.store.groups, lists)
        selection.owners = {name: self.store.find(name) for name in listed}
        several = [row for row in dict.fromkeys(names) if isinstance(row, Mix) and len(row.terms) > 1]
        if len(self.store.forms) > 1:
            for row in several:
                self._check_meeting(row)
        selection.stacked = bool(several) or not self.store.overlapping.isdisjoint(listed)
        return selection

    def _check_meeting(self, row: Mix) -> None:
        """Raises ValueError where two adapters of a row edit a token at one site, in two forms that have no
        sum."""
        seen: dict[tuple[SiteKey, int], list[tuple[str, Intervention]]] = {}
        for name, _, turn in row.terms:
            for one in self.store.find(name).interventions:
                for other, theirs in seen.get((SiteKey.of(one), turn), ()):
                    if theirs.form != one.form and theirs.positions.overlaps(one.positions):
                        raise ValueError(
                            f"adapter_names: {other!r} ({theirs.method}) and {name!r} ({one.method}) would "
                            f"edit the same tokens at {one.site} of layer {one.layer}, one of them element "
                            "by element: with an edit of low rank that has no sum; a row takes one of the "
                            "two, or one behind the other (Sequence)"
                        )
                seen.setdefault((SiteKey.of(one), turn), []).append((name, one))

    def plan(
        self,
        selection: Selection,
        start: int,
        length: int,
        batch: int,
        saved_modules: Mapping[str, Any] | None = None,
        ids: np.ndarray | None = None,
    ) -> BatchPlan | None:
        """The plan of a forward over columns [start, start + length) of a rectangular batch.

        batch: rows of h's batch, a multiple of the selection's (beams). ids: the forward's tokens, [batch,
        length], where `selection.needs_ids`. None if nothing is edited, unless there are saved modules to
        run. Nothing is prepared yet (`BatchPlan.prepare`).

        Raises ValueError where an adapter of the selection was deleted or replaced since.
        """
        by_segment = selection.window(start, length, batch // selection.batch, ids)
        return self._plan(selection, by_segment, batch * length, saved_modules)

    def step(
        self,
        selection: Selection,
        starts: Sequence[int] | np.ndarray,
        counts: Sequence[int] | np.ndarray,
        ids: Sequence[int] | np.ndarray | None = None,
        prepare: bool = True,
    ) -> BatchPlan | None:
        """The plan of an engine's step over a flat batch: of request i the tokens starts[i] … starts[i] +
        counts[i] − 1 of its sequence, request after request, in the order of the selection's names.

        A prefill, a chunk of one and a decode step are all the same. The selection is one of
        `Prompts.unpadded`. ids: of these tokens, where `selection.needs_ids`. The plan is prepared,
        unless that is left to the caller. None if nothing is edited.

        Raises ValueError for another number of requests than the selection's, or of ids than tokens, or a
        negative number.
        """
        first, many = np.asarray(starts, dtype=np.int64), np.asarray(counts, dtype=np.int64)
        for name, array in (("starts", first), ("counts", many)):
            if array.shape != (selection.batch,):
                raise ValueError(
                    f"{name}: must have one entry for each of the {selection.batch} requests, "
                    f"had shape {list(array.shape)}"
                )
            if array.size and array.min() < 0:
                raise ValueError(f"{name}: must be 0 or more, found {array.min()}")
        tokens = None if ids is None else np.asarray(ids)
        if tokens is not None and tokens.shape != (many.sum(),):
            raise ValueError(f"ids: must be those of {many.sum()} tokens, had shape {list(tokens.shape)}")
        plan = self._plan(selection, selection.chunks(first, many, tokens), int(many.sum()), None)
        if plan is not None and prepare:
            plan.prepare()
        return plan

    def _plan(
        self,
        selection: Selection,
        by_segment: SegmentRows | None,
        tokens: int,
        saved_modules: Mapping[str, Any] | None,
    ) -> BatchPlan | None:
        if by_segment is None:
            if not saved_modules:
                return None
            nothing = np.zeros(0, dtype=np.int64)
            by_segment = SegmentRows(nothing, np.zeros(len(selection.segments), dtype=np.int64))
        adapters, subspaces = self.store.adapters, self.store.subspaces
        for name, adapter in selection.owners.items():
            if adapters.get(name) is not adapter and subspaces.get(name) is not adapter:
                raise ValueError(f"adapter {name!r} was deleted while a generate call used it")
        segments = selection.segments
        if selection.stacked:
            segments, by_segment = joined(segments, by_segment, self.store.meet)
        table = self.store.table(segments)
        return BatchPlan(self.store, table, by_segment, tokens, saved_modules)

    def idle(self, tokens: int) -> BatchPlan:
        """The plan of a forward that edits nothing, for one whose norms are fused with edits."""
        nothing = np.zeros(0, dtype=np.int64)
        return BatchPlan(self.store, self.store.table(()), SegmentRows(nothing, nothing), tokens)


def _single(names: Sequence[RowNames]) -> list[str | None]:
    """One adapter a row, for positions that are given for it. Raises ValueError where a row has several."""
    found: list[str | None] = []
    for row, taken in enumerate(names):
        terms = terms_of(taken)
        if len(terms) > 1:
            raise ValueError(f"{POSITIONS}: row {row} has several adapters, {taken!r}; it must be one")
        found.append(terms[0].name if terms else None)
    return found
