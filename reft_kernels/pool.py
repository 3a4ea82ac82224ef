"""The pool: device memory that holds the folded rows of many interventions of any rank, without padding.

An intervention owns a contiguous range of rows (a `Span`). Ranges are handed out first fit and joined
again when freed, so room is reused; a pool without a fixed capacity grows by itself.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A range of pool rows: [first, first + rank)."""

    first: int
    rank: int


class Fold(NamedTuple):
    """An intervention in the one form h + Uᵀ φ(D h + c).

    down, up: [r, d]; bias: [r]; kind: [r] int32, activation codes and flags (see `reft_kernels.ops.schema`).
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    kind: Tensor

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    @property
    def width(self) -> int:
        return self.up.shape[1]


class PoolFull(RuntimeError):
    """A pool of fixed capacity has no contiguous room for an intervention."""


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Pool:
    """Room for folded interventions on one device, at one width and dtype.

    Args:
        width: d, the length of a hidden state.
        dtype: of `down` and `up`; `bias` is float32 (float64 in a float64 pool).
        device: where the rows live.
        capacity: rows. With a capacity the pool never grows, its tensors keep their addresses (captured
            CUDA graphs rely on that), and `add` raises `PoolFull`. None: it grows as needed.

    Attributes: down, up [capacity, width]; bias [capacity]; kind [capacity] int32.
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
    ) -> None:
        if width < 1:
            raise ValueError(f"width: must be at least 1, was {width}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(map(str, _DTYPES))}, was {dtype}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity: must be at least 1 pool row or None, was {capacity}")
        self.width, self.dtype, self.device = width, dtype, torch.device(device)
        self.fixed = capacity is not None
        self._lock = threading.Lock()
        self._free: list[Span] = []
        self._size = 0
        self.down = torch.zeros(0, width, dtype=self.dtype, device=self.device)
        self.up = torch.zeros(0, width, dtype=self.dtype, device=self.device)
        self.bias = torch.zeros(0, dtype=self._bias_dtype, device=self.device)
        self.kind = torch.zeros(0, dtype=torch.int32, device=self.device)
        self._resize(capacity or 0)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def _bias_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def capacity(self) -> int:
        """Pool rows that there are."""
        return self._size

    @property
    def used(self) -> int:
        """Pool rows that interventions own."""
        return self._size - sum(span.rank for span in self._free)

    def __repr__(self) -> str:
        return (
            f"Pool(width={self.width}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"used={self.used}, capacity={self.capacity}{', fixed' if self.fixed else ''})"
        )

    # No inference tensors: what grew inside a generate may be trained through later.
    @torch.inference_mode(False)
    def _resize(self, size: int) -> None:
        old = self._size
        for name in ("down", "up", "bias", "kind"):
            tensor = getattr(self, name)
            grown = torch.zeros((size, *tensor.shape[1:]), dtype=tensor.dtype, device=self.device)
            grown[:old] = tensor
            # A CUDA graph of torch.compile's then reads the pool where it lies; else it would copy all of it
            # before every replay. If the pool grows, the graph is recorded anew.
            torch._dynamo.mark_static_address(grown)
            setattr(self, name, grown)
        self._size = size
        self._release(Span(old, size - old))

    def _release(self, span: Span) -> None:
        """Gives a range back and joins it with free neighbours."""
        if span.rank == 0:
            return
        joined: list[Span] = []
        for piece in sorted([*self._free, span]):
            if joined and joined[-1].first + joined[-1].rank > piece.first:
                raise ValueError(f"span: rows {span.first}..{span.first + span.rank} were free already")
            if joined and joined[-1].first + joined[-1].rank == piece.first:
                joined[-1] = Span(joined[-1].first, joined[-1].rank + piece.rank)
            else:
                joined.append(piece)
        self._free = joined

    def _fit(self, rank: int) -> int | None:
        for index, span in enumerate(self._free):
            if span.rank >= rank:
                rest = Span(span.first + rank, span.rank - rank)
                self._free[index : index + 1] = [rest] if rest.rank else []
                return span.first
        return None

    def room_for(self, ranks: list[int]) -> bool:
        """Whether interventions of these ranks, added in this order, would fit without growing."""
        free = [span.rank for span in self._free]
        for rank in ranks:
            if not rank:
                continue
            place = next((i for i, room in enumerate(free) if room >= rank), None)
            if place is None:
                return False
            free[place] -= rank
        return True

    def _check_span(self, span: Span) -> None:
        if span.rank and not 0 <= span.first <= span.first + span.rank <= self._size:
            raise ValueError(f"span: {tuple(span)} lies outside the pool's {self._size} rows")

    def _check(self, fold: Fold) -> None:
        rank, width = fold.up.shape
        if width != self.width:
            raise ValueError(f"fold: width {width} does not fit a pool of width {self.width}")
        if fold.down.shape != (rank, width) or fold.bias.shape != (rank,) or fold.kind.shape != (rank,):
            raise ValueError(
                f"fold: expected down and up [{rank}, {width}], bias and kind [{rank}]; got down "
                f"{list(fold.down.shape)}, bias {list(fold.bias.shape)}, kind {list(fold.kind.shape)}"
            )

    def add(self, fold: Fold) -> Span:
        """Lays a fold into the pool and returns its range. Raises PoolFull, ValueError."""
        self._check(fold)
        with self._lock:
            if fold.rank == 0:
                return Span(0, 0)
            first = self._fit(fold.rank)
            if first is None:
                if self.fixed:
                    raise PoolFull(
                        f"the pool has no {fold.rank} contiguous rows free: {self.used} of its capacity "
                        f"of {self.capacity} rows are used. Delete an adapter, or give a larger capacity"
                    )
                # The last free range may be used as the beginning of the room that growth adds.
                tail = self._free[-1] if self._free else Span(self._size, 0)
                spare = tail.rank if tail.first + tail.rank == self._size else 0
                self._resize(max(2 * self._size, self._size + fold.rank - spare, 16))
                first = self._fit(fold.rank)
                assert first is not None
            span = Span(first, fold.rank)
            self._write(span, fold)
        return span

    def write(self, span: Span, fold: Fold) -> None:
        """Renews the rows of a range in place (one rounding, from the fold's dtype to the pool's)."""
        self._check(fold)
        if span.rank != fold.rank:
            raise ValueError(f"fold: rank {fold.rank} does not fit a span of {span.rank} rows")
        with self._lock:
            self._check_span(span)
            self._write(span, fold)

    # Under the lock: a row written while another thread copies the pool to grow it would be lost.
    @torch.no_grad()
    def _write(self, span: Span, fold: Fold) -> None:
        rows = slice(span.first, span.first + span.rank)
        self.down[rows].copy_(fold.down)
        self.up[rows].copy_(fold.up)
        self.bias[rows].copy_(fold.bias)
        self.kind[rows].copy_(fold.kind)

    def remove(self, span: Span) -> None:
        """Gives a range back. Its rows keep their bytes until they are reused. Raises ValueError."""
        with self._lock:
            self._check_span(span)
            self._release(span)
