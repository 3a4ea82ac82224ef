"""`AdapterStore`: the adapters of one model, the pools they lie in, and where each lies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..plan import to_device
from ..pool import Pool, PoolFull, Span
from .selection import Segment
from .tables import Place, SiteKey, SiteTable, Table

if TYPE_CHECKING:
    from ..adapter import Adapter, Intervention
    from ..positions import Positions

#: Tables that are kept: sets of segments that come again are served from here.
_KEPT_TABLES = 128


class _Laid(NamedTuple):
    """Where one intervention lies."""

    pool: Pool
    span: Span


class AdapterStore:
    """Adapters, laid into pools: one for each device, dtype and width.

    Args:
        capacity: pool rows of each pool, fixed, so that addresses stay; None: pools grow.
        pool_dtype: dtype of folded adapters; None for that of the hidden states that they edit.

    Attributes:
        adapters: name → Adapter.
        places: what hidden states look like at each site that an adapter was laid for.
        version: counts up whenever adapters come, go or move, so that what was made before is known as old.
    """

    def __init__(self, capacity: int | None = None, pool_dtype: torch.dtype | None = None) -> None:
        self.capacity, self.pool_dtype = capacity, pool_dtype
        self.adapters: dict[str, Adapter] = {}
        self.pools: dict[tuple[torch.device, torch.dtype, int], Pool] = {}
        self.places: dict[SiteKey, Place] = {}
        self.version = 0
        self._laid: dict[str, list[_Laid]] = {}
        self._groups: dict[str, tuple[Positions, ...]] = {}
        #: Sites have numbers, rows of `_ranges`: name → (first, rank) by position group and site.
        self._numbers: dict[SiteKey, int] = {}
        self._widths: dict[SiteKey, int] = {}
        self._ranges: dict[str, np.ndarray] = {}
        self._tables: dict[tuple[Segment, ...], Table] = {}

    def groups(self, name: str) -> tuple[Positions, ...]:
        """The position specs of an adapter that have parameters of their own."""
        return self._groups[name]  # asked for each row: a module's attributes take longer to find

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
                pool = self._pool(places[SiteKey.of(one)], one.width)
                laid.append(_Laid(pool, pool.add(fold)))
        self.places = places
        self.adapters[name], self._laid[name], self._groups[name] = adapter, laid, adapter.groups
        self._number(name)
        self._changed()

    def remove(self, name: str) -> Adapter:
        """Frees an adapter's room and returns the adapter."""
        adapter = self.adapters.pop(name)
        for pool, span in self._laid.pop(name):
            pool.remove(span)
        del self._ranges[name], self._groups[name]
        self._changed()
        return adapter

    def refresh(self, adapters: dict[str, Adapter]) -> None:
        """Renews the folds of trainable adapters, whose parameters may have changed since they were laid.

        Nothing tells whether they did: fused optimizers and sharding don't count a tensor's versions up.
        """
        for name, adapter in adapters.items():
            if adapter.trainable:
                with torch.no_grad():
                    for (pool, span), fold in zip(self._laid[name], adapter.folds()):
                        pool.write(span, fold)

    def move(self, key: SiteKey, place: Place) -> None:
        """Learns that a site's hidden states have another device or dtype, and lays its adapters there."""
        self.places[key] = place
        for name, adapter in self.adapters.items():
            for index, one in enumerate(adapter.interventions):
                if SiteKey.of(one) == key:
                    pool, span = self._laid[name][index]
                    new = self._pool(place, one.width)
                    if new is not pool:
                        self._laid[name][index] = _Laid(new, new.add(one.fold()))
                        pool.remove(span)
            self._number(name)
        self._changed()

    def _pool(self, place: Place, width: int) -> Pool:
        dtype = self.pool_dtype or place.dtype
        key = (place.device, dtype, width)
        if key not in self.pools:
            self.pools[key] = Pool(width, dtype, place.device, self.capacity)
        return self.pools[key]

    def _check_room(self, adapter: Adapter, places: dict[SiteKey, Place]) -> None:
        ranks: dict[int, tuple[Pool, list[int]]] = {}
        for one in adapter.interventions:
            pool = self._pool(places[SiteKey.of(one)], one.width)
            ranks.setdefault(id(pool), (pool, []))[1].append(one.pool_rows)
        for pool, wanted in ranks.values():
            if pool.fixed and not pool.room_for(wanted):
                raise PoolFull(
                    f"capacity: the adapter needs {sum(wanted)} pool rows, in pieces of up to {max(wanted)}; "
                    f"the pool has {pool.capacity}, of which {pool.used} are used"
                )

    def _number(self, name: str) -> None:
        """Notes an adapter's ranges by site, as tables are made of them."""
        adapter = self.adapters[name]
        keys = [SiteKey.of(one) for one in adapter.interventions]
        for key, one in zip(keys, adapter.interventions):
            self._numbers.setdefault(key, len(self._numbers))
            self._widths.setdefault(key, one.width)
        ranges = np.zeros((len(adapter.groups), len(self._numbers), 2), dtype=np.int32)
        for key, one, (_, span) in zip(keys, adapter.interventions, self._laid[name]):
            ranges[one.group, self._numbers[key]] = tuple(span)
        self._ranges[name] = ranges

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
            table = self._tables[segments] = self._make_table(segments)
        return table

    @property
    def numbers(self) -> dict[SiteKey, int]:
        """The sites that adapters were laid for, and their numbers: rows of tables of all sites."""
        return self._numbers

    @property
    def n_sites(self) -> int:
        return len(self._numbers)

    def pool_of(self, key: SiteKey) -> Pool:
        """The pool in which a site's interventions lie."""
        return self._pool(self.places[key], self._widths[key])

    def ranges(self, segments: tuple[Segment, ...]) -> np.ndarray:
        """(first pool row, rank) of each segment at each site, int32 [sites, S, 2]; rank 0 for nothing."""
        ranges = np.zeros((len(self._numbers), len(segments), 2), dtype=np.int32)
        for index, (name, group) in enumerate(segments):
            mine = self._ranges[name][group]
            ranges[: len(mine), index] = mine
        return ranges

    # No inference tensors: a table is kept, and may be trained through after a generate made it.
    @torch.inference_mode(False)
    def _make_table(self, segments: tuple[Segment, ...]) -> Table:
        owners = {name: self.adapters[name] for name in dict.fromkeys(name for name, _ in segments)}
        table = Table(segments, owners, self.version)
        ranges = self.ranges(segments)
        busy = (ranges[:, :, 1] != 0).any(axis=1)
        copies: dict[torch.device, torch.Tensor] = {}
        for key, number in self._numbers.items():
            if not busy[number]:
                continue
            place = self.places[key]
            if place.device not in copies:
                # The spans of all sites go to a device in one copy.
                copies[place.device] = to_device(ranges, place.device)
                table.devices.append(place.device)
            who = functools.partial(_interventions, table, key)
            table.sites[key] = SiteTable(
                self._pool(place, self._widths[key]),
                copies[place.device][number],
                table.devices.index(place.device),
                place,
                who,
            )
        return table


def _interventions(table: Table, key: SiteKey) -> list[Intervention | None]:
    """For each segment of a table the intervention that edits at a site, or None."""
    found: list[Intervention | None] = []
    for name, group in table.segments:
        mine = table.adapters[name].interventions
        found.append(next((one for one in mine if one.group == group and SiteKey.of(one) == key), None))
    return found
