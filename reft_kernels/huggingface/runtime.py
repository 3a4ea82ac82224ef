"""What the parts of a patched model share while it runs, and what a call of generate is about."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..batch import AdapterStore, BatchPlan, Planner, Selection, SiteKey
from ..batch.stacks import RowNames
from ..ops import launch
from .blocks import Blocks
from .fused_norm import FusedNorms
from .slips import Told

if TYPE_CHECKING:
    from torch import Tensor


class Columns(NamedTuple):
    """What a forward of generate covers: columns [start, start + length) of `batch` rows.

    ids: its tokens, [batch, length], where edits depend on them.
    """

    start: int
    length: int
    batch: int
    ids: np.ndarray | None = None


class Pending(NamedTuple):
    """A forward that generate has prepared: its plan, and its cache (which tells it from other calls).

    columns: that the plan was made for; None where there was nothing to plan.
    """

    cache: object
    plan: BatchPlan | None
    columns: Columns | None


class GenerateScope:
    """One call of generate.

    names: what each prompt takes, None for the bare model. selection: what they edit; None for nothing.
    seen: columns that went through the model so far (for caches that don't say so on the host).
    tokens: the prompts' ids [batch, width], where there are any.
    """

    def __init__(
        self,
        names: tuple[RowNames, ...],
        selection: Selection | None,
        seen: int,
        tokens: Tensor | None = None,
    ) -> None:
        self.names, self.selection, self.seen = names, selection, seen
        self.tokens = tokens
        self._aside: tuple[int, int, list[int]] | None = None
        self.pending: Pending | None = None
        self.decode: tuple[tuple, BatchPlan | None] | None = None
        self._lock: Any = None

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

    def keep_lock(self, lock: Any) -> None:
        """Keeps the model to this generate until it ends."""
        if self._lock is None:
            lock.acquire()
            self._lock = lock

    @property
    def keeps_lock(self) -> bool:
        return self._lock is not None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[Runtime, GenerateScope]] = []


_scopes = _Scopes()


def nested() -> bool:
    """Whether this thread is inside generate already, of this or another patched model (as its assistant)."""
    return bool(_scopes.stack)


class Runtime:
    """What is shared by a model's `Reft`, its stand-ins and what reads its calls. One a patched model.

    No module, so that the model does not become its own descendant. The plan is not thread-local: under
    gradient checkpointing blocks are run again in autograd's own threads. A lock makes the forwards of two
    threads take turns.

    Attributes:
        active: the adapter of calls that name none; None for the bare model.
        plan: of the forward under way, None when there is nothing to do in it. Set by `take`.
        cell: tells the stand-ins of it on the short way; None where there is none.
        prepared: whether generate has made the plan of the forward to come.
        depth: forwards of the model under way.
        logits_to_keep: of the forward under way: how many of the last columns go on to the language-model
            head, 0 for all, or which.
        unseen: sites by path whose modules were not called yet. A forward that edits there and passes them
            by is an error.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, store: AdapterStore) -> None:
        self.model, self.blocks, self.store = model, blocks, store
        self.planner = Planner(store)
        self.fused = FusedNorms(self)
        self.told = Told()
        self.active: str | None = None
        self.unseen: dict[SiteKey, None] = {}
        self._rest()

    def _rest(self) -> None:
        """Nothing is under way."""
        self.cell = launch.cell()
        self.plan: BatchPlan | None = None
        self.prepared = False
        self.depth = 0
        self.logits_to_keep: Any = 0
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        under_way = ("cell", "plan", "prepared", "depth", "lock", "logits_to_keep")
        return {name: value for name, value in self.__dict__.items() if name not in under_way}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rest()

    def take(self, plan: BatchPlan | None) -> None:
        """Runs under this plan from now on."""
        self.plan = plan
        if self.cell is not None:
            self.cell.hold(False if plan is None else plan.launches)

    @property
    def scope(self) -> GenerateScope | None:
        """The innermost generate of this model in this thread."""
        for runtime, scope in reversed(_scopes.stack):
            if runtime is self:
                return scope
        return None

    @contextlib.contextmanager
    def generating(self, scope: GenerateScope) -> Iterator[None]:
        _scopes.stack.append((self, scope))
        try:
            yield
        finally:
            _scopes.stack.pop()
            if scope.keeps_lock:
                self.take(None)
                self.prepared = False
            scope.close()

    @contextlib.contextmanager
    def using(self, plan: BatchPlan | None) -> Iterator[None]:
        """Runs a block again under the plan that its forward had."""
        with self.lock:
            before = self.plan
            self.take(plan)
            try:
                yield
            finally:
                self.take(before)

    def check_seen(self, plan: BatchPlan | None) -> None:
        """Raises RuntimeError where a forward ran under the plan past modules at which it edits."""
        missed = [key for key in self.unseen if plan is not None and key in plan.sites]
        if missed:
            raise RuntimeError(
                f"site: the model does not call the module of {missed[0].site!r} in layer {missed[0].layer}, "
                "so its adapter edits nothing there"
            )

    def forget_compiled(self) -> None:
        """Drops compiled code that was traced without our stand-ins."""
        for module in (self.model, self.blocks.stack):
            module.__dict__.pop("_compiled_call", None)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()


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
