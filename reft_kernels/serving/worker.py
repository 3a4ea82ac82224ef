"""`Worker`: the adapters of requests in the process that runs the model, whatever the engine."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .. import ops
from ..adapter import Adapter
from ..batch import AdapterStore, Place, SiteKey, StepTables
from ..pool import PoolFull
from .beside import Beside
from .catalog import MOST_GROUPS, MOST_TOGETHER
from .config import Source
from .residents import Residents
from .ticket import Ticket, read, ticket_of


class _Read(NamedTuple):
    """What reading an adapter came to: what of it this process edits (None for nothing), or an error."""

    adapter: Adapter | None = None
    error: Exception | None = None


class Worker:
    """Lays adapters down when a request comes, and fills the tables of each step.

    Args:
        layers: those of the model that run in this process.
        width: of the hidden states.
        place: of the hidden states.
        max_adapters: that lie in device memory; at least as many as requests that run together.
        max_requests, max_tokens: of a step.
        max_rank: pool rows of one adapter at one layer.
        staged: adapters that are kept in host memory.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        place: Place,
        max_adapters: int,
        max_requests: int,
        max_tokens: int,
        max_rank: int,
        staged: int = 1024,
    ) -> None:
        self.layers, self.place = tuple(layers), place
        capacity = max(1, max_adapters * max_rank * len(self.layers))
        self.store = AdapterStore(capacity)
        sites = [SiteKey("block_output", layer) for layer in self.layers]
        self.sites = {layer: number for number, layer in enumerate(self.layers)}
        segments = max_adapters * MOST_GROUPS
        self.tables = StepTables(
            self.store, sites, max_tokens, max_requests + 1, segments, place.device, MOST_TOGETHER
        )
        # Made now, so that the engine's measurement of free memory sees it.
        self.pool = self.store._pool(place, width)
        self.residents = Residents(max_adapters)
        #: The ops' arguments of a step, by layer, and the `tables.used` that they are of.
        self._arguments: dict[int, tuple[Tensor, ...]] = {}
        self._arguments_of: tuple[int, int] | None = None
        backend = ops.current_backend(place.device)
        self.edit, self.edit_sum = ops.INTERVENE_[backend], ops.INTERVENE_SUM_[backend]
        #: Requests that have an adapter, and their rows in the tables; the last row is everyone else's.
        self._tickets: dict[str, Ticket] = {}
        self._rows: dict[str, int] = {}
        self._free, self._bare = list(range(max_requests))[::-1], max_requests
        self._batch: tuple[list[str], np.ndarray] = ([], np.zeros(0, dtype=np.int64))
        #: Requests of the last step, for `follow`.
        self._seen: set[str] = set()
        #: Adapters of which nothing is edited in this process.
        self._absent: set[str] = set()
        self._staged: collections.OrderedDict[str, _Read] = collections.OrderedDict()
        self._most_staged = staged
        self._lock = threading.Lock()
        self._readers = Beside()
        self._wanted: set[str] = set()

    # Adapters ----------------------------------------------------------------------------------------------

    def stage(self, ticket: Ticket, adapter: Adapter | None = None) -> None:
        """Keeps an adapter in host memory, or what went wrong with it. May run beside the steps.

        adapter: what the ticket's folders hold, where that is known; else they are read.
        """
        if ticket.key in self._staged:
            return
        try:
            found = _Read(self._mine(ticket.load() if adapter is None else adapter))
        except Exception as error:
            found = _Read(error=error)
        with self._lock:
            self._staged[ticket.key] = found
            while len(self._staged) > self._most_staged:
                self._staged.popitem(last=False)

    def staged(self, key: str) -> str | None:
        """Nothing ("") for an adapter in host or device memory, what went wrong, or None for one that is not
        known, or is being read."""
        if key in self.residents:
            return ""
        found = self._staged.get(key)
        if found is None or found.error is None:
            return None if found is None else ""
        with self._lock:
            self._staged.pop(key, None)  # the folder may be put right
        return str(found.error) or type(found.error).__name__

    def stage_beside(self, key: str, given: dict[str, Any]) -> str | None:
        """What `staged` says of an adapter; where that is nothing, a thread reads it. given: its ticket."""
        state = self.staged(key)
        if state is None:
            with self._lock:
                wanted = key not in self._wanted
                self._wanted.add(key)
            if wanted:
                self._readers.put(functools.partial(self._stage_wanted, key, given), urgent=True)
        return state

    def _stage_wanted(self, key: str, given: dict[str, Any]) -> None:
        try:
            self.stage(Ticket.from_dict(given))
        finally:
            with self._lock:
                self._wanted.discard(key)

    def stage_first(self, sources: Sequence[Source]) -> None:
        """Has a thread read these, so that they are there when they are first asked for. Those that can't be
        read are errors of whoever asks for them."""
        for source in sources[: self._most_staged]:
            self._readers.put(functools.partial(self._stage_source, source))

    def _stage_source(self, source: Source) -> None:
        adapter = read(source)
        self.stage(ticket_of(source, adapter), adapter)

    def _mine(self, adapter: Adapter) -> Adapter | None:
        """What of an adapter is edited in this process. None for nothing."""
        mine = [one for one in adapter.interventions if one.layer in self.sites]
        if len(mine) == len(adapter.interventions):
            return adapter
        # The groups must stay those of the whole, which the segments follow.
        part = Adapter(mine) if mine else None
        if part is not None:
            part.groups = adapter.groups
            for one in part.interventions:
                one.group = part.groups.index(one.positions)
        return part

    def _lay(self, ticket: Ticket) -> None:
        for key in self.residents.take(ticket.key):
            self._lift(key)
        if ticket.key in self.store.adapters or ticket.key in self._absent:
            return
        try:
            while True:
                self.stage(ticket)
                found = self._staged.get(ticket.key)
                if found is not None:
                    break  # else another one was staged meanwhile and put it out
            if found.error is not None:
                raise found.error
            if found.adapter is None:
                self._absent.add(ticket.key)
            else:
                self._add(ticket.key, found.adapter)
        except BaseException:
            with self._lock:
                self._staged.pop(ticket.key, None)
            self.residents.give_back(ticket.key)
            self.residents.drop(ticket.key)
            raise

    def _add(self, key: str, adapter: Adapter) -> None:
        try:
            self.store.add(key, adapter, self.place)
        except PoolFull:
            # Enough rows are free by the sizes of the pool, if not in one piece: the pool is packed.
            adapters = {name: self.store.remove(name) for name in list(self.store.adapters)}
            for name, other in adapters.items():
                self.store.add(name, other, self.place)
            self.store.add(key, adapter, self.place)
            self.tables.renew()
        self.tables.lay(key)

    def _lift(self, key: str) -> None:
        self._absent.discard(key)
        if key in self.store.adapters:
            self.tables.lift(key)
            self.store.remove(key)

    # Requests ----------------------------------------------------------------------------------------------

    def add(self, request: str, ticket: Ticket | None, prompt_length: int) -> None:
        """A request that is in the next steps.

        prompt_length: as it came in; what was generated before it was put off is no prompt.

        Raises ValueError or OSError where its adapter can't be read, RuntimeError where there is no room.
        """
        self.remove(request)
        if ticket is None:
            return
        self._lay(ticket)
        self._tickets[request] = ticket
        if ticket.key in self.store.adapters:
            row = self._free.pop()
            self._rows[request] = row
            self.tables.put(row, ticket.key, prompt_length)

    def remove(self, request: str) -> None:
        """A request that is not in the next steps: finished, or put off."""
        self._batch = ([], self._batch[1])
        ticket = self._tickets.pop(request, None)
        if ticket is None:
            return
        row = self._rows.pop(request, None)
        if row is not None:
            self.tables.clear(row)
            self._free.append(row)
        self.residents.give_back(ticket.key)

    def follow(self, batch: Sequence[str], look_up: Callable[[str], tuple[Ticket | None, int]]) -> None:
        """Makes the requests of the next step the ones that are known. For engines that tell nothing else.

        look_up: the ticket and prompt length of a request that is new, or comes again.
        """
        if batch == self._batch[0]:
            return
        here = set(batch)
        for request in [one for one in self._seen if one not in here]:
            self.remove(request)
        fresh = [one for one in batch if one not in self._seen]
        self._seen = here
        for request in fresh:
            self.add(request, *look_up(request))

    def forget(self, requests: Sequence[str]) -> None:
        """Requests that `follow` shall look up again."""
        for request in requests:
            if request in self._seen:
                self.remove(request)
                self._seen.discard(request)

    def step(self, batch: Sequence[str], starts: np.ndarray, counts: np.ndarray) -> None:
        """The next forward computes of request i counts[i] tokens, the first at position starts[i]."""
        if not self._rows:
            self.tables.idle()
            return
        if batch != self._batch[0]:
            find, bare = self._rows.get, self._bare
            rows = np.fromiter((find(one, bare) for one in batch), dtype=np.int64, count=len(batch))
            self._batch = (list(batch), rows)
        self.tables.fill(
            self._batch[1], starts.astype(np.int64, copy=False), counts.astype(np.int64, copy=False)
        )

    def arguments(self, tokens: int, captured: bool = False) -> dict[int, tuple[Tensor, ...]]:
        """What the ops take in the forward to come, by layer: of the pool, rows, tiles, spans.

        tokens: rows of hidden states. captured: for a graph, whose tables have sizes that follow from it.
        """
        tables, pool = self.tables, self.pool
        if captured or tables.used is not self._arguments_of:
            rows, tiles = tables.tables(tokens, captured)
            before = (pool.down, pool.up, pool.bias, pool.kind, rows, tiles)
            found: dict[int, tuple[Tensor, ...]] = {
                layer: (*before, tables.spans[site]) for layer, site in self.sites.items()
            }
            if captured:
                return found
            self._arguments, self._arguments_of = found, tables.used
        return self._arguments

    def idle(self) -> None:
        """The next forward is nobody's: a warm-up, or a measurement."""
        self.tables.idle()
