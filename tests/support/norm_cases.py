"""Calls of the ops that keep norms, on a `Case`: its plan says which rows, and its pool is left alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reft_kernels.ops import RESTORE_NORMS, RESTORE_NORMS_, RESTORE_NORMS_BACKWARD, ROW_NORMS

from .calls import gathered
from .cases import Case
from .oracle import wide


def kept(case: Case) -> list[tuple[int, int]]:
    """(place in the plan, row of h) of every row that keeps its norm."""
    live = {
        place
        for segment, start, count in case.tiles.tolist()
        if count and case.spans[segment, 1] > 0
        for place in range(start, start + count)
    }
    return [(place, row) for place, row in enumerate(case.rows.tolist()) if place in live and row >= 0]


def norms_of(case: Case, backend: str) -> Tensor:
    return ROW_NORMS[backend](case.h, *case.plan)


def some_norms(case: Case) -> Tensor:
    """Norms to be scaled to, of many sizes, the same for the same case; NaN where nobody must read them."""
    generator = torch.Generator().manual_seed(case.spec.seed + 4)
    dtype = torch.float64 if case.h.dtype is torch.float64 else torch.float32
    norms = torch.full((len(case.rows),), torch.nan, dtype=dtype)
    for place, _ in kept(case):
        size = 10.0 ** torch.randint(-2, 3, (), generator=generator)
        norms[place] = torch.rand((), generator=generator) * size
    return norms.to(case.h.device)


def restored(case: Case, norms: Tensor, backend: str) -> Case:
    """The case after `restore_norms_`, on a copy."""
    after = case.copy()
    RESTORE_NORMS_[backend](after.h, norms, *after.plan)
    return after


def out_of_place(case: Case, norms: Tensor, backend: str) -> Tensor:
    return RESTORE_NORMS[backend](case.h, norms, *case.plan)


def backward(case: Case, grad: Tensor, norms: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(dh, dnorms)."""
    return RESTORE_NORMS_BACKWARD[backend](grad, gathered(case), norms, *case.plan)


def lengths(rows: Tensor) -> np.ndarray:
    """The norms of rows [n, d] in float64."""
    return np.sqrt(np.square(wide(rows)).sum(-1))
