"""What a site hands to its ops under one set of segments: its stages, and where its hidden states are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .stacks import Segment
from .stages import LOW_RANK, SiteKey, Stage

if TYPE_CHECKING:
    from ..adapter import Adapter


class Place(NamedTuple):
    """What hidden states at a site look like."""

    device: torch.device
    dtype: torch.dtype


def keys_of(adapter: Adapter) -> Iterable[SiteKey]:
    """The sites that an adapter edits."""
    return dict.fromkeys(SiteKey.of(intervention) for intervention in adapter.interventions)


class SiteTable:
    """One site under one set of segments.

    stages: in their order. norms: which segments keep the norm of their rows, spans [S, 2] as a stage's; None
    where none does. pool, spans: of the first stage. low_rank: whether that is all there is, and of the
    low-rank form: what the short way and fused norms take. slot: index into a plan's rows (one for each
    device). place: of its hidden states. launch: pool and spans by address, for the short way, which makes it
    (python_bindings/standin.cpp); a copy has none.
    """

    __slots__ = ("launch", "low_rank", "norms", "place", "pool", "slot", "spans", "stages")

    def __init__(
        self, stages: tuple[Stage, ...], slot: int, place: Place, norms: Tensor | None = None
    ) -> None:
        self.stages, self.slot, self.place, self.norms = stages, slot, place, norms
        self.pool, self.spans = stages[0].pool, stages[0].spans
        self.low_rank = len(stages) == 1 and stages[0].form == LOW_RANK and norms is None
        self.launch: Any = None


class Table:
    """The sites of one set of segments; changes only when the set of adapters does.

    adapters: those of the segments, by name. devices: of the sites' hidden states.
    """

    __slots__ = ("adapters", "devices", "segments", "sites", "version")

    def __init__(self, segments: tuple[Segment, ...], adapters: dict[str, Adapter], version: int) -> None:
        self.segments, self.adapters, self.version = segments, adapters, version
        self.sites: dict[SiteKey, SiteTable] = {}
        self.devices: list[torch.device] = []

    @property
    def trainable(self) -> bool:
        return any(adapter.trainable for adapter in self.adapters.values())
