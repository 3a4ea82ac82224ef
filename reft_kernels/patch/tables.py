"""From a batch's segments to what a site hands to the op: pools, spans tables, rows on each device.

`Registry` owns the pools and says where every intervention lies. `Table` holds, for one set of segments, the
spans of every site. `BatchPlan` adds the rows of one forward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..plan import Rows, cover, pack_rows, pack_spans
from ..pool import Fold, Pool, PoolFull, Span
from .prompts import Segment

if TYPE_CHECKING:
    from ..adapter import Adapter, Intervention
    from .saved_modules import Share


class SiteKey(NamedTuple):
    """Where an edit happens in a model. head: None, or the index of an attention head."""

    site: str
    layer: int
    head: int | None


class Place(NamedTuple):
    """What hidden states at a site look like."""

    device: torch.device
    dtype: torch.dtype


class LivePool(NamedTuple):
    """What an op takes of a pool, with autograd: down, up [P, d], bias and kind [P], and spans [S, 2]."""

    down: Tensor
    up: Tensor
    bias: Tensor
    kind: Tensor
    spans: Tensor


class SiteTable:
    """One site under one set of segments: its pool, each segment's range in it, and whose it is.

    slot: index into the plan's rows (one for each device).
    interventions: for each segment the one that edits here, or None.
    """

    __slots__ = ("interventions", "live", "place", "pool", "slot", "spans")

    def __init__(
        self,
        pool: Pool,
        spans: Tensor,
        slot: int,
        place: Place,
        interventions: list[Intervention | None],
    ) -> None:
        self.pool, self.spans, self.slot, self.place = pool, spans, slot, place
        self.interventions = interventions
        self.live: tuple[Tensor, Tensor] | None = None

    def live_pool(self, shared: Mapping[Intervention, Fold], dtype: torch.dtype) -> LivePool:
        """A pool made of this site's interventions alone, in segment order, that autograd sees through.

        shared: folds that were made already. dtype: of down, up and bias.
        """
        device = self.place.device
        folds = [shared.get(i) or i.fold() for i in self.interventions if i is not None]
        if self.live is None:
            ranks = [0 if i is None else i.pool_rows for i in self.interventions]
            firsts = itertools.accumulate(ranks, initial=0)
            kinds = torch.cat([fold.kind for fold in folds])
            spans = [Span(first, rank) for first, rank in zip(firsts, ranks)]
            self.live = (pack_spans(spans, device), kinds.to(device))
        spans_table, kind = self.live
        if len(folds) == 1:
            parts = [folds[0].down, folds[0].up, folds[0].bias]
        else:
            parts = [torch.cat([getattr(fold, name) for fold in folds]) for name in ("down", "up", "bias")]
        down, up, bias = (part.to(device, dtype) for part in parts)
        return LivePool(down, up, bias, kind, spans_table)


class Table:
    """The sites of one set of segments; changes only when the set of adapters does."""

    __slots__ = ("adapters", "devices", "registry", "segments", "sites", "version")

    def __init__(self, segments: tuple[Segment, ...], registry: Registry) -> None:
        self.segments, self.registry, self.version = segments, registry, registry.version
        self.sites: dict[SiteKey, SiteTable] = {}
        self.devices: list[torch.device] = []
        self.adapters: list[Adapter] = []

    @property
    def trainable(self) -> bool:
        return any(adapter.trainable for adapter in self.adapters)

    def refresh(self) -> None:
        """Renews in the pools what has been trained since it was laid there."""
        for name, adapter in zip(dict.fromkeys(name for name, _ in self.segments), self.adapters):
            if adapter.trainable:
                self.registry.refresh(name, adapter)


class BatchPlan:
    """All that the sites need in one forward.

    sites: from the table. rows: for each device of the table. tokens: rows of h in this forward.
    backends: of each device. saved_modules: whose copy of a module runs, by path.
    """

    __slots__ = (
        "backends",
        "by_head",
        "by_segment",
        "covers",
        "folds",
        "recomputing",
        "rows",
        "saved_modules",
        "sites",
        "stale",
        "table",
        "tokens",
    )

    def __init__(
        self,
        table: Table,
        by_segment: list[np.ndarray],
        tokens: int,
        saved_modules: dict[str, list[Share]],
    ) -> None:
        self.saved_modules = saved_modules
        self.table, self.sites, self.tokens = table, table.sites, tokens
        self.backends: dict[torch.device, str] = {}
        self.by_segment = by_segment
        self.rows: list[Rows] = [pack_rows(by_segment, device) for device in table.devices]
        self.by_head: dict[tuple[int, int, int], Rows] = {}
        self.covers: dict[tuple[torch.device, bool], Rows] = {}
        #: Whether a block is being run again under reentrant checkpointing.
        self.recomputing = False
        #: With autograd: the folds of adapters that want a gradient, made once a forward for all layers.
        #: (Asked each time, as PEFT and users freeze as they go.)
        self.folds: dict[Intervention, Fold] = {}
        if torch.is_grad_enabled():
            for adapter in table.adapters:
                if any(one.wants_grad for one in adapter.interventions):
                    self.folds.update(zip(adapter.interventions, adapter.folds()))
        #: Whether the pools may hold trainable adapters as they were: a step with autograd reads no pool, so
        #: they are renewed only once something does.
        self.stale = table.trainable
        if self.stale and not torch.is_grad_enabled():
            self.renew()

    def trains(self, site: SiteTable) -> bool:
        """Whether something at the site wants a gradient."""
        return any(one in self.folds for one in site.interventions)

    def renew(self) -> None:
        """Makes the pools what the parameters are now."""
        self.table.refresh()
        self.stale = False

    def add_devices(self) -> None:
        """Lays the rows out again where the table's devices changed."""
        self.rows = [pack_rows(self.by_segment, device) for device in self.table.devices]
        self.by_head.clear()

    def covering(self, device: torch.device, edited: bool) -> Rows:
        """Rows that name all of h: those of the plan and the others, or (edited: False) all as unedited."""
        key = (device, edited)
        if key not in self.covers:
            rows = cover(self.by_segment, self.tokens, device) if edited else _unedited(self.tokens, device)
            self.covers[key] = rows
        return self.covers[key]

    def head_rows(self, slot: int, head: int, heads: int) -> Rows:
        """The rows of one head in h.view(-1, head width)."""
        key = (slot, head, heads)
        if key not in self.by_head:
            rows, tiles, offsets = self.rows[slot]
            self.by_head[key] = Rows(rows * heads + head, tiles, offsets)
        return self.by_head[key]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # it is kept, whoever asks first
def _unedited(tokens: int, device: torch.device) -> Rows:
    return cover([], tokens, device)


class _Laid(NamedTuple):
    pool: Pool
    span: Span


def _key_of(intervention: Intervention) -> SiteKey:
    return SiteKey(intervention.site, intervention.layer, intervention.head)


class Registry:
    """The pools of a patched model, and where each intervention of each adapter lies in them."""

    def __init__(self, capacity: int | None, pool_dtype: torch.dtype | None) -> None:
        self.capacity, self.pool_dtype = capacity, pool_dtype
        self.pools: dict[tuple[torch.device, torch.dtype, int], Pool] = {}
        self.places: dict[SiteKey, Place] = {}
        self.version = 0
        self._laid: dict[str, list[_Laid]] = {}
        self._tables: dict[tuple[Segment, ...], Table] = {}

    def _pool(self, place: Place, width: int) -> Pool:
        dtype = self.pool_dtype or place.dtype
        key = (place.device, dtype, width)
        if key not in self.pools:
            self.pools[key] = Pool(width, dtype, place.device, self.capacity)
        return self.pools[key]

    def _check_room(self, adapter: Adapter) -> None:
        ranks: dict[int, tuple[Pool, list[int]]] = {}
        for intervention in adapter.interventions:
            pool = self._pool(self.places[_key_of(intervention)], intervention.width)
            ranks.setdefault(id(pool), (pool, []))[1].append(intervention.pool_rows)
        for pool, wanted in ranks.values():
            if pool.fixed and not pool.room_for(wanted):
                raise PoolFull(
                    f"capacity: the adapter needs {sum(wanted)} pool rows, in pieces of up to {max(wanted)}; "
                    f"the pool has {pool.capacity}, of which {pool.used} are used"
                )

    def lay(self, name: str, adapter: Adapter) -> None:
        """Folds an adapter into the pools. Nothing is changed where it does not fit (PoolFull)."""
        self._check_room(adapter)
        laid: list[_Laid] = []
        with torch.no_grad():
            for intervention, fold in zip(adapter.interventions, adapter.folds()):
                pool = self._pool(self.places[_key_of(intervention)], intervention.width)
                laid.append(_Laid(pool, pool.add(fold)))
        self._laid[name] = laid
        self.changed()

    def remove(self, name: str) -> None:
        for pool, span in self._laid.pop(name):
            pool.remove(span)
        self.changed()

    def changed(self) -> None:
        self.version += 1
        self._tables.clear()

    def refresh(self, name: str, adapter: Adapter) -> None:
        """Renews the folds of an adapter whose parameters may have changed since they were laid.

        Nothing tells whether they did: fused optimizers and sharding don't count a tensor's versions up.
        """
        with torch.no_grad():
            for (pool, span), fold in zip(self._laid[name], adapter.folds()):
                pool.write(span, fold)

    def replace(self, key: SiteKey, place: Place, adapters: dict[str, Adapter]) -> None:
        """Learns that a site's hidden states have another device or dtype, and lays its adapters there."""
        self.places[key] = place
        for name, adapter in adapters.items():
            for index, intervention in enumerate(adapter.interventions):
                if _key_of(intervention) == key:
                    pool, span = self._laid[name][index]
                    new = self._pool(place, intervention.width)
                    if new is not pool:
                        self._laid[name][index] = _Laid(new, new.add(intervention.fold()))
                        pool.remove(span)
        self.changed()

    def table(self, segments: tuple[Segment, ...], adapters: dict[str, Adapter]) -> Table:
        """The table of a set of segments, kept until adapters come, go or move."""
        table = self._tables.get(segments)
        if table is None:
            table = self._tables[segments] = self._make_table(segments, adapters)
        return table

    def _make_table(self, segments: tuple[Segment, ...], adapters: dict[str, Adapter]) -> Table:
        table = Table(segments, self)
        index_of = {segment: index for index, segment in enumerate(segments)}
        spans: dict[SiteKey, list[Span]] = {}
        pools: dict[SiteKey, Pool] = {}
        who: dict[SiteKey, list[Intervention | None]] = {}
        for name in dict.fromkeys(name for name, _ in segments):
            adapter = adapters[name]
            table.adapters.append(adapter)
            for intervention, (pool, span) in zip(adapter.interventions, self._laid[name]):
                key = _key_of(intervention)
                index = index_of.get((name, intervention.group))
                if index is None:
                    continue
                spans.setdefault(key, [Span(0, 0)] * len(segments))[index] = span
                who.setdefault(key, [None] * len(segments))[index] = intervention
                pools[key] = pool
        for key, pool in pools.items():
            if pool.device not in table.devices:
                table.devices.append(pool.device)
            table.sites[key] = SiteTable(
                pool,
                pack_spans(spans[key], pool.device),
                table.devices.index(pool.device),
                self.places[key],
                who[key],
            )
        return table


def keys_of(adapter: Adapter) -> Iterable[SiteKey]:
    """The sites that an adapter edits."""
    return dict.fromkeys(_key_of(intervention) for intervention in adapter.interventions)
