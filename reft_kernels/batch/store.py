"""`AdapterStore`: the adapters of one model, the pools they lie in, and where each lies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..plan import to_device
from ..pool import Pool, PoolFull, Span
from ..scale_pool import AnyFold
from .snapshots import Snapshot, snapshot_of
from .stacks import Part, Segment, Stack, parts_of
from .stages import FORMS, KEEP_NORM, LOW_RANK, Edits, SiteKey, Stage, StageKey, in_turn, stages_of
from .tables import Place, SiteTable, Table

if TYPE_CHECKING:
    from ..adapter import Adapter, Drawn
    from ..positions import Positions

#: Tables that are kept: sets of segments that come again are served from here.
_KEPT_TABLES = 128
#: So many stacks keep the room that they were given, for when they come again.
_KEPT_STACKS = 256


class _Laid(NamedTuple):
    """Where one intervention lies."""

    pool: Pool
    span: Span


class AdapterStore:
    """Adapters, laid into pools: one for each device, dtype, width and form.

    Args:
        capacity: pool rows of each pool, fixed, so that addresses stay; None: pools grow.
        pool_dtype: dtype of folded adapters; None for that of the hidden states that they edit.

    Attributes:
        adapters: name → Adapter.
        places: what hidden states look like at each site that an adapter was laid for.
        overlapping: the names of those whose own interventions may share a token.
        merged: names of adapters that are part of the model's weights, and so of no plan.
        version: counts up whenever adapters come, go or move, so that what was made before is known as old.
    """

    def __init__(self, capacity: int | None = None, pool_dtype: torch.dtype | None = None) -> None:
        self.capacity, self.pool_dtype = capacity, pool_dtype
        self.adapters: dict[str, Adapter] = {}
        self.merged: set[str] = set()
        self.pools: dict[tuple[torch.device, torch.dtype, int, str], Pool] = {}
        self.places: dict[SiteKey, Place] = {}
        self.version = 0
        self._laid: dict[str, list[_Laid]] = {}
        #: Equal specs are one object, so that a batch asks each of them once; so are equal tuples of them.
        self._specs: dict[Positions, Positions] = {}
        self._spec_tuples: dict[tuple[Positions, ...], tuple[Positions, ...]] = {}
        self._groups: dict[str, tuple[Positions, ...]] = {}
        #: Of the parameters that trainable adapters had when they were laid last.
        self._snapshots: dict[str, Snapshot] = {}
        self.overlapping: set[str] = set()
        #: Stages of sites have numbers, rows of `_ranges`: name → (first, rank) by position group and stage.
        self._numbers: dict[StageKey, int] = {}
        self._widths: dict[SiteKey, int] = {}
        self._ranges: dict[str, np.ndarray] = {}
        self._segments: dict[str, tuple[Segment, ...]] = {}
        self._tables: dict[tuple[Segment, ...], Table] = {}
        #: Those that trained since they were last renewed for good.
        self._trained: set[str] = set()
        #: What was laid for stacks, by the number of the stage, and their ranges as in `_ranges`.
        self._stacks: dict[Stack, dict[int, _Laid]] = {}
        self._stack_ranges: dict[Stack, np.ndarray] = {}

    def groups(self, name: str) -> tuple[Positions, ...]:
        """The position specs of an adapter that have parameters of their own."""
        return self._groups[name]  # asked for each row: a module's attributes take longer to find

    def positions_of(self, names: Iterable[str]) -> list[Positions]:
        """The distinct position specs of some adapters."""
        groups = self._groups
        return list({id(one): one for name in names for one in groups[name]}.values())

    # Adapters come and go --------------------------------------------------------------------------------

    def add(self, name: str, adapter: Adapter, place_of: Callable[[SiteKey], Place] | Place) -> None:
        """Folds an adapter into the pools, under a name that is not taken.

        place_of: what hidden states at a site look like, asked for sites that are new.

        Raises PoolFull where it does not fit a fixed capacity, and ValueError where a site has another width.
        Nothing is changed then.
        """
        places = dict(self.places)
        for one in adapter.interventions:
            key = SiteKey.of(one)
            if self._widths.get(key, one.width) != one.width:
                raise ValueError(
                    f"adapter: has width {one.width} at {key.site} of layer {key.layer}, where others have "
                    f"{self._widths[key]}"
                )
            if key not in places:
                places[key] = place_of if isinstance(place_of, Place) else place_of(key)
        self._check_room(adapter, places)
        laid: list[_Laid] = []
        with torch.no_grad():
            for one, fold in zip(adapter.interventions, adapter.folds()):
                pool = self._pool(places[SiteKey.of(one)], one.width, one.form)
                laid.append(_Laid(pool, pool.add(fold)))
        self.places = places
        self.adapters[name], self._laid[name] = adapter, laid
        self.stale({name: adapter})
        groups = tuple(self._specs.setdefault(one, one) for one in adapter.groups)
        self._groups[name] = self._spec_tuples.setdefault(groups, groups)
        if adapter.overlapping:
            self.overlapping.add(name)
        self._number(name)
        self._changed()

    def remove(self, name: str) -> Adapter:
        """Frees an adapter's room and returns the adapter."""
        adapter = self.adapters.pop(name)
        self._forget_stacks(stack for stack in self._stacks if any(p.name == name for p in stack.parts))
        for pool, span in self._laid.pop(name):
            pool.remove(span)
        del self._ranges[name], self._segments[name], self._groups[name]
        self._snapshots.pop(name, None)
        self.overlapping.discard(name)
        self._trained.discard(name)
        self._changed()
        return adapter

    def stale(self, adapters: dict[str, Adapter]) -> bool:
        """Whether the pools may hold some of these as they were: those that train, and those that have been
        frozen since they were renewed."""
        trained = self._trained
        trained.update(name for name, adapter in adapters.items() if adapter.trainable)
        return bool(trained) and not trained.isdisjoint(adapters)

    def refresh(self, adapters: dict[str, Adapter], drawn: Drawn) -> None:
        """Renews the folds of adapters that `stale` found, unless they are known to be as they were.

        drawn: the random numbers of a forward in training, of the interventions that drew any.
        """
        renewed = set()
        for name in self._trained.intersection(adapters):
            adapter = adapters[name]
            # Folds of random numbers are of this forward alone.
            now = None if any(one in drawn for one in adapter.interventions) else snapshot_of(adapter)
            before = self._snapshots.pop(name, None)
            if now is None or not now.same(before):
                with torch.no_grad():
                    for (pool, span), fold in zip(self._laid[name], adapter.folds(drawn)):
                        pool.write(span, fold)
                renewed.add(name)
            if not adapter.trainable:
                self._trained.discard(name)
            elif now is not None:
                self._snapshots[name] = now
        for stack, laid in self._stacks.items():
            if any(part.name in renewed for part in stack.parts):
                for key, number in self._numbers.items():
                    if number in laid:
                        laid[number].pool.write(laid[number].span, self._stack_fold(stack, key, drawn))

    def move(self, key: SiteKey, place: Place) -> None:
        """Learns that a site's hidden states have another device or dtype, and lays its adapters there."""
        self.places[key] = place
        self._snapshots.clear()
        self._forget_stacks(self._stacks)
        for name, adapter in self.adapters.items():
            for index, one in enumerate(adapter.interventions):
                if SiteKey.of(one) == key:
                    pool, span = self._laid[name][index]
                    new = self._pool(place, one.width, one.form)
                    if new is not pool:
                        self._laid[name][index] = _Laid(new, new.add(one.fold()))
                        pool.remove(span)
            self._number(name)
        self._changed()

    def _pool(self, place: Place, width: int, form: str = LOW_RANK) -> Pool:
        dtype = self.pool_dtype or place.dtype
        if FORMS[form].wide:
            dtype = torch.promote_types(dtype, torch.float32)
        key = (place.device, dtype, width, form)
        if key not in self.pools:
            self.pools[key] = FORMS[form].pool(width, dtype, place.device, self.capacity)
        return self.pools[key]

    def _check_room(self, adapter: Adapter, places: dict[SiteKey, Place]) -> None:
        ranks: dict[int, tuple[Pool, list[int]]] = {}
        for one in adapter.interventions:
            pool = self._pool(places[SiteKey.of(one)], one.width, one.form)
            ranks.setdefault(id(pool), (pool, []))[1].append(one.pool_rows)
        for pool, wanted in ranks.values():
            if pool.fixed and not pool.room_for(wanted):
                raise PoolFull(
                    f"capacity: the adapter needs {sum(wanted)} pool rows, in pieces of up to {max(wanted)}; "
                    f"the pool has {pool.capacity}, of which {pool.used} are used"
                )

    def _number(self, name: str) -> None:
        """Notes an adapter's ranges by stage, as tables are made of them."""
        adapter = self.adapters[name]
        keys = [stages_of(one) for one in adapter.interventions]
        for (key, *more), one in zip(keys, adapter.interventions):
            for stage in (key, *more):
                self._numbers.setdefault(stage, len(self._numbers))
            self._widths.setdefault(key.site, one.width)
        ranges = np.zeros((len(adapter.groups), len(self._numbers), 2), dtype=np.int32)
        for (key, *more), one, (_, span) in zip(keys, adapter.interventions, self._laid[name]):
            ranges[one.group, self._numbers[key]] = tuple(span)
            for norm in more:
                ranges[one.group, self._numbers[norm]] = (0, 1)
        self._ranges[name] = ranges
        self._segments[name] = tuple((name, group) for group in range(len(ranges)))

    def _changed(self) -> None:
        self.version += 1
        self._tables.clear()

    # Tables ----------------------------------------------------------------------------------------------

    def table(self, segments: tuple[Segment, ...]) -> Table:
        """The table of a set of segments, kept until adapters come, go or move."""
        table = self._tables.get(segments)
        if table is None:
            if len(self._tables) >= _KEPT_TABLES:
                del self._tables[next(iter(self._tables))]
            if len(self._stacks) >= _KEPT_STACKS:
                self._drop_stacks(segments)
            table = self._tables[segments] = self._make_table(segments)
        return table

    @property
    def numbers(self) -> dict[StageKey, int]:
        """The stages that adapters were laid for, and their numbers: rows of tables of all stages."""
        return self._numbers

    @property
    def n_stages(self) -> int:
        return len(self._numbers)

    @property
    def forms(self) -> set[str]:
        """Those of the adapters that were ever laid."""
        return {key.form for key in self._numbers} - {KEEP_NORM}

    def pool_of(self, key: SiteKey, form: str = LOW_RANK) -> Pool:
        """The pool in which a site's interventions of a form lie."""
        return self._pool(self.places[key], self._widths[key], form)

    def ranges(self, segments: tuple[Segment, ...]) -> np.ndarray:
        """(first pool row, rank) of each segment at each stage, int32 [stages, S, 2]; rank 0 for nothing."""
        found: list[np.ndarray] = []  # [groups, stages, 2] each
        at = 0
        while at < len(segments):
            segment = segments[at]
            if isinstance(segment, Stack):
                found.append(self._range(segment)[None])
            else:
                name, group = segment
                mine = self._ranges[name]
                # Mostly all groups of an adapter stand side by side.
                together = group == 0 and segments[at : at + len(mine)] == self._segments[name]
                found.append(mine if together else mine[group : group + 1])
            at += len(found[-1])
        stages = len(self._numbers)
        # An adapter that came before others knows of fewer stages.
        found = [_padded(one, stages) if one.shape[1] < stages else one for one in found]
        by_segment = np.concatenate(found) if found else np.zeros((0, stages, 2), dtype=np.int32)
        by_stage = np.ascontiguousarray(by_segment.view(np.int64)[:, :, 0].T)  # a pair as one number
        return by_stage[:, :, None].view(np.int32)

    # Stacks ----------------------------------------------------------------------------------------------

    def _range(self, segment: Segment) -> np.ndarray:
        """(first pool row, rank) of a segment by the number of the stage, int32 [stages, 2]."""
        if not isinstance(segment, Stack):
            name, group = segment
            return self._ranges[name][group]
        if segment not in self._stack_ranges:
            self._lay(segment)
        return self._stack_ranges[segment]

    def meet(self, one: Segment, other: Segment) -> bool:
        """Whether two segments edit at a common stage."""
        mine, theirs = (
            {int(n) for p in parts_of(it) for n in np.flatnonzero(self._ranges[p.name][p.group][:, 1])}
            for it in (one, other)
        )
        return not mine.isdisjoint(theirs)

    def _lay(self, stack: Stack) -> None:
        """Finds the ranges of a stack: a part's own, where it alone edits at a stage, and as it is; elsewhere
        the folds of all lie one behind the other (or summed, as their form says), in room of their own.

        Raises PoolFull where it does not fit a fixed capacity.
        """
        ranges = np.zeros((len(self._numbers), 2), dtype=np.int32)
        laid: dict[int, _Laid] = {}
        for key, number in self._numbers.items():
            mine = [part for part in stack.parts if self._rank(part, number)]
            if mine and key.form == KEEP_NORM:
                ranges[number] = (0, 1)  # whoever of them keeps it, the sum does
            elif len(mine) == 1 and mine[0].scale == 1:
                ranges[number] = self._ranges[mine[0].name][mine[0].group][number]
            elif mine:
                pool = self.pool_of(*key)
                try:
                    laid[number] = _Laid(pool, pool.add(self._stack_fold(stack, key)))
                except PoolFull:
                    for before in laid.values():
                        before.pool.remove(before.span)
                    raise
                ranges[number] = tuple(laid[number].span)
        self._stacks[stack], self._stack_ranges[stack] = laid, ranges
        for part in stack.parts:  # whose own folds may be of other parameters than these
            self._snapshots.pop(part.name, None)

    def _rank(self, part: Part, number: int) -> int:
        ranges = self._ranges[part.name][part.group]
        return int(ranges[number, 1]) if number < len(ranges) else 0

    @torch.no_grad()
    def _stack_fold(self, stack: Stack, key: StageKey, drawn: Drawn | None = None) -> AnyFold:
        made, edits = FORMS[key.form].fold, _edits(self.adapters, stack, key)
        folds = made.meeting([one.fold(None, (drawn or {}).get(one)).times(scale) for one, scale in edits])
        return made(*(torch.cat(parts) for parts in zip(*folds)))

    def _drop_stacks(self, but: tuple[Segment, ...]) -> None:
        """Frees the room of all stacks but those among some segments."""
        self._forget_stacks(stack for stack in self._stacks if stack not in but)
        self._changed()

    def _forget_stacks(self, stacks: Iterable[Stack]) -> None:
        for stack in list(stacks):
            del self._stack_ranges[stack]
            for pool, span in self._stacks.pop(stack).values():
                pool.remove(span)

    # No inference tensors: a table is kept, and may be trained through after a generate made it.
    @torch.inference_mode(False)
    def _make_table(self, segments: tuple[Segment, ...]) -> Table:
        names = [it[0] for it in segments if not isinstance(it, Stack)]
        names += [part.name for it in segments if isinstance(it, Stack) for part in it.parts]
        owners = {name: self.adapters[name] for name in names}
        ranges = self.ranges(segments)
        table = Table(segments, owners, self.version)
        busy = (ranges[:, :, 1] != 0).any(axis=1)
        copies: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        stages: dict[SiteKey, list[Stage]] = {}
        norms: dict[SiteKey, torch.Tensor] = {}
        for key in sorted(self._numbers, key=in_turn):
            number = self._numbers[key]
            if not busy[number]:
                continue
            device = self.places[key.site].device
            if device not in copies:
                # The spans of all stages go to a device in one copy.
                copies[device] = to_device(ranges, device).unbind()
                table.devices.append(device)
            if key.form == KEEP_NORM:
                norms[key.site] = copies[device][number]
                continue
            who = functools.partial(_all_edits, table, key)
            stage = Stage(key.form, self.pool_of(*key), copies[device][number], who)
            stages.setdefault(key.site, []).append(stage)
        for site, listed in stages.items():
            place = self.places[site]
            table.sites[site] = SiteTable(
                tuple(listed), table.devices.index(place.device), place, norms.get(site)
            )
        return table


def _padded(ranges: np.ndarray, stages: int) -> np.ndarray:
    """Ranges [groups, fewer stages, 2] with rank 0 at the stages that they do not know."""
    return np.pad(ranges, ((0, 0), (0, stages - ranges.shape[1]), (0, 0)))


def _edits(adapters: Mapping[str, Adapter], segment: Segment, key: StageKey) -> Edits:
    """What a segment does at a stage."""
    return tuple(
        (one, part.scale)
        for part in parts_of(segment)
        for one in adapters[part.name].interventions
        if one.group == part.group and StageKey.of(one) == key
    )


def _all_edits(table: Table, key: StageKey) -> list[Edits]:
    """What each segment of a table does at a stage."""
    return [_edits(table.adapters, segment, key) for segment in table.segments]
