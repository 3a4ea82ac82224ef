"""`DecodeWorkspace`: what the edits of a compiled decode step read, at addresses that stay.

A plan's tables have the shapes of a batch's mix of adapters, and lie where they were made: compiled code
would be compiled anew for another mix, and a CUDA graph would copy each of them before every replay. A decode
step has one row of hidden states for each sequence, so here each row is a tile and a segment of its own. Then
all that the mix changes are numbers in one table, which is refilled in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.arguments import PoolRows
from ..plan import to_device
from ..pool import Pool
from .batch_plan import BatchPlan
from .stages import KEEP_NORM, SiteKey, StageKey, in_turn, stages_of
from .store import AdapterStore

#: How many workspaces are kept. Each batch size is compiled for anew, and torch.compile keeps fewer still.
_KEPT = 32

#: No pool rows; spans of no segments.
Blank = tuple[PoolRows, Tensor]


class DecodeWorkspace:
    """The tables of decode steps of one batch size on one device.

    Attributes:
        rows: [batch] int32, row i of h at i. tiles: [batch, 3] int32, segment i at row i. Neither changes.
        unedited: like tiles, but of segment −1, for a norm of rows that nobody edits.
        spans: [stages, batch, 2] int32: the pool range that each row takes at each stage of the store, rank 0
            where it takes none. `hold` refills it.
        places: of each site's stages the number (of its row of spans), the index of its pool, and the form.
            One that keeps norms stands first and last of its turn, with the index of another's pool.
        blanks: what an op takes of a pool where nobody edits anything, one for each dtype and width.
        pools: those of the sites. dtypes: of the hidden states that come to each of them.
        backend: that the ops of these steps take.
        layout: whatever tells a front door's compiled code what its modules do with this workspace.
    """

    __slots__ = (
        "_held",
        "backend",
        "blanks",
        "dtypes",
        "layout",
        "places",
        "pools",
        "rows",
        "spans",
        "tiles",
        "unedited",
    )

    @torch.inference_mode(False)  # it outlives the generate that makes it
    def __init__(self, store: AdapterStore, batch: int, device: torch.device) -> None:
        rows = np.arange(batch, dtype=np.int32)
        one = np.ones(batch, dtype=np.int32)
        self.rows = _static(rows, device)
        self.tiles = _static(np.stack([rows, rows, one], axis=1), device)
        self.unedited = _static(np.stack([-one, rows, one], axis=1), device)
        self.spans = _static(np.zeros((len(store.numbers), batch, 2), dtype=np.int32), device)
        self.pools: tuple[Pool, ...] = ()
        self.dtypes: tuple[torch.dtype, ...] = ()
        self.places: dict[SiteKey, tuple[tuple[int, int, str], ...]] = {}
        self.backend, self.layout = "", ""
        self.blanks: tuple[Blank, ...] = ()
        self._held: weakref.ref[BatchPlan] | None = None

    def holds(self, plan: BatchPlan) -> bool:
        """Whether the tables are those of this plan."""
        return self._held is not None and self._held() is plan

    def hold(self, plan: BatchPlan, stages: Iterable[StageKey]) -> None:
        """Refills the tables, for a plan of a decode step that was prepared. One copy, not waited for.

        stages: that may be asked for.
        """
        device = self.spans.device
        if plan.table.segments:
            # Each host buffer is a new one of torch's pinned ones, which are not given out again before the
            # copy is done; so none is written over on its way.
            self.spans.copy_(_pinned(plan.row_spans(), device), non_blocking=True)
        else:
            self.spans.zero_()
        self._find_places(plan.store, stages)
        self.backend = plan.backends[device]
        self._held = weakref.ref(plan)

    def _find_places(self, store: AdapterStore, stages: Iterable[StageKey]) -> None:
        found: dict[tuple[int, torch.dtype], int] = {}
        pools: list[tuple[Pool, torch.dtype]] = []
        self.places = {}
        begins: dict[tuple[SiteKey, int], int] = {}
        for stage in sorted(stages, key=in_turn):
            site, form, turn = stage
            listed = self.places.get(site, ())
            begin = begins.setdefault((site, turn), len(listed))
            if form == KEEP_NORM:  # around the others of its turn, behind which it is sorted
                around = (store.numbers[stage], listed[begin][1], form)
                self.places[site] = (*listed[:begin], around, *listed[begin:], around)
                continue
            pool, dtype = store.pool_of(site, form), store.places[site].dtype
            index = found.setdefault((id(pool), dtype), len(found))
            if index == len(pools):
                pools.append((pool, dtype))
            self.places[site] = (*listed, (store.numbers[stage], index, form))
        self.pools = tuple(pool for pool, _ in pools)
        self.dtypes = tuple(dtype for _, dtype in pools)

    @torch.inference_mode(False)
    def blank(self, dtype: torch.dtype, width: int) -> int:
        """The index in `blanks` of the one for hidden states of this dtype and width."""
        for index, (rows, _) in enumerate(self.blanks):
            if rows.down.dtype is dtype and rows.down.shape[1] == width:
                return index
        blank = no_pool_rows(width, dtype, self.spans.device)
        for tensor in (*blank[0], blank[1]):
            torch._dynamo.mark_static_address(tensor)
        self.blanks += (blank,)
        return len(self.blanks) - 1


def no_pool_rows(width: int, dtype: torch.dtype, device: torch.device) -> Blank:
    """What an op takes of a pool where nobody edits hidden states [..., width]."""
    down, up = (torch.empty(0, width, dtype=dtype, device=device) for _ in range(2))
    bias = torch.empty(0, dtype=torch.float32, device=device)
    kind, spans = (torch.empty(size, dtype=torch.int32, device=device) for size in (0, (0, 2)))
    return PoolRows(down, up, bias, kind), spans


class DecodeWorkspaces:
    """The workspaces of a store: made when first asked for, and again once there are more stages."""

    def __init__(self, store: AdapterStore) -> None:
        self.store = store
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[tuple[int, torch.device], DecodeWorkspace] = {}
        self._stages: tuple[int, dict[StageKey, None]] = (-1, {})

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.store = state["store"]
        self._forget()

    @property
    def stages(self) -> dict[StageKey, None]:
        """Those of the adapters that there are."""
        if self._stages[0] != self.store.version:
            found = (one for adapter in self.store.adapters.values() for one in adapter.interventions)
            first = {key for one in found for key in stages_of(one)}
            # Of adapters that follow others as often as they were asked for so.
            known = {key: None for key in self.store.numbers if key._replace(turn=0) in first}
            self._stages = self.store.version, known
        return self._stages[1]

    def of(self, plan: BatchPlan) -> DecodeWorkspace | None:
        """The workspace of a prepared plan's decode step, which holds the plan then. None where there are
        sites on several devices: compiled code reads the plan itself there."""
        places = (self.store.places[key.site] for key in self.stages)
        devices = dict.fromkeys([*plan.backends, *(place.device for place in places)])
        if len(devices) != 1:
            return None
        key = (plan.tokens, next(iter(devices)))
        workspace = self._kept.get(key)
        if workspace is None or workspace.spans.shape[0] != len(self.store.numbers):
            workspace = DecodeWorkspace(self.store, *key)
            if key not in self._kept and len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]  # the one that was asked for longest ago
        else:
            del self._kept[key]
        self._kept[key] = workspace
        if not workspace.holds(plan):
            workspace.hold(plan, self.stages)
        return workspace


def _static(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, known to torch.compile as a tensor that stays where it is."""
    tensor = to_device(array, device)
    torch._dynamo.mark_static_address(tensor)
    return tensor


def _pinned(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
