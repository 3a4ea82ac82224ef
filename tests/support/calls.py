"""Calls of the ops on a `Case`."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.ops import INTERVENE, INTERVENE_, INTERVENE_BACKWARD, INTERVENE_NORM_, Norm

from .cases import Case


def in_place(case: Case, backend: str) -> Case:
    """The case after `intervene_`, on a copy."""
    after = case.copy()
    INTERVENE_[backend](after.h, *after.pool, *after.plan)
    return after


class NormOf(NamedTuple):
    """The arguments that `intervene_norm_` takes beside the case."""

    weight: Tensor
    shift: Tensor | None
    eps: float
    norm: int


def norm_of(case: Case) -> NormOf:
    """Any norm, the same for the same case."""
    rng, generator = random.Random(case.spec.seed), torch.Generator().manual_seed(case.spec.seed + 2)
    weight, shift = torch.randn(2, case.spec.d, generator=generator).to(case.h)
    norm = rng.randrange(1 + sum(Norm))
    return NormOf(weight, shift if rng.random() < 0.5 else None, rng.choice((1e-6, 1e-5, 1e-2)), norm)


def normed_in_place(case: Case, backend: str, norm: NormOf | None = None) -> tuple[Case, Tensor]:
    """The case after `intervene_norm_`, on a copy, and the norm that it returned."""
    after = case.copy()
    out = INTERVENE_NORM_[backend](after.h, *after.pool, *after.plan, *(norm or norm_of(case)))
    return after, out


def out_of_place(case: Case, backend: str) -> Tensor:
    return INTERVENE[backend](case.h, *case.pool, *case.plan, case.offsets)


def gathered(case: Case) -> Tensor:
    """hs of `intervene_backward`: the selected rows of h, NaN where the plan has padding."""
    hs = torch.full((len(case.rows), case.spec.d), torch.nan, dtype=case.h.dtype, device=case.h.device)
    real = case.rows >= 0
    hs[real] = case.flat[case.rows[real].long()]
    return hs


def gradient_like(case: Case) -> Tensor:
    """A gradient of the result, contiguous, the same for the same case."""
    generator = torch.Generator().manual_seed(case.spec.seed + 1)
    return torch.randn(case.h.shape, generator=generator).to(case.h)


def backward(
    case: Case, grad: Tensor, backend: str, need_h: bool = True, need_pool: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dh, ddown, dup, dbias)."""
    return INTERVENE_BACKWARD[backend](
        grad, gathered(case), *case.pool, *case.plan, case.offsets, need_h, need_pool
    )
