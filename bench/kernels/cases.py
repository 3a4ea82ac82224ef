"""Cases of the op alone, and the inputs that all systems of a case share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch

import reft_kernels as rk
from reft_kernels.ops.arguments import PoolRows
from reft_kernels.ops.schema import Act
from reft_kernels.plan import Plan, pack_spans

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
        pool_rows: capacity of the pool; 0: what the adapters need, and where they lie at many places in
            memory (on a GPU) up to USUAL_POOL.
    """

    direction: str
    dtype: str
    rows: int
    width: int
    rank: int
    adapters: int
    mix: str
    pool_rows: int = 0

    @property
    def id(self) -> str:
        return (
            f"{self.direction} {self.dtype} T={self.rows} d={self.width} r={self.rank} "
            f"{self.adapters} {self.mix}" + (f" pool={self.pool_rows}" if self.pool_rows else "")
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

    def pool_capacity(self, sets: int) -> int:
        """Rows of each pool that holds `sets` input sets, or as many as have room.

        A backward gives gradients for all of its pool, so there a pool holds one set alone.
        """
        need = self.adapters * self.rank
        several = 1 if self.direction == "backward" else sets
        return self.pool_rows or min(several * need, max(need, USUAL_POOL))

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


#: Rows of a pool that holds the adapters of several calls: 64 adapters of rank 8, say, on 8 layers.
USUAL_POOL = 4096


class Problem:
    """The tensors of a case.

    Args:
        before: another problem of the case. Its adapters are then laid into memory once more (into its pool,
            if that has room), and which rows take which is read from the same tables, as in the next layer.
        own_rows: whether h and the gradient are copies, too; otherwise they are those of `before`.

    Attributes:
        h: [T, d].
        pool, plan: of reft_kernels.
        index: [T] int64, the adapter of each row, for peers that gather.
        down, up: [A, r, d], bias: [A, r]: the same adapters stacked (a part of the pool), bias in h's dtype.
        gradient: [T, d], what a backward starts from.
        weight: [d], of the norm.
    """

    def __init__(
        self,
        case: KernelCase,
        device: str,
        seed: int,
        before: Problem | None = None,
        own_rows: bool = False,
        sets: int = 1,
    ) -> None:
        self.case, self.device = case, device
        if before is None:
            self._draw(seed, sets)
        else:
            self._share(before, own_rows)
        spans = [self.pool.add(fold) for fold in self.folds]
        if before is None:
            used = np.unique(self._assignment)
            entries = [(spans[adapter], np.flatnonzero(self._assignment == adapter)) for adapter in used]
            self.plan = rk.make_plan(entries, device, total_rows=case.rows)
        else:
            mine = [spans[adapter] for adapter in np.unique(self._assignment)]
            self.plan = before.plan._replace(spans=pack_spans(mine, device))
        self._first = spans[0]
        place = slice(spans[0].first, spans[0].first + case.adapters * case.rank)
        shape = (case.adapters, case.rank, case.width)
        self.down = self.pool.down[place].view(shape)
        self.up = self.pool.up[place].view(shape)
        self.bias = self.pool.bias[place].view(shape[:2]).to(DTYPES[case.dtype])

    def _draw(self, seed: int, sets: int) -> None:
        case, device, dtype = self.case, self.device, DTYPES[self.case.dtype]
        generator = torch.Generator().manual_seed(seed)
        self._assignment = case.assignment(seed)
        self.index = torch.as_tensor(self._assignment, device=device)
        folds = [loreft_fold(case.rank, case.width, generator) for _ in range(case.adapters)]
        self.folds = [rk.Fold(*(part.to(device) for part in fold)) for fold in folds]
        self.capacity = case.pool_capacity(sets)
        self.pool = rk.Pool(case.width, dtype, device, capacity=self.capacity)
        self.h = torch.randn(case.rows, case.width, generator=generator).to(device, dtype)
        self.gradient = torch.randn(case.rows, case.width, generator=generator).to(device, dtype)
        self.weight = torch.randn(case.width, generator=generator).to(device, dtype)

    def _share(self, before: Problem, own_rows: bool) -> None:
        case = self.case
        self._assignment, self.index, self.folds = before._assignment, before.index, before.folds
        self.capacity, self.pool, self.weight = before.capacity, before.pool, before.weight
        if not self.pool.room_for([case.rank] * case.adapters):
            self.pool = rk.Pool(case.width, self.pool.dtype, self.device, capacity=self.capacity)
        self.h, self.gradient = before.h, before.gradient
        if own_rows:
            self.h, self.gradient = self.h.clone(), self.gradient.clone()

    @functools.cached_property
    def single_plan(self) -> Plan:
        """All rows with the first adapter."""
        return rk.make_plan([(self._first, np.arange(self.case.rows))], self.device, self.case.rows)

    def plan_tensors(self, single: bool = False) -> Plan:
        return self.single_plan if single else self.plan

    def pool_tensors(self) -> PoolRows:
        return self.pool.rows


def problems(
    case: KernelCase, device: str, seed: int, sets: int = 1, own_rows: bool = False
) -> list[Problem]:
    """`sets` input sets of a case, each with its adapters at another place in memory."""
    found = [Problem(case, device, seed, sets=sets)]
    while len(found) < sets:
        found.append(Problem(case, device, seed, found[-1], own_rows))
    return found
