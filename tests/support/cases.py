"""Random calls of the ops: hypothesis draws a small `Spec`, `build` makes tensors of it.

Whatever an op must not use is poison: unused pool rows and the D of rows without a product are NaN and
Inf; rows of h that nobody edits, and the bytes between strided rows, are random bits.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from reft_kernels.ops import NO_PRODUCT, TILE, Act

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

HALF = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
DTYPES = [
    (torch.float32, torch.float32),
    *HALF,
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
DTYPES_WIDE = [*DTYPES, (torch.float64, torch.float64), (torch.float64, torch.float32)]


def bits(t: Tensor) -> Tensor:
    """The tensor's bytes as integers: equal only if NaN payloads and signs of zero are."""
    return t.detach().contiguous().view(INTEGERS[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What hypothesis draws. Printed when a property fails, and enough to build the case again."""

    seed: int
    dtypes: tuple[torch.dtype, torch.dtype]  # of h, of the pool
    d: int
    lead: tuple[int, ...]  # leading dimensions of h
    row_pad: int  # row stride − d
    offset: int  # of h in its storage, in elements
    ranks: tuple[int, ...]  # by segment
    gaps: tuple[int, ...]  # unused pool rows before each segment's range
    shared: tuple[bool, ...]  # whether a segment takes the range of the one before it
    count: int  # rows of h
    density: float  # share of the rows that a segment owns
    ragged: bool  # tiles of any size, empty tiles, padding rows
    plain: bool  # no activation, no NO_PRODUCT
    scale: float


#: A small case with all that is usual in it, to be changed where a test needs something else.
USUAL = Spec(
    seed=5,
    dtypes=(torch.float32, torch.float32),
    d=24,
    lead=(3, 4),
    row_pad=0,
    offset=0,
    ranks=(2, 0, 5),
    gaps=(1, 0, 2),
    shared=(False, False, False),
    count=12,
    density=0.7,
    ragged=False,
    plain=False,
    scale=1.0,
)


@dataclasses.dataclass(frozen=True)
class Segment:
    first: int
    rank: int
    rows: tuple[int, ...]  # negative: padding


@dataclasses.dataclass(repr=False)
class Case:
    """The tensors of one call. `storage` is all memory that h lies in."""

    spec: Spec
    storage: Tensor
    h: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor
    kind: Tensor
    segments: list[Segment]
    rows: Tensor
    tiles: Tensor
    spans: Tensor
    offsets: Tensor

    @property
    def pool(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.down, self.up, self.bias, self.kind

    @property
    def plan(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.tiles, self.spans

    @property
    def flat(self) -> Tensor:
        return self.h.view(-1, self.spec.d)

    @property
    def edited(self) -> list[int]:
        return [row for s in self.segments if s.rank for row in s.rows if row >= 0]

    def copy(self) -> Case:
        """The same call on memory of its own (h with the same strides)."""
        storage = self.storage.clone()
        h = storage.as_strided(self.h.shape, self.h.stride(), self.h.storage_offset())
        return dataclasses.replace(self, storage=storage, h=h)

    def with_segments(self, segments: list[Segment], tiler: Callable[[int], list[int]] | None = None) -> Case:
        """The same h and pool under another plan."""
        plan = make_plan(segments, tiler or neat_tiles, self.h.device)
        return dataclasses.replace(self, segments=segments, **plan)

    def covered(self, tiler: Callable[[int], list[int]] | None = None) -> Case:
        """The same call under a plan that names every row of h: the others in tiles of segment −1."""
        named = {row for segment in self.segments for row in segment.rows}
        rest = [row for row in range(self.spec.count) if row not in named]
        random.Random(self.spec.seed).shuffle(rest)
        sizes = (tiler or neat_tiles)(len(rest))
        starts = [len(self.rows) + sum(sizes[:i]) for i in range(len(sizes))]
        tiles = [(-1, start, size) for start, size in zip(starts, sizes)]
        rows = torch.cat([self.rows, self.rows.new_tensor(rest)])
        tiles = torch.cat([self.tiles, self.tiles.new_tensor(tiles).view(-1, 3)])
        return dataclasses.replace(self, rows=rows, tiles=tiles)

    def __repr__(self) -> str:
        return f"build({self.spec})"


def neat_tiles(count: int) -> list[int]:
    return [min(TILE, count - start) for start in range(0, count, TILE)]


def ragged_tiles(rng: random.Random) -> Callable[[int], list[int]]:
    def cut(count: int) -> list[int]:
        sizes = []
        while count:
            sizes.append(rng.randint(0, min(TILE, count)))
            count -= sizes[-1]
        return sizes

    return cut


def make_plan(
    segments: list[Segment],
    tiler: Callable[[int], list[int]],
    device: torch.device | str,
    empty_tiles: bool = False,
) -> dict:
    """rows, tiles, spans and offsets by the schema's text; reft_kernels.plan has tests of its own."""
    rows, tiles, offsets = [], [], [0]
    for number, segment in enumerate(segments):
        start = len(rows)
        for size in tiler(len(segment.rows)):
            tiles.append((number, start, size))
            start += size
        rows += segment.rows
        offsets.append(len(rows))
    if empty_tiles:
        tiles += [(0, 0, 0)] * 3
    ints = {"dtype": torch.int32, "device": device}
    return {
        "rows": torch.tensor(rows, **ints),
        "tiles": torch.tensor(tiles, **ints).view(-1, 3),
        "spans": torch.tensor([(s.first, s.rank) for s in segments], **ints).view(-1, 2),
        "offsets": torch.tensor(offsets, **ints),
    }


def _noise(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random bits, with −0, ±Inf and a NaN that has a payload and no quiet bit among them."""
    words = INTEGERS[torch.empty(0, dtype=dtype).element_size()]
    info = torch.iinfo(words)
    raw = torch.randint(info.min, info.max, shape, dtype=words, generator=generator).view(-1)
    infinity = bits(torch.tensor([torch.inf], dtype=dtype)).item()
    special = torch.tensor([info.min, infinity, infinity + info.min, infinity + 1], dtype=words)
    raw[::5] = special[torch.randint(0, 4, (len(raw[::5]),), generator=generator)]
    return raw.view(shape).view(dtype)


def _pool(spec: Spec, generator: torch.Generator, rng: random.Random):
    dtype = spec.dtypes[1]
    spans, size = [], 0
    for rank, gap, shared in zip(spec.ranks, spec.gaps, spec.shared):
        if rank == 0:
            spans.append((0, 0))
        elif shared and spans:
            spans.append(spans[-1])
        else:
            spans.append((size + gap, rank))
            size += gap + rank
    size += 2
    down, up = (torch.full((size, spec.d), torch.nan, dtype=dtype) for _ in range(2))
    up[::2] = torch.inf
    bias = torch.full((size,), torch.nan, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    kind = torch.zeros(size, dtype=torch.int32)
    for first, rank in spans:
        rows = slice(first, first + rank)
        down[rows] = (torch.randn(rank, spec.d, generator=generator) * spec.d**-0.5).to(dtype)
        up[rows] = (torch.randn(rank, spec.d, generator=generator) * spec.d**-0.5).to(dtype)
        bias[rows] = torch.randn(rank, generator=generator).to(bias.dtype)
        if not spec.plain:
            kind[rows] = torch.tensor(
                [rng.choice(list(Act)) | rng.choice((0, 0, NO_PRODUCT)) for _ in range(rank)],
                dtype=torch.int32,
            )
    down[(kind & NO_PRODUCT) != 0] = torch.tensor(rng.choice((torch.inf, torch.nan)), dtype=dtype)
    return spans, down, up, bias, kind


def build(spec: Spec, device: str = "cpu") -> Case:
    generator, rng = torch.Generator().manual_seed(spec.seed), random.Random(spec.seed)
    stride = spec.d + spec.row_pad
    storage = _noise((spec.offset + spec.count * stride + 7,), spec.dtypes[0], generator)
    strides, step = [], stride
    for size in reversed(spec.lead):
        strides.insert(0, step)
        step *= size
    where = ((*spec.lead, spec.d), (*strides, 1), spec.offset)
    h = storage.as_strided(*where)
    spans, *pool = _pool(spec, generator, rng)
    owners = [
        rng.randrange(len(spans)) if spans and rng.random() < spec.density else None
        for _ in range(spec.count)
    ]
    segments = []
    for number, (first, rank) in enumerate(spans):
        rows = [row for row, owner in enumerate(owners) if owner == number]
        if rank:
            values = torch.randn(len(rows), spec.d, generator=generator) * spec.scale
            h.view(-1, spec.d)[rows] = values.to(h.dtype)
        rng.shuffle(rows)
        if spec.ragged:
            for _ in range(rng.randint(0, 3)):
                rows.insert(rng.randint(0, len(rows)), rng.choice((-1, -(2**31))))
        segments.append(Segment(first, rank, tuple(rows)))
    storage = storage.to(device)
    plan = make_plan(segments, ragged_tiles(rng) if spec.ragged else neat_tiles, device, spec.ragged)
    pool = [t.to(device) for t in pool]
    return Case(spec, storage, storage.as_strided(*where), *pool, segments, **plan)


def interpreted(backend: str, device: str) -> bool:
    """Triton's interpreter takes a second where a compiled kernel takes microseconds."""
    return backend == "triton" and device == "cpu"


@st.composite
def specs(draw: st.DrawFn, backend: str, device: str, dtypes=None, plain: bool | None = None) -> Spec:
    slow = interpreted(backend, device)
    widths = [1, 2, 3, 7, 8, 16, 31, 33, 64, 72]
    if not slow:
        widths += [96, 128, 129, 200, 256, 520, 1024, 2056]
    if backend == "triton" and not slow:
        # Each width and dtype is several kernels to compile, of seconds each.
        widths = [7, 64, 520, 2056]
        dtypes = dtypes or [DTYPES[0], HALF[0], (torch.bfloat16, torch.float32)]
    count = draw(st.integers(0, 20 if slow else 70))
    shapes = [(count,)] + [(count // k, k) for k in (1, 2, 5) if count % k == 0]
    shapes += [(1, count, 1), (0, 3)] if count == 0 else [(1, count, 1)]
    shapes += [()] if count == 1 else []
    n = draw(st.sampled_from([1, 2, 3, 0] if slow else [1, 2, 3, 4, 6, 0]))
    ranks = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9] if slow else [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33])

    def each(strategy: st.SearchStrategy) -> tuple:
        return tuple(draw(strategy) for _ in range(n))

    return Spec(
        seed=draw(st.integers(0, 2**20)),
        dtypes=draw(st.sampled_from(dtypes or (DTYPES_WIDE if backend == "reference" else DTYPES))),
        d=draw(st.sampled_from(widths)),
        lead=draw(st.sampled_from(shapes)),
        row_pad=draw(st.sampled_from([0, 0, 1, 8, 13])),
        offset=draw(st.sampled_from([0, 0, 1, 3, 8])),
        ranks=each(ranks),
        gaps=each(st.integers(0, 3)),
        shared=each(st.booleans()),
        count=count,
        density=draw(st.sampled_from([0.7, 1.0, 0.1])),
        ragged=draw(st.booleans()),
        plain=draw(st.booleans()) if plain is None else plain,
        scale=draw(st.sampled_from([1e-3, 1.0, 30.0])),
    )


def check(prop: Callable[[Case], None], backend: str, device: str, **options) -> None:
    """Runs a property on cases drawn for a backend, fewer of them where a case is slow."""
    strategy = specs(backend, device, **options)
    slow = interpreted(backend, device)
    count = hypothesis.settings().max_examples
    phases = [phase for phase in hypothesis.Phase if not slow or phase.name not in ("shrink", "explain")]

    @hypothesis.settings(
        max_examples=max(count // 3, 5) if slow else count,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def holds(spec: Spec) -> None:
        prop(build(spec, device))

    holds()
