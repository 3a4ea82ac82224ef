"""`AdapterStore`: the adapters of one model, the pools they lie in, and where each lies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..plan import to_device
from ..pool import Pool, PoolFull, Span
from ..scale_pool import AnyFold
from .named import Names
from .snapshots import Trained
from .stacks import Part, Segment, Stack, parts_of
from .stages import FORMS, KEEP_NORM, LOW_RANK, SiteKey, Stage, StageKey, in_turn, stages_of
from .tables import Place, SiteTable, Table, Turn, edits_of, padded

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


class AdapterStore(Names):
    """Adapters, laid into pools: one for each device, dtype, width and form.

    Args:
        capacity: pool rows of each pool, fixed, so that addresses stay; None: pools grow.
        pool_dtype: dtype of folded adapters; None for that of the hidden states that they edit.

    Attributes:
        adapters: name → Adapter.
        subspaces: "adapter/subspace" → `Subspace`. It lies in its adapter's ranges; where its rows don't lie
            side by side there, in room of its own, as a stack.
        places: what hidden states look like at each site that an adapter was laid for.
        overlapping: the names of those whose own interventions may share a token.
        merged: names of adapters that are part of the model's weights, and so of no plan.
        version: counts up whenever adapters come, go or move, so that what was made before is known as old.
    """

    def __init__(self, capacity: int | None = None, pool_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.capacity, self.pool_dtype = capacity, pool_dtype
        self.merged: set[str] = set()
        self.pools: dict[tuple[torch.device, torch.dtype, int, str], Pool] = {}
        self.places: dict[SiteKey, Place] = {}
        self.version = 0
        self._laid: dict[str, list[_Laid]] = {}
        #: Equal specs are one object, so that a batch asks each of them once; so are equal tuples of them.
        self._specs: dict[Positions, Positions] = {}
        self._spec_tuples: dict[tuple[Positions, ...], tuple[Positions, ...]] = {}
        self._groups: dict[str, tuple[Positions, ...]] = {}
        self.overlapping: set[str] = set()
        #: Stages of sites have numbers, rows of `_ranges`: name → (first, rank) by position group and stage.
        self._numbers: dict[StageKey, int] = {}
        self._widths: dict[SiteKey, int] = {}
        self._ranges: dict[str, np.ndarray] = {}
        self._segments: dict[str, tuple[Segment, ...]] = {}
        self._tables: dict[tuple[Segment, ...], Table] = {}
        self._trained = Trained()
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

        Raises PoolFull where it does not fit a fixed capacity, and ValueError where a site has another width
        or a name is taken. Nothing is changed then.
        """
        self.check_name(name, adapter)
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
        self.subspaces |= adapter.named_subspaces(name)
        groups = tuple(self._specs.setdefault(one, one) for one in adapter.groups)
        groups = self._spec_tuples.setdefault(groups, groups)
        for known in (name, *self.subspaces_of(name)):
            self._groups[known] = groups
            if adapter.overlapping:
                self.overlapping.add(known)
        self._number(name)
        self._changed()

    def remove(self, name: str) -> Adapter:
        """Frees an adapter's room and returns the adapter."""
        adapter, names = self.adapters.pop(name), (name, *self.subspaces_of(name))
        self._forget_stacks(stack for stack in self._stacks if any(p.name in names for p in stack.parts))
        for pool, span in self._laid.pop(name):
            pool.remove(span)
        for known in names:
            del self._ranges[known], self._segments[known], self._groups[known]
            self.overlapping.discard(known)
            self.subspaces.pop(known, None)
        self._trained.discard(name)
        self._changed()
        return adapter

    def stale(self, adapters: dict[str, Adapter]) -> bool:
        """Whether the pools may hold some of these as they were: those that train, and those that have been
        frozen since they were renewed."""
        self._trained.add(self.owner(name) for name, adapter in adapters.items() if adapter.trainable)
        return self._trained.any_of(map(self.owner, adapters))

    def refresh(self, adapters: dict[str, Adapter], drawn: Drawn) -> None:
        """Renews the folds of adapters that `stale` found, unless they are known to be as they were.

        drawn: the random numbers of a forward in training, of the interventions that drew any.
        """
        renewed = set()
        for name in dict.fromkeys(map(self.owner, adapters)):
            if self._trained.is_due(name, self.adapters[name], drawn):
                with torch.no_grad():
                    for (pool, span), fold in zip(self._laid[name], self.adapters[name].folds(drawn)):
                        pool.write(span, fold)
                renewed.add(name)
        keys = list(self._numbers)
        for stack, laid in self._stacks.items():
            if any(self.owner(part.name) in renewed for part in stack.parts):
                for number, (pool, span) in laid.items():
                    pool.write(span, self._stack_fold(stack, keys[number], drawn))

    def move(self, key: SiteKey, place: Place) -> None:
        """Learns that a site's hidden states have another device or dtype, and lays its adapters there."""
        self.places[key] = place
        self._trained.forget_all()
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
        for known in self.subspaces_of(name):
            part = ranges.copy()
            for (key, *_), mine in zip(keys, self.subspaces[known].interventions):
                first, rank = mine.stretch or (0, mine.pool_rows)
                part[mine.group, self._numbers[key]] += (first, 0)
                part[mine.group, self._numbers[key], 1] = rank
            self._ranges[known] = part
            self._segments[known] = tuple((known, group) for group in range(len(part)))

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
            if isinstance(segment, Stack) or (self.subspaces and self.lies_apart(segment[0])):
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
        found = [padded(one, stages) if one.shape[1] < stages else one for one in found]
        by_segment = np.concatenate(found) if found else np.zeros((0, stages, 2), dtype=np.int32)
        by_stage = np.ascontiguousarray(by_segment.view(np.int64)[:, :, 0].T)  # a pair as one number
        return by_stage[:, :, None].view(np.int32)

    # Stacks ----------------------------------------------------------------------------------------------

    def _range(self, segment: Segment) -> np.ndarray:
        """(first pool row, rank) of a segment by the number of the stage, int32 [stages, 2]."""
        if not isinstance(segment, Stack):
            name, group = segment
            if not self.lies_apart(name):
                return self._ranges[name][group]
            segment = Stack((Part(name, group),))
        if segment not in self._stack_ranges:
            self._lay(segment)
        return self._stack_ranges[segment]

    def meet(self, one: Segment, other: Segment) -> bool:
        """Whether two segments edit at a common stage."""
        mine, theirs = (
            {
                (int(number), part.turn)
                for part in parts_of(it)
                for number in np.flatnonzero(self._ranges[part.name][part.group][:, 1])
            }
            for it in (one, other)
        )
        return not mine.isdisjoint(theirs)

    def _lay(self, stack: Stack) -> None:
        """Finds the ranges of a stack: a part's own, where it alone edits at a stage, and as it is; elsewhere
        the folds of all lie one behind the other (or summed, as their form says), in room of their own.

        Raises PoolFull where it does not fit a fixed capacity.
        """
        self._number_turns(stack)
        ranges = np.zeros((len(self._numbers), 2), dtype=np.int32)
        laid: dict[int, _Laid] = {}
        for key, number in self._numbers.items():
            own = self._numbers[key._replace(turn=0)]
            mine = [part for part in stack.parts if part.turn == key.turn and self._rank(part, own)]
            if mine and key.form == KEEP_NORM:
                ranges[number] = (0, 1)  # whoever of them keeps it, the sum does
            elif len(mine) == 1 and mine[0].scale == 1 and not self.lies_apart(mine[0].name):
                ranges[number] = self._ranges[mine[0].name][mine[0].group][own]
            elif mine:
                pool = self.pool_of(key.site, key.form)
                try:
                    laid[number] = _Laid(pool, pool.add(self._stack_fold(stack, key)))
                except PoolFull:
                    for before in laid.values():
                        before.pool.remove(before.span)
                    raise
                ranges[number] = tuple(laid[number].span)
        self._stacks[stack], self._stack_ranges[stack] = laid, ranges
        for part in stack.parts:  # whose own folds may be of other parameters than these
            self._trained.forget(self.owner(part.name))

    def _number_turns(self, stack: Stack) -> None:
        """Numbers the stages of parts that edit behind others."""
        known = len(self._numbers)
        for part in stack.parts:
            for one in self.find(part.name).interventions if part.turn else ():
                for key in stages_of(one) if one.group == part.group else ():
                    self._numbers.setdefault(key._replace(turn=part.turn), len(self._numbers))
        if len(self._numbers) > known:
            self._changed()

    def _rank(self, part: Part, number: int) -> int:
        ranges = self._ranges[part.name][part.group]
        return int(ranges[number, 1]) if number < len(ranges) else 0

    @torch.no_grad()
    def _stack_fold(self, stack: Stack, key: StageKey, drawn: Drawn | None = None) -> AnyFold:
        adapters = {part.name: self.find(part.name) for part in stack.parts}
        made, edits = FORMS[key.form].fold, edits_of(adapters, stack, key)
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
        owners = {name: self.find(name) for name in names}
        ranges = self.ranges(segments)
        table = Table(segments, owners, self.version)
        busy = (ranges[:, :, 1] != 0).any(axis=1)
        copies: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        turns: dict[SiteKey, dict[int, Turn]] = {}
        for key in sorted(self._numbers, key=in_turn):
            number = self._numbers[key]
            if not busy[number]:
                continue
            device = self.places[key.site].device
            if device not in copies:
                # The spans of all stages go to a device in one copy.
                copies[device] = to_device(ranges, device).unbind()
                table.devices.append(device)
            mine, spans = turns.setdefault(key.site, {}), copies[device][number]
            turn = mine.get(key.turn, Turn(()))
            if key.form == KEEP_NORM:
                mine[key.turn] = turn._replace(norms=spans)
                continue
            who = functools.partial(table.edits, key)
            stage = Stage(key.form, self.pool_of(key.site, key.form), spans, who)
            mine[key.turn] = turn._replace(stages=(*turn.stages, stage))
        for site, mine in turns.items():
            place = self.places[site]
            table.sites[site] = SiteTable(tuple(mine.values()), table.devices.index(place.device), place)
        return table
