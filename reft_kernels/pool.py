"""The pool: device memory that holds the folded rows of many interventions of any rank, without padding.

An intervention owns a contiguous range of rows (a `Span`). Ranges are handed out first fit and joined
again when freed, so room is reused; a pool without a fixed capacity grows by itself. A span that a pool gave
out is known to it until it is removed, so that a plan for rows that are another's by then is refused.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .ops import launch
from .ops.arguments import PoolRows


class Book:
    """Which ranges of a pool are owned. The pool has it, and every span that the pool gave out.

    owners: first row → (rank, ticket); a ticket is like no other, in copies of the pool too.
    removals: how many ranges were given back.
    """

    __slots__ = ("owners", "removals")

    def __init__(self) -> None:
        self.owners: dict[int, tuple[int, str]] = {}
        self.removals = 0


class _Range(NamedTuple):
    first: int
    rank: int


class Span(_Range):
    """A range of pool rows: [first, first + rank).

    One from `Pool.add` knows its pool and whether it was removed there. One made by hand, Span(first, rank),
    is taken at its word; rank 0 means that nothing is edited. They compare as the pairs that they are.
    """

    book: Book | None = None
    ticket: str = ""

    def owned_in(self, book: Book) -> bool:
        """Whether the range is this span's in the pool of that book."""
        return book.owners.get(self.first) == (self.rank, self.ticket)


class Claims:
    """The spans from `Pool.add` that a spans table was made of, and the pool that is known to have them."""

    __slots__ = ("book", "removals", "spans", "version")

    def __init__(self, spans: Sequence[Span], book: Book) -> None:
        self.spans, self.book, self.removals = spans, book, book.removals
        self.version = 0

    def check(self, table: Tensor, pool: Pool) -> None:
        """Refuses a pool that lacks one of the spans. Costs two comparisons while nothing is removed."""
        book = pool.book
        if self.book is book and self.removals == book.removals:
            return
        if table._version != self.version:
            return  # other ranges were written into it since, as servers do with tables that graphs read
        removals = book.removals
        for span in self.spans:
            if not span.owned_in(book):
                raise ValueError(f"plan: {_lost(span, book)}")
        self.book, self.removals = book, removals


def _lost(span: Span, book: Book) -> str:
    """Why a span is not owned in a pool."""
    if span.book is not book and span.book is not None and span.owned_in(span.book):
        return f"{span} is of another pool"
    return f"{span} was removed from its pool; its rows are free already, or another's"


def claims_of(spans: Sequence[Span], name: str) -> Claims | None:
    """The claims of one table's spans, or None where all were made by hand.

    Raises ValueError that begins with `name` and an index: a span that was removed, or spans of two pools.
    """
    book: Book | None = None
    known = []
    for index, span in enumerate(spans):
        if span.book is None:
            continue
        book = book or span.book
        if not span.owned_in(span.book):
            raise ValueError(f"{name}[{index}]: {_lost(span, span.book)}")
        if span.book is not book and not span.owned_in(book):
            raise ValueError(f"{name}[{index}]: {_lost(span, book)}; a plan takes rows of one")
        known.append(span)
    return None if book is None else Claims(known, book)


class Rows(Protocol):
    """What a pool lays down: tensors of `rank` rows each. A `Fold`, or a `ScaleFold`."""

    @property
    def rank(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


class Fold(PoolRows):
    """An intervention in the one form h + Uᵀ φ(D h + c): the pool rows that it is.

    >>> R, W, b = torch.eye(2, 8), torch.ones(2, 8), torch.zeros(2)
    >>> Fold(down=W - R, up=R, bias=b, kind=torch.zeros(2, dtype=torch.int32)).rank  # LoReFT
    2

    down, up: [r, d]; bias: [r]; kind: [r] int32, activation codes and flags (see `reft_kernels.ops.schema`).
    """

    __slots__ = ()
    #: Which kind of edit it is: that of the pool it lies in, and of the op that applies it.
    form: ClassVar[str] = "low_rank"

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    @property
    def width(self) -> int:
        return self.up.shape[1]

    def times(self, number: float) -> Fold:
        """The fold whose edit is this one's times a number."""
        return self if number == 1 else self._replace(up=self.up * number)

    @staticmethod
    def meeting(folds: Sequence[Fold]) -> Sequence[Fold]:
        """The folds that, one behind the other, are the sum of these edits, each of the unedited h."""
        return folds


class PoolFull(RuntimeError):
    """A pool of fixed capacity has no contiguous room for an intervention."""


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Pool:
    """Room for folded interventions on one device, at one width and dtype.

    >>> pool = Pool(width=8, capacity=16)
    >>> kind = torch.zeros(2, dtype=torch.int32)
    >>> span = pool.add(Fold(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2), kind))
    >>> tuple(span), pool.used
    ((0, 2), 2)
    >>> pool.remove(span)
    >>> pool
    Pool(width=8, dtype=torch.float32, device='cpu', used=0, capacity=16, fixed)

    Args:
        width: d, the length of a hidden state.
        dtype: of `down` and `up`; `bias` is float32 (float64 in a float64 pool).
        device: where the rows live.
        capacity: rows. With a capacity the pool never grows, its tensors keep their addresses (captured
            CUDA graphs rely on that), and `add` raises `PoolFull`. None: it grows as needed.

    Attributes:
        rows: down, up [capacity, width]; bias [capacity]; kind [capacity] int32. Others when it grows, all at
            once. `down`, `up`, `bias` and `kind` are the parts by themselves.
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
        self._free: list[_Range] = []
        self._size = 0
        self.book = Book()
        self.rows = self._no_rows()
        self._resize(capacity or 0)

    def _no_rows(self) -> PoolRows:
        bias_dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        return PoolRows(
            down=torch.zeros(0, self.width, dtype=self.dtype, device=self.device),
            up=torch.zeros(0, self.width, dtype=self.dtype, device=self.device),
            bias=torch.zeros(0, dtype=bias_dtype, device=self.device),
            kind=torch.zeros(0, dtype=torch.int32, device=self.device),
        )

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def down(self) -> Tensor:
        return self.rows.down

    @property
    def up(self) -> Tensor:
        return self.rows.up

    @property
    def bias(self) -> Tensor:
        return self.rows.bias

    @property
    def kind(self) -> Tensor:
        return self.rows.kind

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
            f"{type(self).__name__}(width={self.width}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"used={self.used}, capacity={self.capacity}{', fixed' if self.fixed else ''})"
        )

    # No inference tensors: what grew inside a generate may be trained through later.
    @torch.inference_mode(False)
    def _resize(self, size: int) -> None:
        old, made = self._size, []
        for tensor in self.rows:
            grown = torch.zeros((size, *tensor.shape[1:]), dtype=tensor.dtype, device=self.device)
            grown[:old] = tensor
            # A CUDA graph of torch.compile's then reads the pool where it lies; else it would copy all of it
            # before every replay. If the pool grows, the graph is recorded anew.
            torch._dynamo.mark_static_address(grown)
            made.append(grown)
        self.rows = type(self.rows)(*made)
        launch.pool_moved()
        self._size = size
        self._release(_Range(old, size - old))

    def _release(self, span: _Range) -> None:
        """Adds a range to the free ones and joins it with its neighbours."""
        if span.rank == 0:
            return
        joined: list[_Range] = []
        for piece in sorted([*self._free, span]):
            if joined and joined[-1].first + joined[-1].rank == piece.first:
                joined[-1] = _Range(joined[-1].first, joined[-1].rank + piece.rank)
            else:
                joined.append(piece)
        self._free = joined

    def _fit(self, rank: int) -> int | None:
        for index, span in enumerate(self._free):
            if span.rank >= rank:
                rest = _Range(span.first + rank, span.rank - rank)
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
        """Refuses a range that `add` did not return, or that was removed since."""
        if not isinstance(span, Span):
            raise ValueError(f"span: must be a Span that add returned, was {span!r}")
        if not span.rank:
            return
        found = self.book.owners.get(span.first)
        if span.book is not None and not span.owned_in(self.book):
            raise ValueError(f"span: {_lost(span, self.book)}")
        if found is None or found[0] != span.rank:
            raise ValueError(
                f"span: {span} is no range that add returned; its rows are free already, or others'"
            )

    def _check(self, fold: Any) -> None:
        if not isinstance(fold, tuple) or len(fold) != 4 or not all(isinstance(t, Tensor) for t in fold):
            raise ValueError(
                "fold: must be a Fold of the tensors down [r, d], up [r, d], bias [r] and kind [r], was "
                f"a {type(fold).__name__}"
            )
        fold = Fold(*fold)
        if fold.up.dim() != 2 or fold.up.shape[1] != self.width:
            raise ValueError(
                f"fold: up must be [r, {self.width}] to fit a pool of width {self.width}, was "
                f"{list(fold.up.shape)}"
            )
        rank, width = fold.up.shape
        if fold.down.shape != (rank, width) or fold.bias.shape != (rank,) or fold.kind.shape != (rank,):
            raise ValueError(
                f"fold: expected down and up [{rank}, {width}], bias and kind [{rank}]; got down "
                f"{list(fold.down.shape)}, bias {list(fold.bias.shape)}, kind {list(fold.kind.shape)}"
            )
        for name in ("down", "up", "bias"):
            if not getattr(fold, name).is_floating_point():
                raise ValueError(f"fold: {name} must be floating, was {getattr(fold, name).dtype}")
        if fold.kind.dtype is not torch.int32:
            raise ValueError(f"fold: kind must be torch.int32, was {fold.kind.dtype}")

    def add(self, fold: Rows) -> Span:
        """Lays a fold into the pool and returns its range, rank 0 for an empty one.

        Raises PoolFull; ValueError: no fold, or one whose shapes or dtypes don't fit.
        """
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
            span.book, span.ticket = self.book, uuid.uuid4().hex
            self._write(span, fold)
            self.book.owners[first] = (span.rank, span.ticket)
        return span

    def write(self, span: Span, fold: Rows) -> None:
        """Renews the rows of a range in place (one rounding, from the fold's dtype to the pool's).

        Raises ValueError: a fold of another shape, or a range that this pool did not give out or took back.
        """
        self._check(fold)
        with self._lock:
            self._check_span(span)
            if span.rank != fold.rank:
                raise ValueError(f"fold: rank {fold.rank} does not fit a span of {span.rank} rows")
            self._write(span, fold)

    # Under the lock: a row written while another thread copies the pool to grow it would be lost.
    @torch.no_grad()
    def _write(self, span: Span, fold: Rows) -> None:
        for mine, values in zip(self.rows, fold, strict=True):
            mine[span.first : span.first + span.rank].copy_(values)

    def remove(self, span: Span) -> None:
        """Gives a range back. Its rows keep their bytes until they are reused.

        Plans that were made with it are refused from then on. Raises ValueError: a range that this pool did
        not give out, or took back already.
        """
        with self._lock:
            self._check_span(span)
            if span.rank:
                del self.book.owners[span.first]
                self.book.removals += 1
                self._release(_Range(*span))
