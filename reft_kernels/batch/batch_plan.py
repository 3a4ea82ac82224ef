"""`BatchPlan`: all that the sites of a model need in one forward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops import launch
from ..plan import Rows, SegmentRows, cover, pack_rows
from ..scale_pool import AnyFold
from .stages import SiteKey
from .tables import Place, SiteTable, Table

if TYPE_CHECKING:
    from ..adapter import Intervention
    from .store import AdapterStore
    from .workspace import DecodeWorkspace


class BatchPlan:
    """The rows of one forward by segment, beside the table that says what each segment does at each site.

    Making one writes nothing; `prepare` does what must be done before a forward runs under it.

    Args:
        store: whose adapters are meant.
        table: of the segments.
        by_segment: rows of h by segment.
        tokens: rows of h in this forward.
        saved_modules: whatever a front door wants to find again beside the plan, by a module's path.

    Attributes:
        sites: the table's. rows: for each device of the table. backends: of each device.
        recomputing: whether a block is being run again under reentrant checkpointing.
        folds: with autograd, the folds of adapters that want a gradient, made once a forward for all layers.
        drawn: the random numbers of this forward, where it is one of training: its folds are of them, whoever
            makes them and when.
        stale: whether the pools may hold adapters that train as they were. A step with autograd reads no
            pool, so they are renewed only once something does.
        launches: the plan by address, or None, where all ops are called by name: see docs/architecture.md,
            the short way.
        workspace: what compiled code reads in the plan's place, or None.
    """

    __slots__ = (
        "__weakref__",
        "backends",
        "by_segment",
        "covers",
        "drawn",
        "folds",
        "head_rows_by_key",
        "launches",
        "recomputing",
        "rows",
        "saved_modules",
        "sites",
        "stale",
        "store",
        "table",
        "tokens",
        "workspace",
    )

    def __init__(
        self,
        store: AdapterStore,
        table: Table,
        by_segment: SegmentRows,
        tokens: int,
        saved_modules: Mapping[str, Any] | None = None,
    ) -> None:
        self.store, self.table, self.sites, self.tokens = store, table, table.sites, tokens
        self.saved_modules = saved_modules or {}
        self.backends: dict[torch.device, str] = {}
        self.by_segment = by_segment
        self.rows: list[Rows] = [pack_rows(by_segment, device) for device in table.devices]
        self.head_rows_by_key: dict[tuple[int, int, int], Rows] = {}
        self.covers: dict[tuple[torch.device, bool], Rows] = {}
        self.recomputing = False
        self.folds: dict[Intervention, AnyFold] = {}
        self.drawn: dict[Intervention, dict[str, Tensor]] = {}
        self.stale = store.stale(table.adapters)
        self.launches: Any = None
        self.workspace: DecodeWorkspace | None = None

    def prepare(self) -> None:
        """What compiled code can't do when it runs: chooses backends, renews pools or makes live folds.

        Raises BackendUnavailable if the backend that was asked for can't run.
        """
        for device in self.table.devices:
            self.backends[device] = ops.current_backend(device)
        if not torch.is_grad_enabled():
            if self.stale:
                self.renew()
            self._open_short_way()
            return
        # Asked each time, as PEFT and users freeze as they go.
        for adapter in self.table.adapters.values():
            if any(one.wants_grad for one in adapter.interventions):
                if adapter.training:
                    self.drawn.update(
                        (one, numbers) for one in adapter.interventions if (numbers := one.draw())
                    )
                self.folds.update(zip(adapter.interventions, adapter.folds(self.drawn)))

    def _open_short_way(self) -> None:
        """For the CPU's native kernels, under a plan that no gradient comes through."""
        if launch.missing is None and ops.current_backend("cpu") == "native":
            table = self.table.by_address(self.store.places)
            self.launches = launch.plan(table, [(rows.rows, rows.tiles) for rows in self.rows], self.tokens)

    def trains(self, site: SiteTable) -> bool:
        """Whether something at the site wants a gradient."""
        return bool(self.folds) and any(
            one in self.folds for stage in site.stages for edits in stage.edits for one, _ in edits
        )

    def renew(self) -> None:
        """Makes the pools what the parameters are now."""
        self.store.refresh(self.table.adapters, self.drawn)
        self.stale = False

    def move(self, key: SiteKey, place: Place) -> SiteTable:
        """Hidden states of another device or dtype than expected: lays the site's adapters there."""
        self.store.move(key, place)
        self.table = self.store.table(self.table.segments)
        self.sites = self.table.sites
        self.rows = [pack_rows(self.by_segment, device) for device in self.table.devices]
        self.head_rows_by_key.clear()
        if self.launches is not None:
            self.launches.close()  # the sites' slots may be others
            self.launches = None
        self.backends[place.device] = ops.current_backend(place.device)
        return self.sites[key]

    def row_spans(self) -> np.ndarray:
        """The pool range that each row of h takes at each stage, int32 [stages, tokens, 2]; else rank 0."""
        ranges = self.store.ranges(self.table.segments)
        rows, counts = self.by_segment
        spans = np.zeros((len(ranges), self.tokens, 2), dtype=np.int32)
        mine = ranges[:, np.repeat(np.arange(len(counts)), counts)]
        # Added, as a row may be in two segments, of which one alone does something at a stage.
        np.add.at(spans.transpose(1, 0, 2), rows, mine.transpose(1, 0, 2))
        return spans

    def covering(self, device: torch.device, edited: bool) -> Rows:
        """Rows that name all of h: those of the plan and the others, or (edited: False) all as unedited."""
        key = (device, edited)
        if key not in self.covers:
            rows = cover(self.by_segment, self.tokens, device) if edited else unedited(self.tokens, device)
            self.covers[key] = rows
        return self.covers[key]

    def head_rows(self, slot: int, head: int, heads: int) -> Rows:
        """The rows of one head in h.view(-1, head width)."""
        key = (slot, head, heads)
        if key not in self.head_rows_by_key:
            rows, tiles, offsets = self.rows[slot]
            self.head_rows_by_key[key] = Rows(rows * heads + head, tiles, offsets)
        return self.head_rows_by_key[key]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # it is kept, whoever asks first
def unedited(tokens: int, device: torch.device) -> Rows:
    """Rows that name all of h's `tokens` as ones without an edit."""
    nothing = np.zeros(0, dtype=np.int64)
    return cover(SegmentRows(nothing, nothing), tokens, device)
