"""Random calls of the elementwise op: `Case`s whose pool has a scale and a shift in each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from reft_kernels.ops import SCALE_SHIFT, SCALE_SHIFT_, SCALE_SHIFT_BACKWARD

from .calls import gathered
from .cases import Case, Spec, build, check


@dataclasses.dataclass(repr=False)
class Scaled:
    """A `Case` of ranks 0 and 1, and the elementwise pool; what is in no span is NaN and Inf."""

    case: Case
    scale_less_one: Tensor
    shift: Tensor

    @property
    def pool(self) -> tuple[Tensor, Tensor]:
        return self.scale_less_one, self.shift

    def __repr__(self) -> str:
        return f"scaled({self.case.spec})"


def scaled(spec: Spec, device: str = "cpu") -> Scaled:
    spec = dataclasses.replace(spec, ranks=tuple(min(rank, 1) for rank in spec.ranks), plain=True)
    case = build(spec, device)
    generator = torch.Generator().manual_seed(spec.seed + 3)
    dtype = torch.float64 if spec.dtypes[1] is torch.float64 else torch.float32
    shape = (len(case.bias), spec.d)
    pool = [torch.full(shape, value, dtype=dtype) for value in (torch.nan, torch.inf)]
    for first in {segment.first for segment in case.segments if segment.rank}:
        size = 10.0 ** float(torch.randint(-8, 1, (), generator=generator))
        pool[0][first] = torch.randn(spec.d, generator=generator).to(dtype) * size
        pool[1][first] = torch.randn(spec.d, generator=generator).to(dtype)
        pool[0][first, torch.rand(spec.d, generator=generator) < 0.2] = -1
    return Scaled(case, *(t.to(device) for t in pool))


def check_scaled(prop: Callable[[Scaled], None], backend: str, device: str, **options) -> None:
    check(lambda case: prop(scaled(case.spec, device)), backend, device, plain=True, **options)


def in_place(it: Scaled, backend: str, case: Case | None = None) -> Case:
    """The case after `scale_shift_`, on a copy."""
    after = (case or it.case).copy()
    SCALE_SHIFT_[backend](after.h, *it.pool, *after.plan)
    return after


def out_of_place(it: Scaled, backend: str) -> Tensor:
    return SCALE_SHIFT[backend](it.case.h, *it.pool, *it.case.plan, it.case.offsets)


def backward(
    it: Scaled, grad: Tensor, backend: str, need_h: bool = True, need_pool: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dscale_less_one, dshift)."""
    case = it.case
    return SCALE_SHIFT_BACKWARD[backend](
        grad, gathered(case), *it.pool, *case.plan, case.offsets, need_h, need_pool
    )
