"""`Catalog`: names → adapters on disk, as the process that takes requests in sees them."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter import SUBSPACE_MARK, Adapter
from ..batch import intervals_of
from ..batch.names import unknown
from ..batch.steps import most_together
from ..positions import Positions
from .config import SUBSPACE, ServingConfig, Source, check_name, check_scale
from .ticket import Part, Ticket, combined, content_of, read

#: Position groups of one adapter, and how many of them may name one token.
MOST_GROUPS, MOST_TOGETHER = 8, 2

#: What a request says: the adapter's name or names, and the factor of its edit.
NAME, SCALE = "reft_adapter", "reft_scale"


class Model(NamedTuple):
    """What adapters must fit."""

    width: int
    layers: int


class _Known(NamedTuple):
    """An adapter that was read. stamp: what its files looked like then. fresh: until when it holds."""

    stamp: tuple
    part: Part
    groups: tuple[Positions, ...]
    fresh: float


class Catalog:
    """Names of adapters, and what was learnt of them. May be asked by several threads.

    Args:
        config: of the server. Every adapter that it names is read now.
        model: that they must fit.

    Raises ValueError: an adapter of the config that can't be read or served.
    """

    def __init__(self, config: ServingConfig, model: Model) -> None:
        self.config, self.model = config, model
        self._lock = threading.Lock()
        self._sources: dict[str, Source] = dict(config.adapters)
        self._known: dict[tuple[str, str], _Known] = {}
        self._tickets: dict[tuple, Ticket] = {}
        for name in self._sources:
            self.ticket({NAME: name})

    @property
    def names(self) -> list[str]:
        """Those that were given one by one; a directory's are not listed."""
        return list(self._sources)

    def add(self, name: str, source: Source) -> Ticket:
        """Learns a name, in place of what it meant before. Raises ValueError and keeps what it meant."""
        check_name(name, "name")
        known = self._look(source, anew=True)
        with self._lock:
            self._sources[name] = source
        return Ticket((known.part,), 1.0, known.groups)

    def of_source(self, source: Source) -> Ticket:
        """The ticket of what lies in a folder now, which needs no name here. Raises ValueError."""
        known = self._look(source, anew=True)
        return Ticket((known.part,), 1.0, known.groups)

    def remove(self, name: str) -> None:
        """Forgets a name; requests under way are not touched. Raises ValueError for an unknown one."""
        with self._lock:
            if self._sources.pop(name, None) is None:
                raise ValueError(f"name: {unknown(name, self.names, 'known are')}")

    def source(self, name: Any) -> Source:
        """name: an adapter's, or "adapter/subspace". Raises ValueError for an unknown one."""
        found = self._sources.get(name) if isinstance(name, str) else None
        if found is not None:
            return found
        name, mark, subspace = name.partition(SUBSPACE_MARK) if isinstance(name, str) else (name, "", "")
        found = self._sources.get(name) if isinstance(name, str) else None
        check_name(name, NAME)
        if found is None and self.config.directory is not None:
            folder = Path(self.config.directory) / name
            found = Source(str(folder)) if folder.is_dir() else None
        if found is None:
            raise ValueError(f"{NAME}: {unknown(name, self.names, 'known are')}")
        if not mark:
            return found
        if SUBSPACE in found.options:
            raise ValueError(f"{NAME}: {name!r} is a subspace already, and has no {subspace!r}")
        return dataclasses.replace(found, options={**found.options, SUBSPACE: subspace})

    def ticket(self, arguments: Mapping[str, Any], prompt_length: int | None = None) -> Ticket | None:
        """What a request's arguments ask for; None for the bare model. A name may also be a `Source`.

        Raises ValueError: an unknown name, a folder that is no adapter or not one for this model, a scale
            without an adapter, or positions that a prompt of that length lacks.
        """
        names = arguments.get(NAME)
        scale = check_scale(arguments.get(SCALE, 1.0))
        if names is None:
            if SCALE in arguments:
                raise ValueError(f"{SCALE}: is the factor of an adapter's edit, but {NAME} is not given")
            return None
        listed = [names] if isinstance(names, str | Source) else names
        if not isinstance(listed, list | tuple) or not listed:
            raise ValueError(f"{NAME}: must be a name or a list of names, was {names!r}")
        known = [self._look(one if isinstance(one, Source) else self.source(one)) for one in listed]
        key = tuple((one.part.source.path, one.part.content) for one in known) + (scale,)
        ticket = self._tickets.get(key)
        if ticket is None:
            alone = len(known) == 1
            groups = known[0].groups if alone else self._groups_of_sum(known)
            ticket = Ticket(tuple(one.part for one in known), scale, groups)
            with self._lock:
                self._tickets[key] = ticket
        if prompt_length is not None:
            intervals_of(ticket.groups, prompt_length)
        return ticket

    def _groups_of_sum(self, known: list[_Known]) -> tuple[Positions, ...]:
        both = combined([read(one.part.source) for one in known], 1.0)
        self._check(both, " + ".join(one.part.source.path for one in known))
        return both.groups

    def _look(self, source: Source, anew: bool = False) -> _Known:
        """Reads an adapter, or remembers it if its files look as they did. They are looked at if `anew`, and
        else every `recheck` seconds."""
        key = source.key
        known, now = self._known.get(key), time.monotonic()
        if known is not None and now < known.fresh and not anew:
            return known
        stamp, fresh = _stamp(source.path), now + self.config.recheck
        if known is None or known.stamp != stamp:
            adapter = read(source)
            self._check(adapter, source.path)
            known = _Known(stamp, Part(source, content_of(adapter)), adapter.groups, fresh)
        else:
            known = known._replace(fresh=fresh)
        with self._lock:
            self._known[key] = known
        return known

    def _check(self, adapter: Adapter, where: str) -> None:
        """Refuses what can't be served."""
        model = self.model
        if adapter.width != model.width:
            raise ValueError(f"{where}: has width {adapter.width}, the model has {model.width}")
        if adapter.n_layers not in (None, model.layers):
            raise ValueError(f"{where}: was made for {adapter.n_layers} layers, the model has {model.layers}")
        if adapter.saved_modules:
            raise ValueError(f"{where}: holds copies of the model's own modules, which are not served")
        rows: dict[int, int] = {}
        for one in adapter.interventions:
            if one.site != "block_output":
                raise ValueError(f"{where}: edits {one.site!r}; served is 'block_output'")
            if one.form != "low_rank":
                raise ValueError(
                    f"{where}: {one.method} edits element by element, which is not served; of low rank are "
                    "LoReFT and its kin, vectors, ablations and bottleneck adapters"
                )
            if one.keeps_norm:
                raise ValueError(f"{where}: {one.method} keeps the norm of each token, which is not served")
            if one.layer >= model.layers:
                raise ValueError(f"{where}: edits layer {one.layer}, the model has {model.layers}")
            rows[one.layer] = rows.get(one.layer, 0) + one.pool_rows
        if max(rows.values()) > self.config.max_rank:
            raise ValueError(
                f"{where}: takes {max(rows.values())} pool rows at one layer; the server was started with a "
                f"max_rank of {self.config.max_rank}"
            )
        if adapter.overlapping:
            raise ValueError(
                f"{where}: two interventions would edit the same token at one place, which is not served"
            )
        for positions in adapter.groups:
            if positions.dynamic:
                raise ValueError(
                    f"{where}: positions {str(positions)!r} single out generated tokens, or go by their ids; "
                    "served are those that are known with the prompt's length"
                )
        many, together = len(adapter.groups), most_together(adapter.groups)
        if many > MOST_GROUPS or together > MOST_TOGETHER:
            raise ValueError(
                f"{where}: has {many} position groups, of which {together} may meet at a token; allowed are "
                f"{MOST_GROUPS} and {MOST_TOGETHER}"
            )


def _stamp(path: str) -> tuple:
    """What the files of a folder look like; () for what is no folder (a hub's name)."""
    found: list[tuple[str, int, int]] = []
    folders = [path]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(entry.path)
                    else:
                        status = entry.stat()
                        found.append((entry.path, status.st_mtime_ns, status.st_size))
        except NotADirectoryError:
            status = os.stat(folder)
            found.append((folder, status.st_mtime_ns, status.st_size))
        except FileNotFoundError:
            pass
    return tuple(sorted(found))
