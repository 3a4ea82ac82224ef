"""Adapters read by all workers before a request for them is scheduled, so that no step waits for a disk."""

from __future__ import annotations

import asyncio
import collections
from typing import Any

from ... import __version__
from ..ticket import Ticket
from .guard import wrong_request

#: Seconds between two questions whether adapters were read.
_PATIENCE = 0.002


def check_version(answer: Any) -> None:
    """Raises RuntimeError where the engine's core has not this plugin."""
    if answer != __version__:
        raise RuntimeError(f"reft: the engine's core answers {answer!r}; wanted is the plugin {__version__}")


class Staging:
    """Of one front end. Adapters that are asked for while a question is under way share the next one.

    A question waits for the step under way. So there is one for many adapters, and none for those that the
    workers are known to have.

    Args:
        core: the engine's core, as the front end reaches it: `call_utility_async`.
        most: how many the workers keep, read but not in use; beyond that an adapter is asked for again.
    """

    def __init__(self, core: Any, most: int) -> None:
        self.core, self.most = core, most
        self._known: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._waiting: dict[str, tuple[Ticket, asyncio.Future[str]]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def have(self, ticket: Ticket) -> None:
        """Returns when all workers have read it. Raises vLLM's error of a wrong request where one can't."""
        key = ticket.key
        if key in self._known:
            self._known.move_to_end(key)
            return
        if key not in self._waiting:
            self._waiting[key] = ticket, asyncio.get_running_loop().create_future()
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        # A request that is given up takes nothing from others that wait for the same.
        error = await asyncio.shield(self._waiting[key][1])
        if error:
            raise wrong_request(error)

    async def _ask(self) -> None:
        try:
            while self._waiting:
                asked = {key: ticket.to_dict() for key, (ticket, _) in self._waiting.items()}
                version, states = await self.core.call_utility_async("reft_stage", asked)
                check_version(version)
                for key, state in states.items():
                    if state is not None:
                        self._answer(key, state)
                if None in states.values():
                    await asyncio.sleep(_PATIENCE)
        except BaseException as error:
            for _, future in self._waiting.values():
                if not future.done():
                    future.set_exception(RuntimeError(f"reft: adapters could not be read: {error}"))
            self._waiting.clear()
            if not isinstance(error, Exception):
                raise
        finally:
            self._asking = None

    def _answer(self, key: str, error: str) -> None:
        _, future = self._waiting.pop(key)
        if not future.done():
            future.set_result(error)
        if not error:
            self._known[key] = None
            while len(self._known) > self.most:
                self._known.popitem(last=False)
