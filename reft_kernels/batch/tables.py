"""What a site hands to the op under one set of segments: its pool, and each segment's range in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..ops import launch
from ..ops.arguments import PoolRows
from ..plan import pack_spans
from ..pool import Fold, Pool, Span
from .stacks import Segment

if TYPE_CHECKING:
    from ..adapter import Adapter, Intervention

#: What a segment does at a site: interventions, each times a number. Several add up, each of the unedited h.
Edits = tuple[tuple["Intervention", float], ...]


class SiteKey(NamedTuple):
    """Where an edit happens in a model. head: None, or the index of an attention head."""

    site: str
    layer: int
    head: int | None = None

    @classmethod
    def of(cls, intervention: Intervention) -> SiteKey:
        return cls(intervention.site, intervention.layer, intervention.head)


class Place(NamedTuple):
    """What hidden states at a site look like."""

    device: torch.device
    dtype: torch.dtype


def keys_of(adapter: Adapter) -> Iterable[SiteKey]:
    """The sites that an adapter edits."""
    return dict.fromkeys(SiteKey.of(intervention) for intervention in adapter.interventions)


def numbers_of(places: Mapping[SiteKey, Place]) -> dict[SiteKey, int]:
    """The numbers by which the short way knows a store's sites. Those that come later change none."""
    return {key: number for number, key in enumerate(places)}


def scaled(fold: Fold, scale: float) -> Fold:
    """The fold whose edit is this one's times a number."""
    return fold if scale == 1 else fold._replace(up=fold.up * scale)


class SiteTable:
    """One site under one set of segments.

    pool: where its interventions lie. spans: each segment's range there, [S, 2] int32 on the pool's device.
    slot: index into a plan's rows (one for each device). place: of its hidden states.
    """

    __slots__ = ("_edits", "_live", "_who", "place", "pool", "slot", "spans")

    def __init__(
        self,
        pool: Pool,
        spans: Tensor,
        slot: int,
        place: Place,
        who: Callable[[], list[Edits]],
    ) -> None:
        self.pool, self.spans, self.slot, self.place = pool, spans, slot, place
        self._who = who
        self._edits: list[Edits] | None = None
        self._live: tuple[Tensor, Tensor] | None = None

    @property
    def low_rank(self) -> bool:
        """Whether what is done here is one edit of the low-rank form: what the short way takes."""
        return True

    @property
    def edits(self) -> list[Edits]:
        """What each segment does here. (Training asks; inference does not.)"""
        if self._edits is None:
            self._edits = self._who()
        return self._edits

    def live_pool(self, shared: Mapping[Intervention, Fold], dtype: torch.dtype) -> tuple[PoolRows, Tensor]:
        """Pool rows of this site's interventions alone, in segment order, that autograd sees through, and the
        spans [S, 2] into them.

        shared: folds that were made already. dtype: of down, up and bias.
        """
        device = self.place.device
        folds = [scaled(shared.get(one) or one.fold(), scale) for edits in self.edits for one, scale in edits]
        if self._live is None:
            ranks = [sum(one.pool_rows for one, _ in edits) for edits in self.edits]
            firsts = itertools.accumulate(ranks, initial=0)
            kinds = torch.cat([fold.kind for fold in folds])
            spans = [Span(first, rank) for first, rank in zip(firsts, ranks)]
            self._live = (pack_spans(spans, device), kinds.to(device))
        spans_table, kind = self._live
        if len(folds) == 1:
            parts = [folds[0].down, folds[0].up, folds[0].bias]
        else:
            parts = [torch.cat([getattr(fold, name) for fold in folds]) for name in ("down", "up", "bias")]
        down, up, bias = (part.to(device, dtype) for part in parts)
        return PoolRows(down, up, bias, kind), spans_table


class Table:
    """The sites of one set of segments; changes only when the set of adapters does.

    adapters: those of the segments, by name. devices: of the sites' hidden states. launches: the sites by
    address, once they were asked for (`by_address`); a copy has none.
    """

    __slots__ = ("adapters", "devices", "launches", "segments", "sites", "version")

    def __init__(self, segments: tuple[Segment, ...], adapters: dict[str, Adapter], version: int) -> None:
        self.segments, self.adapters, self.version = segments, adapters, version
        self.sites: dict[SiteKey, SiteTable] = {}
        self.devices: list[torch.device] = []
        self.launches: Any = None

    def by_address(self, places: Mapping[SiteKey, Place]) -> Any:
        """The sites by address, for the short way (python_bindings/standin.cpp), each by its number: where it
        stands among the store's places."""
        if self.launches is None:
            numbers = numbers_of(places)
            sites = []
            for key, site in self.sites.items():
                pool = site.pool if site.low_rank else None
                sites.append((numbers[key], pool, site.spans, site.slot, site.place.dtype))
            self.launches = launch.table(len(numbers), sites)
        return self.launches

    @property
    def trainable(self) -> bool:
        return any(adapter.trainable for adapter in self.adapters.values())
