"""What a site hands to its ops under one set of segments: its stages, and where its hidden states are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import launch
from .stacks import Segment, parts_of
from .stages import LOW_RANK, Edits, SiteKey, Stage, StageKey

if TYPE_CHECKING:
    from ..adapter import Adapter


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


class Turn(NamedTuple):
    """What adapters do at a site that don't follow one another: one stage for each form.

    norms: which segments keep the norm of their rows, spans [S, 2] as a stage's; None where none does.
    """

    stages: tuple[Stage, ...]
    norms: Tensor | None = None


class SiteTable:
    """One site under one set of segments.

    turns: one, or more where adapters follow one another. stages: of all turns, in their order. pool, spans:
    of the first stage. low_rank: whether that is all there is, and of the low-rank form: what the short way
    and fused norms take. slot: index into a plan's rows (one for each
    device). place: of its hidden states.
    """

    __slots__ = ("low_rank", "place", "pool", "slot", "spans", "stages", "turns")

    def __init__(self, turns: tuple[Turn, ...], slot: int, place: Place) -> None:
        self.turns, self.slot, self.place = turns, slot, place
        self.stages = stages = tuple(stage for turn in turns for stage in turn.stages)
        self.pool, self.spans = stages[0].pool, stages[0].spans
        self.low_rank = len(stages) == 1 and stages[0].form == LOW_RANK and turns[0].norms is None


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

    def edits(self, key: StageKey) -> list[Edits]:
        """What each segment does at a stage."""
        return [edits_of(self.adapters, segment, key) for segment in self.segments]


def edits_of(adapters: Mapping[str, Adapter], segment: Segment, key: StageKey) -> Edits:
    """What a segment does at a stage."""
    own = key._replace(turn=0)
    return tuple(
        (one, part.scale)
        for part in parts_of(segment)
        if part.turn == key.turn
        for one in adapters[part.name].interventions
        if one.group == part.group and StageKey.of(one) == own
    )


def padded(ranges: np.ndarray, stages: int) -> np.ndarray:
    """Ranges [groups, fewer stages, 2] with rank 0 at the stages that they do not know."""
    return np.pad(ranges, ((0, 0), (0, stages - ranges.shape[1]), (0, 0)))
