"""Calls of the op with a source for each row, and the case without a source that computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from reft_kernels.ops import INTERVENE_SOURCE, INTERVENE_SOURCE_, INTERVENE_SOURCE_BACKWARD

from .calls import gathered
from .cases import Case, Segment, Spec, build, check


@dataclasses.dataclass(repr=False)
class Sourced:
    """A `Case` and a source [n, s], NaN wherever it must not be read."""

    case: Case
    source: Tensor

    def __repr__(self) -> str:
        return f"sourced({self.case.spec})"

    def places(self) -> list[tuple[int, int, Segment]]:
        """(place in the plan, row of h, segment) of every edited row."""
        places = []
        for number, segment in enumerate(self.case.segments):
            start = int(self.case.offsets[number])
            if segment.rank:
                places += [(start + i, row, segment) for i, row in enumerate(segment.rows) if row >= 0]
        return places

    def expanded(self) -> Case:
        """Each edited row as a segment of its own, whose pool rows are a copy with c + source for c.

        In float64, for the oracle; the pool rows of the i-th of `places` begin at the sum of ranks before.
        """
        parts: list[list[Tensor]] = [[], [], [], []]
        segments, size = [], 0
        for place, row, segment in self.places():
            span = slice(segment.first, segment.first + segment.rank)
            down, up, bias, kind = (t[span] for t in self.case.pool)
            added = bias.double() + self.source[place, : segment.rank].double()
            for into, part in zip(parts, (down, up, added, kind)):
                into.append(part)
            segments.append(Segment(size, segment.rank, (row,)))
            size += segment.rank
        pool = [torch.cat(part) if part else whole[:0] for part, whole in zip(parts, self.case.pool)]
        made = self.case.with_segments(segments)
        return dataclasses.replace(made, **dict(zip(("down", "up", "bias", "kind"), pool)))


def sourced(spec: Spec, device: str = "cpu") -> Sourced:
    case = build(spec, device)
    generator = torch.Generator().manual_seed(spec.seed + 5)
    most = max((segment.rank for segment in case.segments), default=0)
    source = torch.full((len(case.rows), most + spec.seed % 3), torch.nan, dtype=case.bias.dtype)
    made = Sourced(case, source)
    for place, _, segment in made.places():
        source[place, : segment.rank] = torch.randn(segment.rank, generator=generator).to(source)
    made.source = source.to(device)
    return made


def check_sourced(prop: Callable[[Sourced], None], backend: str, device: str, **options) -> None:
    check(lambda case: prop(sourced(case.spec, device)), backend, device, **options)


def in_place(it: Sourced, backend: str) -> Case:
    """The case after `intervene_source_`, on a copy."""
    after = it.case.copy()
    INTERVENE_SOURCE_[backend](after.h, it.source, *after.pool, *after.plan)
    return after


def out_of_place(it: Sourced, backend: str) -> Tensor:
    case = it.case
    return INTERVENE_SOURCE[backend](case.h, it.source, *case.pool, *case.plan, case.offsets)


def backward(
    it: Sourced, grad: Tensor, backend: str, need_h: bool = True, need_pool: bool = True
) -> tuple[Tensor, ...]:
    """(dh, ddown, dup, dbias, dsource)."""
    case = it.case
    return INTERVENE_SOURCE_BACKWARD[backend](
        grad, gathered(case), it.source, *case.pool, *case.plan, case.offsets, need_h, need_pool
    )
