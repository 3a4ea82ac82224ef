"""What a patched model knows while it runs: the plan of the forward under way, and who asked for what.

One `State` a model, shared by its stand-ins. The plan is not thread-local: under gradient checkpointing
blocks are run again in autograd's own threads. A lock makes the forwards of two threads take turns.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .prompts import Selection
from .tables import BatchPlan

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapter import Adapter
    from .norms import NextNorm


class Pending(NamedTuple):
    """A forward that generate has prepared: its plan, and its cache (which tells it from other calls).

    columns: (start, length, batch) that the plan was made for; None where there was nothing to plan.
    """

    cache: object
    plan: BatchPlan | None
    columns: tuple[int, int, int] | None


class GenerateScope:
    """One call of generate.

    names: one a prompt, None for the bare model. selection: what they edit; None when that is nothing.
    owners: the adapters behind the names, as they were when generate began.
    seen: columns that went through the model so far (for caches that don't say so on the host).
    tokens: the prompts' ids [batch, width], where there are any.
    """

    def __init__(
        self,
        names: tuple[str | None, ...],
        selection: Selection | None,
        owners: dict[str, Adapter],
        seen: int,
        tokens: Tensor | None = None,
    ) -> None:
        self.names, self.selection, self.owners, self.seen = names, selection, owners, seen
        self.tokens = tokens
        self._aside: tuple[int, int, list[int]] | None = None
        self.pending: Pending | None = None
        self.decode: tuple[tuple, BatchPlan | None] | None = None
        self._held: Any = None

    def goes_on_in(self, ids: Any) -> bool:
        """Whether a generate inside this one has the same prompts, or their continuations."""
        mine = self.tokens
        if (
            mine is None
            or not isinstance(ids, torch.Tensor)
            or ids.dim() != 2
            or ids.shape[0] != mine.shape[0]
        ):
            return False
        return ids.shape[1] >= mine.shape[1] and torch.equal(ids[:, : mine.shape[1]].to(mine.device), mine)

    def lengths_aside(self, batch: int, length: int, given: Any, mask: Tensor | None) -> Any:
        """Prompt lengths of a second stream of forwards without a cache (as guidance runs): those of its
        first forward, whose tokens were all prompt."""
        if given is not None:
            return given
        if self._aside is not None and self._aside[0] == batch and length > self._aside[1]:
            return self._aside[2]
        counts = [length] * batch if mask is None else mask[:, :length].sum(1).tolist()
        self._aside = (batch, length, counts)
        return None

    def hold(self, lock: Any) -> None:
        """Keeps the model to this generate until it ends."""
        if self._held is None:
            lock.acquire()
            self._held = lock

    def close(self) -> None:
        if self._held is not None:
            self._held.release()


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[State, GenerateScope]] = []


_scopes = _Scopes()


def nested() -> bool:
    """Whether this thread is inside generate already, of this or another patched model (as its assistant)."""
    return bool(_scopes.stack)


class State:
    """See the module. plan: of the forward under way, None when there is nothing to do in it.

    waiting: (h, its norm, whose it is), from a block's output to the norm that reads it.
    """

    def __init__(self) -> None:
        self.plan: BatchPlan | None = None
        self.waiting: tuple[Tensor, Tensor, NextNorm] | None = None
        self.prepared = False  # generate has made the plan of the forward to come
        self.depth = 0  # forwards of the model under way
        self.lock = threading.RLock()

    def __getstate__(self) -> dict:
        return {}  # deepcopy and pickle of a patched model: nothing is under way in the copy

    def __setstate__(self, _: dict) -> None:
        self.__init__()  # type: ignore[misc]

    def __reduce__(self):
        return (State, ())

    @property
    def scope(self) -> GenerateScope | None:
        """The innermost generate of this model in this thread."""
        for state, scope in reversed(_scopes.stack):
            if state is self:
                return scope
        return None

    @contextlib.contextmanager
    def generating(self, scope: GenerateScope) -> Iterator[None]:
        _scopes.stack.append((self, scope))
        try:
            yield
        finally:
            _scopes.stack.pop()
            if scope._held is not None:
                self.plan, self.prepared = None, False
            scope.close()

    @contextlib.contextmanager
    def using(self, plan: BatchPlan | None) -> Iterator[None]:
        """Runs a block again under the plan that its forward had."""
        with self.lock:
            before, self.plan = self.plan, plan
            try:
                yield
            finally:
                self.plan = before


def cache_length(cache: object, cache_position: Tensor | None) -> int | None:
    """Columns that a cache holds, where the host knows without asking a device; else None."""
    if cache is None:
        return 0
    if cache_position is not None and cache_position.device.type == "cpu":
        return int(cache_position[0])
    if getattr(cache, "is_compileable", False):
        return None
    length = cache.get_seq_length()  # type: ignore[attr-defined]
    return length if isinstance(length, int) else None


def read_cache_length(cache: object, cache_position: Tensor | None) -> int:
    """The same, at any price."""
    length = cache_length(cache, cache_position)
    if length is not None:
        return length
    if cache_position is not None:
        return int(cache_position[0])
    return int(torch.as_tensor(cache.get_seq_length()).item())  # type: ignore[attr-defined]
