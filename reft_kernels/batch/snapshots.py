"""Who trains, and what their folds were made of: whether they must be made anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..adapter import Adapter, Drawn

_PLAIN = (Tensor, nn.Parameter)

#: Integers of the same size, which compare bit by bit.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Snapshot(NamedTuple):
    """All tensors of an adapter's interventions, as bits, and what else their folds depend on."""

    settings: list[tuple[bool, float]]
    tensors: list[Tensor]

    def same(self, other: Snapshot | None) -> bool:
        return (
            other is not None
            and self.settings == other.settings
            and len(self.tensors) == len(other.tensors)
            and all(map(torch.equal, self.tensors, other.tensors))
        )


class Trained:
    """Adapters whose folds in the pools may be old: those that train, and those that have been frozen since
    they were folded last."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._snapshots: dict[str, Snapshot] = {}

    def add(self, names: Iterable[str]) -> None:
        """Learns of some that train."""
        self._names.update(names)

    def any_of(self, names: Iterable[str]) -> bool:
        """Whether one of these is among them."""
        return bool(self._names) and not self._names.isdisjoint(names)

    def is_due(self, name: str, adapter: Adapter, drawn: Drawn) -> bool:
        """Whether an adapter must be folded anew, which is then taken for done.

        drawn: the random numbers of a forward in training. Folds of them are of that forward alone.
        """
        if name not in self._names:
            return False
        now = None if any(one in drawn for one in adapter.interventions) else snapshot_of(adapter)
        before = self._snapshots.pop(name, None)
        if not adapter.trainable:
            self._names.discard(name)
        elif now is not None:
            self._snapshots[name] = now
        return now is None or not now.same(before)

    def forget(self, name: str) -> None:
        """Takes it for unknown what the adapter was folded of."""
        self._snapshots.pop(name, None)

    def forget_all(self) -> None:
        """The same of all."""
        self._snapshots.clear()

    def discard(self, name: str) -> None:
        """The adapter has gone."""
        self._names.discard(name)
        self.forget(name)


@torch.no_grad()
def snapshot_of(adapter: Adapter) -> Snapshot | None:
    """A copy of what an adapter's folds are made of; None where it can't be had without waiting for a device.

    Of the values, as versions don't tell: fused optimizers, sharding and writes through `.data` don't count
    them up. Both copy and comparison take a small part of the folds' time.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for one in adapter.interventions:
        for tensor in (*one._parameters.values(), *one._buffers.values()):
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN or tensor.device.type != "cpu":
                return None
            by_dtype.setdefault(tensor.dtype, []).append(tensor.flatten())
    joined = [torch.cat(tensors) for tensors in by_dtype.values()]
    settings = [(one.orthonormalize, one.scale) for one in adapter.interventions]
    return Snapshot(settings, [tensor.view(_BITS[tensor.element_size()]) for tensor in joined])
