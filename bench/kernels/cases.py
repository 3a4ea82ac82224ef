"""Cases of the op alone, and the inputs that all systems of a case share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

import reft_kernels as rk
from reft_kernels.ops.schema import Act

from ..measure.ceilings import Work

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIXES = ("distinct", "uniform", "zipf", "identical")
DIRECTIONS = ("forward", "norm", "backward")


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One call of the op.

    Attributes:
        direction: "forward"; "norm" (the forward, and the RMSNorm of every row after it); or "backward" (the
            backward alone, with gradients for h and the adapters).
        dtype: of h and of the pool.
        rows: T, the rows of h, all edited.
        width: d.
        rank: of every adapter.
        adapters: how many adapters the mix draws from; no more than `rows` of them can be used.
        mix: which adapter a row takes: "distinct" (one after the other), "uniform" (at random), "zipf"
            (adapter k with weight 1/k), "identical" (all rows the first).
    """

    direction: str
    dtype: str
    rows: int
    width: int
    rank: int
    adapters: int
    mix: str

    @property
    def id(self) -> str:
        return (
            f"{self.direction} {self.dtype} T={self.rows} d={self.width} r={self.rank} "
            f"{self.adapters} {self.mix}"
        )

    @property
    def result_ids(self) -> list[str]:
        return [self.id]

    @property
    def params(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def assignment(self, seed: int) -> np.ndarray:
        """[rows] adapter of each row."""
        rng = np.random.default_rng(seed)
        if self.mix == "identical":
            return np.zeros(self.rows, dtype=np.int64)
        if self.mix == "distinct":
            return np.arange(self.rows) % self.adapters
        weights = np.ones(self.adapters) if self.mix == "uniform" else 1 / np.arange(1, self.adapters + 1)
        return rng.choice(self.adapters, size=self.rows, p=weights / weights.sum())

    def work(self, seed: int) -> Work:
        """Bytes and operations that any implementation of this case needs."""
        size = DTYPES[self.dtype].itemsize
        used = len(np.unique(self.assignment(seed)))
        row_bytes = self.rows * self.width * size
        weights = used * self.rank * (2 * self.width * size + 8)
        product = 2 * self.rows * self.rank * self.width
        if self.direction == "forward":
            return Work(2 * row_bytes + weights, row_bytes + weights, 2 * product, of_rows=2 * row_bytes)
        if self.direction == "norm":  # writes the normed rows as well
            weights += self.width * size
            operations = 2 * product + 4 * self.rows * self.width
            return Work(3 * row_bytes + weights, 2 * row_bytes + weights, operations, of_rows=3 * row_bytes)
        # Reads h and the gradient, writes dh; reads the weights, writes their gradients. Five products:
        # D h, U g, Dᵀ p, and the two of the weights' gradients.
        total = 3 * row_bytes + 2 * weights
        return Work(moved=total, footprint=total, operations=5 * product)


def loreft_fold(rank: int, width: int, generator: torch.Generator) -> rk.Fold:
    """A LoReFT with orthonormal R and a small W, so that repeated edits of one h settle at a fixed point."""
    rotation = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q.T.contiguous()
    source = 0.5 * torch.randn(rank, width, generator=generator) / width**0.5
    bias = torch.randn(rank, generator=generator)
    return rk.Fold(source - rotation, rotation, bias, torch.full((rank,), int(Act.NONE), dtype=torch.int32))


class Problem:
    """The tensors of a case.

    Attributes:
        h: [T, d].
        pool, plan: of reft_kernels.
        index: [T] int64, the adapter of each row, for peers that gather.
        down, up: [A, r, d], bias: [A, r]: the same adapters stacked, in h's dtype.
        gradient: [T, d], what a backward starts from.
        weight: [d], of the norm.
    """

    def __init__(self, case: KernelCase, device: str, seed: int, copy: int = 0) -> None:
        self.case = case
        dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(seed + 1000 * copy)
        assignment = case.assignment(seed)
        folds = [loreft_fold(case.rank, case.width, generator) for _ in range(case.adapters)]
        self.pool = rk.Pool(case.width, dtype, device, capacity=case.adapters * case.rank)
        spans = [self.pool.add(fold) for fold in folds]
        used = np.unique(assignment)
        entries = [(spans[adapter], np.flatnonzero(assignment == adapter)) for adapter in used]
        self.plan = rk.make_plan(entries, device, total_rows=case.rows)
        self.single_plan = rk.make_plan([(spans[0], np.arange(case.rows))], device, total_rows=case.rows)
        self.h = torch.randn(case.rows, case.width, generator=generator).to(device, dtype)
        self.gradient = torch.randn(case.rows, case.width, generator=generator).to(device, dtype)
        self.weight = torch.randn(case.width, generator=generator).to(device, dtype)
        self.index = torch.as_tensor(assignment, device=device)
        shape = (case.adapters, case.rank, case.width)
        self.down = self.pool.down.clone().view(shape)
        self.up = self.pool.up.clone().view(shape)
        self.bias = self.pool.bias.clone().view(shape[:2]).to(dtype)

    def plan_tensors(self, single: bool = False) -> tuple[Tensor, ...]:
        plan = self.single_plan if single else self.plan
        return plan.rows, plan.tiles, plan.spans, plan.offsets

    def pool_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.pool.down, self.pool.up, self.pool.bias, self.pool.kind
