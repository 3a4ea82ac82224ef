"""What an adapter's folds are made of, as it was: whether they must be made anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..adapter import Adapter

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
