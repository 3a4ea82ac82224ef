"""What only the Triton kernels have: forms by rank, blocks of d and of the pool, their own activations.

In the interpreter where there is no GPU (see conftest.py). The promises that all backends share are
tested in tests/ops.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reft_kernels.ops import (
    INTERVENE,
    INTERVENE_,
    INTERVENE_BACKWARD,
    INTERVENE_NORM_,
    NO_PRODUCT,
    Act,
    Norm,
    why_not,
)
from reft_kernels.ops.reference import activate, activation_slope, normed

pytest.importorskip("triton")
import triton
import triton.language as tl

from reft_kernels.ops.triton_ops import options
from reft_kernels.ops.triton_ops.blocks import split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(why_not("triton", DEVICE) is not None, reason=str(why_not("triton", DEVICE)))

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
#: Relative to the largest value: one rounding of the result, and float32 sums.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


class Call:
    """Pool, plan and h for segments of given (first pool row, rank, number of rows)."""

    def __init__(self, segments, d, dtypes=DTYPES[0], rows_of_h=40, seed=0, padding=0, activations=True):
        generator = torch.Generator().manual_seed(seed)
        self.h_dtype, pool_dtype = dtypes
        capacity = max(first + rank for first, rank, _ in segments) + 3

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        kind = torch.arange(capacity, dtype=torch.int32) % len(Act) if activations else torch.zeros(capacity)
        kind = kind.to(torch.int32)
        kind[::5] |= NO_PRODUCT
        down, up = normal(capacity, d) / d**0.5, normal(capacity, d) / 4
        down[::5] = torch.inf  # where there is no product, D is not read
        bias = normal(capacity)
        used = torch.zeros(capacity, dtype=torch.bool)
        for first, rank, _ in segments:
            used[first : first + rank] = True
        for tensor in (down, up, bias):
            tensor[~used] = torch.nan
        self.used = used
        h = normal(rows_of_h, d)
        order = torch.randperm(rows_of_h, generator=generator).tolist()
        rows, tiles, offsets = [], [], [0]
        for number, (_, _, count) in enumerate(segments):
            mine = [order.pop() for _ in range(count)] + [-1] * padding
            for start in range(0, len(mine), 16):
                tiles.append((number, len(rows) + start, min(16, len(mine) - start)))
            if padding:
                tiles.append((0, 0, 0))
            rows += mine
            offsets.append(len(rows))
        to = {"device": DEVICE}
        ints = to | {"dtype": torch.int32}
        self.h = h.to(self.h_dtype).to(**to)
        self.pool = [down.to(pool_dtype).to(**to), up.to(pool_dtype).to(**to), bias.to(**to), kind.to(**to)]
        self.rows = torch.tensor(rows, **ints)
        self.tiles = torch.tensor(tiles, **ints).view(-1, 3)
        self.spans = torch.tensor([segment[:2] for segment in segments], **ints).view(-1, 2)
        self.offsets = torch.tensor(offsets, **ints)
        self.grad = normal(rows_of_h, d).to(self.h_dtype).to(**to)

    @property
    def plan(self):
        return self.rows, self.tiles, self.spans

    def forward(self, backend: str = "triton") -> Tensor:
        out = self.h.clone()
        INTERVENE_[backend](out, *self.pool, *self.plan)
        return out

    def backward(self, backend: str = "triton", need_h: bool = True, need_pool: bool = True):
        hs = self.h[self.rows.clamp(min=0).long()]
        hs[self.rows < 0] = torch.nan
        return INTERVENE_BACKWARD[backend](
            self.grad, hs, *self.pool, *self.plan, self.offsets, need_h, need_pool
        )

    def forward_and_norm(self, norm: int = Norm.RMS, shift: bool = False, h: Tensor | None = None):
        """(h edited, its norm, the arguments of the norm); rows that no segment takes are idle."""
        h = self.h.clone() if h is None else h
        idle = [row for row in range(len(self.h)) if row not in set(self.rows.tolist())]
        ints = {"dtype": torch.int32, "device": DEVICE}
        tiles = [(-1, start, min(16, len(idle) - start)) for start in range(0, len(idle), 16)]
        extra = torch.tensor(tiles, **ints).view(-1, 3)
        extra[:, 1] += len(self.rows)
        rows = torch.cat([self.rows, torch.tensor(idle, **ints)])
        weight, bias = self.grad[:2].clone()
        arguments = (weight, bias if shift else None, 1e-5, int(norm))
        plan = (rows, torch.cat([self.tiles, extra]), self.spans)
        return h, INTERVENE_NORM_["triton"](h, *self.pool, *plan, *arguments), arguments


def assert_near(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype, what
    scale = want.double().abs().max().clamp(min=1.0)
    error = (got.double() - want.double()).abs().max() / scale
    assert error <= TOLERANCE[got.dtype], f"{what}: off by {error:.2e} of the largest"


@pytest.mark.parametrize(
    ("dtypes", "d"),
    [*((pair, 33) for pair in DTYPES), (DTYPES[0], 130), (DTYPES[3], 130), (DTYPES[1], 272)],
    ids=str,
)
def test_mixed_ranks_equal_the_reference(dtypes, d: int) -> None:
    segments = [(2, 1, 2), (3, 3, 18), (7, 8, 3), (16, 40, 4), (0, 0, 3)]
    call = Call(segments, d, dtypes, padding=3)
    assert_near(call.forward(), call.forward("reference"), "h")
    for what, got, want in zip(("dh", "ddown", "dup", "dbias"), call.backward(), call.backward("reference")):
        assert_near(got, want, what)
        if what != "dh":
            assert not got[~call.used].any(), f"{what} of pool rows that nobody used"


@pytest.mark.parametrize("d", [33, 130, 272])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=["float32", "bfloat16", "mixed"])
def test_the_form_of_old_tritons_equals_the_reference(
    dtypes, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of 16 terms at rank ≤ 8, which take two parts of a block at once; whichever Triton this is."""
    monkeypatch.setattr(options, "LEAST_TERMS", 16)
    call = Call([(2, 1, 2), (3, 3, 18), (7, 8, 3), (16, 8, 1)], d, dtypes, padding=3)
    assert_near(call.forward(), call.forward("reference"), "h")
    h, _, _ = call.forward_and_norm()
    assert torch.equal(h, call.forward())


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=["float32", "bfloat16", "mixed"])
def test_ranks_of_many_chunks_and_beyond_all_forms(dtypes) -> None:
    """Forward in chunks of 32 up to 256, then row by row; backward row by row above 64."""
    call = Call([(1, 66, 1), (67, 64, 2), (140, 256, 2), (400, 257, 1)], 40, dtypes, rows_of_h=8, padding=1)
    assert_near(call.forward(), call.forward("reference"), "h")
    call = Call([(1, 66, 1), (67, 64, 1)], 40, dtypes, rows_of_h=5, padding=1)
    for what, got, want in zip(("dh", "ddown", "dup", "dbias"), call.backward(), call.backward("reference")):
        assert_near(got, want, what)


@pytest.mark.parametrize(
    ("rank", "terms"),
    [(8, options.LEAST_TERMS), (8, 16), *((rank, options.LEAST_TERMS) for rank in (33, 65, 257))],
)
def test_a_row_alone_has_the_bits_that_it_has_in_a_tile(
    rank: int, terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "LEAST_TERMS", terms)
    call = Call([(3, rank, 2)], 70, DTYPES[1], rows_of_h=2)
    together = call.forward()
    dh = call.backward(need_pool=False)[0]
    for position in (0, 1):
        row = int(call.rows[position])
        alone = Call([(3, rank, 2)], 70, DTYPES[1], rows_of_h=2)
        alone.rows = alone.rows[position : position + 1]
        alone.tiles = torch.tensor([[0, 0, 1]], dtype=torch.int32, device=DEVICE)
        alone.offsets = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
        assert torch.equal(alone.forward()[row], together[row])
        assert torch.equal(alone.backward(need_pool=False)[0][row], dh[row])


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=["float32", "bfloat16", "mixed"])
def test_rows_split_among_programs_add_up_in_order(dtypes, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [(2, 3, 90), (5, 8, 70), (2, 3, 40), (40, 2, 1), (0, 0, 2)]
    call = Call(segments, 33, dtypes, rows_of_h=210, padding=2)
    monkeypatch.setattr(options, "pool_splits", lambda *sizes: 3)
    got, again = call.backward(), call.backward()
    for what, *gradients in zip(("dh", "ddown", "dup", "dbias"), got, again, call.backward("reference")):
        assert torch.equal(gradients[0], gradients[1]), what
        assert_near(gradients[0], gradients[2], what)
        if what != "dh":
            assert not gradients[0][~call.used].any(), f"{what} of pool rows that nobody used"


def test_many_rows_of_few_pool_rows_are_split() -> None:
    assert options.pool_splits(n=4096, n_pool=8, d=4096) == 16
    assert options.pool_splits(n=511, n_pool=8, d=4096) == 1
    assert options.pool_splits(n=4096, n_pool=4096, d=4096) == 1


@pytest.mark.parametrize("second", [(3, 8), (3, 5), (9, 20), (5, 66)])
def test_segments_that_share_pool_rows_add_up(second: tuple[int, int]) -> None:
    """Wholly, in part, across blocks of the pool, and one of a rank whose p and v are not kept."""
    call = Call([(3, 8, 3), (*second, 2)], 40, rows_of_h=6)
    for what, got, want in zip(("dh", "ddown", "dup", "dbias"), call.backward(), call.backward("reference")):
        assert_near(got, want, what)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinity_in_one_segment_stays_there() -> None:
    """Adapters that share a block of 16 pool rows: Inf of one's h times the 0 of the other's mask is NaN."""
    call = Call([(0, 3, 2), (3, 3, 2)], 40, activations=False)
    call.h[call.rows[0].long(), 7] = torch.inf
    forward, expected = call.forward(), call.forward("reference")
    other = call.rows[2:].long()
    assert_near(forward[other], expected[other], "h")
    poisoned = expected[call.rows[0].long()]
    assert torch.equal(forward[call.rows[0].long()].isnan(), poisoned.isnan())
    for got, want in zip(call.backward()[1:], call.backward("reference")[1:]):
        assert_near(got[3:6], want[3:6], "gradients of the other adapter")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("code", list(Act), ids=lambda code: code.name.lower())
def test_activations_and_slopes(code: Act) -> None:
    """Through one call: d = 2, U picks the first number, D h = h₁ and h₀ = 0."""
    fixed = [
        0.0,
        1e-4,
        -1e-4,
        0.3,
        -0.6,
        0.624,
        0.626,
        5.0,
        -5.0,
        20.0,
        -20.0,
        60.0,
        -60.0,
        3e4,
        -3e4,
        1e30,
        -1e30,
    ]
    z = torch.tensor(fixed + torch.linspace(-9, 9, 47).tolist(), device=DEVICE)
    call = Call([(0, 1, len(z))], 2, rows_of_h=len(z))
    one = torch.tensor([[0.0, 1.0]], device=DEVICE)
    call.pool = [one, one.flip(1), torch.zeros(1, device=DEVICE), call.pool[3][:1] * 0 + int(code)]
    call.h = torch.stack([torch.zeros_like(z), z], 1)
    call.grad = torch.ones_like(call.h)
    value, gradient = call.forward()[:, 0], call.backward(need_pool=False)[0][:, 1] - 1
    kind = torch.full_like(z, int(code), dtype=torch.int32)
    want = activate(z.double()[None], kind)[0]
    slope = activation_slope(z.double()[None], kind)[0]
    assert ((value.double() - want).abs() <= 1e-6 * want.abs().clamp(min=0.1)).all()
    assert ((gradient.double() - slope).abs() <= 1e-6).all()


@triton.jit
def _halves(a, high, low, N: tl.constexpr):
    at = tl.arange(0, N)
    first, second = split(tl.load(a + at))
    tl.store(high + at, first)
    tl.store(low + at, second)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_halves_of_float32_keep_infinity_and_nan() -> None:
    """A NaN whose payload lies in what TF32 drops; numbers without a low half that meet an Inf."""
    bits = [0x7F800001, 0x7F801FFF, 0xFF800001 - 2**32, 0x7FC00000, 0x7F800000, 0xFF800000 - 2**32]
    special = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    plain = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-20, -3.1, 2.0**-126, 1e-42, 1e30, 0.1])
    a = torch.cat([special, plain]).to(DEVICE)
    high, low = torch.empty_like(a), torch.empty_like(a)
    _halves[(1,)](a, high, low, N=len(a))
    in_tf32 = (high.view(torch.int32) & -8192).view(torch.float32)
    assert torch.equal(in_tf32.isnan(), a.isnan())
    assert not low.isnan().any()
    finite = a.isfinite()
    error = (in_tf32.double() + low.double() - a.double())[finite].abs()
    assert (error <= 2.0**-125).all()
    inf = torch.full_like(a, torch.inf)
    same = (a != 0) & ~a.isnan()
    assert torch.equal((low * inf + in_tf32 * inf)[same], (a * inf)[same])


def test_rows_beyond_h_are_not_written() -> None:
    call = Call([(0, 4, 3), (4, 66, 1)], 40, rows_of_h=4)
    storage = torch.cat([call.h, call.h])
    call.rows[0] += 4
    call.rows[3] += 4
    INTERVENE_["triton"](storage[:4], *call.pool, *call.plan)
    assert torch.equal(storage[4:], call.h)
    edited = call.rows[1:3].long()
    assert not torch.equal(storage[edited], call.h[edited])


def test_a_strided_h_is_edited_in_place() -> None:
    call = Call([(0, 4, 5)], 40, DTYPES[1])
    storage = torch.zeros(40, 47, dtype=torch.bfloat16, device=DEVICE)
    view = storage[:, 3:43]
    view.copy_(call.h)
    INTERVENE_["triton"](view.view(8, 5, 40), *call.pool, *call.plan)
    assert torch.equal(view, call.forward())
    assert not storage[:, :3].any() and not storage[:, 43:].any()


def test_what_the_kernels_would_misread_is_refused() -> None:
    call = Call([(0, 4, 5)], 40)
    down, up, bias, kind = call.pool
    refused = [
        ("h: the triton backend takes.*float64.*reference", (call.h.double(), *call.pool, *call.plan)),
        ("h: the last dimension must be contiguous", (call.h.T.contiguous().T, *call.pool, *call.plan)),
        (
            "h: its leading dimensions must collapse",
            (call.h.view(8, 5, 40).transpose(0, 1), *call.pool, *call.plan),
        ),
        ("down, up: one dtype", (call.h, down.half(), up.half(), bias, kind, *call.plan)),
        ("up: must be a contiguous", (call.h, down, up[:, :-1], bias, kind, *call.plan)),
        ("bias: must be", (call.h, down, up, bias.double(), kind, *call.plan)),
        ("rows: must be", (call.h, *call.pool, call.rows.long(), call.tiles, call.spans)),
        ("tiles: must be", (call.h, *call.pool, call.rows, call.tiles[:, :2], call.spans)),
    ]
    for message, arguments in refused:
        before = arguments[0].clone()
        with pytest.raises(ValueError, match=message):
            INTERVENE_["triton"](*arguments)
        assert torch.equal(arguments[0], before)


def test_an_empty_plan_changes_nothing() -> None:
    call = Call([(0, 4, 0)], 40)
    assert torch.equal(call.forward(), call.h)
    dh, ddown, dup, dbias = call.backward()
    assert torch.equal(dh, call.grad) and not (ddown.any() or dup.any() or dbias.any())
    out = INTERVENE["triton"](call.h[:0], *call.pool, *call.plan, call.offsets)
    assert out.shape == (0, 40)


@pytest.mark.parametrize("norm", [Norm.RMS, Norm.PLUS_ONE | Norm.ROUND, Norm.CENTRED], ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[4]], ids=str)
def test_the_norm_is_that_of_the_edited_rows(dtypes, norm: Norm) -> None:
    call = Call([(2, 3, 3), (7, 20, 17), (27, 66, 1), (0, 0, 2)], 33, dtypes, padding=2)
    h, got, arguments = call.forward_and_norm(norm, shift=bool(norm & Norm.CENTRED))
    assert torch.equal(h, call.forward())
    assert_near(got, normed(h, *arguments), "out")


def test_the_norm_of_a_row_does_not_know_of_edits_tiles_or_addresses() -> None:
    call = Call([(2, 3, 3), (7, 20, 17), (27, 66, 1)], 40, DTYPES[1])
    edited, together, arguments = call.forward_and_norm(Norm.ROUND)
    alone = torch.empty_like(together)
    for row in range(len(edited)):
        idle = Call([(0, 0, 0)], 40, DTYPES[1], rows_of_h=1)
        idle.grad = call.grad
        alone[row] = idle.forward_and_norm(Norm.ROUND, h=edited[row : row + 1].clone())[1]
    assert torch.equal(alone, together)
    storage = torch.zeros(40, 51, dtype=torch.bfloat16, device=DEVICE)
    view = storage[:, 3:43].copy_(call.h)
    assert torch.equal(call.forward_and_norm(Norm.ROUND, h=view)[1], together)
    assert torch.equal(view, edited) and not storage[:, :3].any() and not storage[:, 43:].any()


def test_what_the_norm_would_misread_is_refused() -> None:
    call = Call([(0, 4, 40)], 40, DTYPES[1])
    weight = call.grad[0].clone()
    refused = [
        ("weight: its dtype must be h's .torch.bfloat16.", call.rows, (weight.float(), None, 1e-5, 0)),
        ("shift: must be \\[40\\] to fit h", call.rows, (weight, weight[:-1], 1e-5, 0)),
        ("norm: must be a sum of", call.rows, (weight, None, 1e-5, 8)),
        ("rows, tiles: must name each of the 40 rows", call.rows[:39], (weight, None, 1e-5, 0)),
    ]
    for message, rows, arguments in refused:
        h = call.h.clone()
        with pytest.raises(ValueError, match=message):
            INTERVENE_NORM_["triton"](h, *call.pool, rows, call.tiles, call.spans, *arguments)
        assert torch.equal(h, call.h)
