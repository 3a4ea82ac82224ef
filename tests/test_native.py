"""The native CPU kernels: what the suite in tests/ops, which runs every backend, can't see.

Every instruction set that this machine has runs in a process of its own (it is chosen once), as
`python tests/test_native.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import reft_kernels as rk
from reft_kernels.ops import native
from reft_kernels.ops.schema import (
    INTERVENE,
    INTERVENE_,
    INTERVENE_BACKWARD,
    INTERVENE_NORM_,
    NO_PRODUCT,
    TILE,
    Norm,
)

pytestmark = pytest.mark.skipif(native.cpu_missing is not None, reason=str(native.cpu_missing))

LEVELS = ("avx512_bf16", "avx512", "avx2", "scalar")
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def make_pool(rank: int, d: int, dtype: torch.dtype, mixed: bool = True):
    """down, up, bias, kind; with `mixed`, all activations and some rows without a product."""
    down = (torch.randn(rank, d) / d**0.5).to(dtype)
    up = (torch.randn(rank, d) / max(rank, 1) ** 0.5).to(dtype)
    kind = torch.arange(rank, dtype=torch.int32) % 9
    kind[torch.arange(rank) % 5 == 3] |= NO_PRODUCT
    return down, up, torch.randn(rank), kind if mixed else torch.zeros_like(kind)


def make_case(ranks: list[int], counts: list[int], total: int):
    """A plan whose segments take consecutive pool ranges and shuffled rows of `total`."""
    order = torch.randperm(total).split([*counts, total - sum(counts)])
    firsts = [sum(ranks[:i]) for i in range(len(ranks))]
    return rk.make_plan([(rk.Span(f, r), rows) for f, r, rows in zip(firsts, ranks, order)], total_rows=total)


def arguments(pool, plan) -> tuple[torch.Tensor, ...]:
    return (*pool, plan.rows, plan.tiles, plan.spans)


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within the rounding of the dtype and of fp32 sums, on the scale of the largest number."""
    scale = expected.double().abs().max().item() + 1e-6
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    limit = (torch.finfo(expected.dtype).eps + 1e-5) * scale
    assert error <= limit, f"{what}: off by {error:.3g}, allowed {limit:.3g}"


def compare(dtype: torch.dtype, pool_dtype: torch.dtype, d: int) -> None:
    """All three ops against the reference backend: mixed ranks, 0 and 200 among them, padded tiles."""
    ranks, counts, total = [1, 3, 4, 0, 9, 200], [1, 20, 5, 3, 33, 7], 97
    plan = make_case(ranks, counts, total)
    rows = plan.rows.clone()
    rows[[3, 24, 65]] = -1
    plan = plan._replace(rows=rows, tiles=torch.cat([plan.tiles, torch.zeros(2, 3, dtype=torch.int32)]))
    pool = make_pool(sum(ranks), d, pool_dtype)
    h = torch.randn(total, d).to(dtype)
    what = f"{dtype}, pool {pool_dtype}, d={d}"
    expected = h.clone()
    INTERVENE_["reference"](expected, *arguments(pool, plan))
    actual = h.clone()
    INTERVENE_["native"](actual, *arguments(pool, plan))
    close(actual, expected, what)
    assert torch.equal(INTERVENE["native"](h, *arguments(pool, plan), plan.offsets), actual)
    grad, hs = torch.randn(total, d).to(dtype), h[plan.rows.long()]
    inputs = (grad, hs, *arguments(pool, plan), plan.offsets, True, True)
    names = ("dh", "ddown", "dup", "dbias")
    for name, mine, theirs in zip(
        names, INTERVENE_BACKWARD["native"](*inputs), INTERVENE_BACKWARD["reference"](*inputs)
    ):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        close(mine, theirs, f"{name}: {what}")


def compare_norms(dtype: torch.dtype, d: int) -> None:
    """Every norm against the reference backend, with the edit of some rows and alone in their h."""
    total, pool = TILE + 3, make_pool(3, d, dtype)
    plan = rk.make_plan([(rk.Span(0, 3), [2, 5])], total_rows=total, cover=True)
    alone = rk.make_plan([], total_rows=1, cover=True)
    h, (weight, shift) = torch.randn(total, d).to(dtype) * 3 + 1, torch.randn(2, d).to(dtype)
    edited = h.clone()
    INTERVENE_["native"](edited, *arguments(pool, plan))
    for norm in range(1 + sum(Norm)):
        for last in (None, shift):
            rest, what = (weight, last, 1e-5, norm), f"norm {norm}, {dtype}, d={d}"
            mine, theirs = h.clone(), edited.double()
            out = INTERVENE_NORM_["native"](mine, *arguments(pool, plan), *rest)
            assert torch.equal(mine, edited), what
            wide = (weight.double(), None if last is None else last.double(), 1e-5, norm & ~Norm.ROUND)
            idle = rk.make_plan([], total_rows=total, cover=True)
            expected = INTERVENE_NORM_["reference"](theirs, *arguments(pool, idle), *wide)
            close(out, expected.to(dtype), what)
            for row in (2, 7):
                one = INTERVENE_NORM_["native"](edited[[row]], *arguments(pool, alone), *rest)
                assert torch.equal(one[0], out[row]), what


def rows_stand_alone(dtype: torch.dtype, pool_dtype: torch.dtype, d: int) -> None:
    """A row's bits are the same alone, in tiles of every size, and in any order; so is its gradient's."""
    rank, total = 7, 2 * TILE + 3
    pool = make_pool(rank, d, pool_dtype)
    h, grad = torch.randn(total, d).to(dtype), torch.randn(total, d).to(dtype)
    expected, expected_grad = [], []
    for size in (1, 2, 3, 5, TILE, total):
        order = torch.arange(total) if size == 1 else torch.randperm(total)
        actual, actual_grad = h.clone(), grad.clone()
        for rows in order.split(size):
            plan = rk.make_plan([(rk.Span(0, rank), rows)])
            INTERVENE_["native"](actual, *arguments(pool, plan))
            dh, *_ = INTERVENE_BACKWARD["native"](
                grad, h[plan.rows.long()], *arguments(pool, plan), plan.offsets, True, False
            )
            actual_grad[rows] = dh[rows]
        expected.append(actual)
        expected_grad.append(actual_grad)
    for outcomes in (expected, expected_grad):
        assert all(torch.equal(outcomes[0], other) for other in outcomes[1:])


def undefined_rows_stand_alone(dtype: torch.dtype, pool_dtype: torch.dtype, d: int) -> None:
    """NaN of any sign and payload, and Inf, in rows and gradients: the same bits whatever is beside them."""
    rank, total = 6, 2 * TILE + 3
    pool = make_pool(rank, d, pool_dtype)
    h, grad = torch.randn(2, total, d).to(dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    size = torch.iinfo(bits)
    infinity = torch.tensor(float("inf"), dtype=dtype).view(bits).item()
    payloads = torch.randint(infinity + 1, size.max, (2, total, d)).to(bits)
    payloads[:, ::2] |= size.min  # a sign
    hit = torch.rand(2, total, d) < 0.5 * torch.rand(2, total, 1) ** 4
    for values, payload, where in zip((h, grad), payloads, hit):
        values.view(bits)[where] = payload[where]
        values[torch.rand(total, d) < 0.5 / d] = float("inf")
        values[torch.rand(total, d) < 0.5 / d] = -float("inf")
    outcomes = []
    for tile in (1, 2, 3, 5, TILE, total):
        edited, gradient = h.clone(), grad.clone()
        for rows in torch.randperm(total).split(tile):
            plan = rk.make_plan([(rk.Span(0, rank), rows)])
            INTERVENE_["native"](edited, *arguments(pool, plan))
            saved = (grad, h[plan.rows.long()], *arguments(pool, plan), plan.offsets, True, False)
            gradient[rows] = INTERVENE_BACKWARD["native"](*saved)[0][rows]
        outcomes.append((edited, gradient))
    # What is NaN is so by the formula, too.
    expected = h.clone()
    INTERVENE_["reference"](expected, *arguments(pool, rk.make_plan([(rk.Span(0, rank), range(total))])))
    assert torch.equal(outcomes[0][0].isnan(), expected.isnan())
    for other in outcomes[1:]:
        for one, same in zip(outcomes[0], other):
            assert torch.equal(one.view(bits), same.view(bits)), f"{dtype}, pool {pool_dtype}, d={d}"


def conversions(dtype: torch.dtype, keeps_subnormals: bool) -> None:
    """Every bit pattern is read right, and numbers are rounded as torch rounds them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    if not keeps_subnormals:
        every = torch.where(every.float().abs() < torch.finfo(dtype).tiny, 0, every.float()).to(dtype)
    one = torch.zeros(1)
    kind = torch.tensor([NO_PRODUCT], dtype=torch.int32)
    plan = rk.make_plan([(rk.Span(0, 1), [0])])
    wide = torch.cat([torch.randn(4096) * 10.0**e for e in range(-9, 6)])
    special = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), 65519.0, 65520.0, 1e38, 3.4e38, 1e-7, 0.0]
    )
    wide = torch.cat([wide, special]).view(1, -1)
    for pool_dtype in (dtype, torch.float32):
        up = torch.zeros_like(every).to(pool_dtype)
        h = every.clone()
        INTERVENE_["native"](h, up, up, one, kind, plan.rows, plan.tiles, plan.spans)
        torch.testing.assert_close(h, every, rtol=0, atol=0, equal_nan=True)
        up = wide.to(pool_dtype)
        h = torch.randn_like(wide).to(dtype)
        expected = (h.float() + up.float()).to(dtype)
        INTERVENE_["native"](h, up, up, one + 1, kind, plan.rows, plan.tiles, plan.spans)
        torch.testing.assert_close(h, expected, rtol=0, atol=0, equal_nan=True)


def check_level() -> None:
    """Everything above, on the instruction set that this process has chosen."""
    torch.manual_seed(0)
    level = native.cpu_isa()
    for dtype, pool_dtype in DTYPES:
        for d in (1, 3, 8, 17, 40, 64, 100, 333):
            compare(dtype, pool_dtype, d)
        for d in (5, 128, 331):
            rows_stand_alone(dtype, pool_dtype, d)
            undefined_rows_stand_alone(dtype, pool_dtype, d)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for d in (1, 3, 8, 17, 64, 100, 333):
            compare_norms(dtype, d)
    conversions(torch.bfloat16, keeps_subnormals=level != "avx512_bf16")
    conversions(torch.float16, keeps_subnormals=True)
    print(level)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    environment = {**os.environ, "REFT_KERNELS_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    if "this machine has no" in done.stderr or "on this architecture" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == level


def test_an_unknown_instruction_set_is_refused():
    code = "from reft_kernels.ops import native; native.cpu_isa()"
    environment = {**os.environ, "REFT_KERNELS_CPU_ISA": "sse9"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "REFT_KERNELS_CPU_ISA: must be" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_unaligned_rows(dtype):
    d, total = 67, 40
    plan, pool = make_case([5, 2], [17, 9], total), make_pool(7, d, dtype)
    storage = torch.randn(3 + total * (d + 6)).to(dtype)
    before = storage.clone()
    h = storage[3:].view(total, d + 6)[:, 1 : 1 + d]  # an odd offset, a row stride larger than d
    expected = h.contiguous()
    INTERVENE_["native"](expected, *arguments(pool, plan))
    INTERVENE_["native"](h, *arguments(pool, plan))
    assert torch.equal(h, expected)
    between = torch.ones_like(storage, dtype=torch.bool)
    between[3:].view(total, d + 6)[:, 1 : 1 + d] = False
    assert torch.equal(storage[between], before[between])
    # Out of place and backward, any strides will do.
    start = before[3:].view(total, d + 6)[:, 1 : 1 + d]
    slanted = start.T.contiguous().T
    assert torch.equal(INTERVENE["native"](slanted, *arguments(pool, plan), plan.offsets), expected)
    rest = (start[plan.rows.long()], *arguments(pool, plan), plan.offsets, True, True)
    flat = INTERVENE_BACKWARD["native"](torch.ones(total, d, dtype=dtype), *rest)
    expanded = INTERVENE_BACKWARD["native"](torch.ones((), dtype=dtype).expand(total, d), *rest)
    assert all(torch.equal(a, b) for a, b in zip(flat, expanded))


def test_leading_dimensions_that_collapse_and_ones_that_do_not():
    plan, pool = make_case([2], [6], 6), make_pool(2, 8, torch.float32)
    h = torch.randn(2, 3, 8)
    expected = h.view(6, 8).clone()
    INTERVENE_["native"](expected, *arguments(pool, plan))
    INTERVENE_["native"](h, *arguments(pool, plan))
    assert torch.equal(h.view(6, 8), expected)
    for bad, message in (
        (torch.randn(3, 2, 8).transpose(0, 1), "collapse to rows with one stride"),
        (torch.randn(6, 16)[:, ::2], "last dimension must be contiguous"),
        (torch.randn(1, 8).expand(6, 8), "rows overlap in memory"),
        (torch.randn(13).as_strided((6, 8), (1, 1)), "rows overlap in memory"),
    ):
        with pytest.raises(RuntimeError, match=message):
            INTERVENE_["native"](bad, *arguments(pool, plan))


def test_shared_and_overlapping_spans_add_up():
    """An adapter at two position groups, and a subspace of its range, in one backward."""
    d, total = 300, 60
    pool = make_pool(6, d, torch.bfloat16)
    spans = [rk.Span(0, 4), rk.Span(0, 4), rk.Span(2, 4), rk.Span(3, 1)]
    plan = rk.make_plan(list(zip(spans, torch.randperm(total).split(15))))
    grad, hs = torch.randn(2, total, d).bfloat16()
    whole = INTERVENE_BACKWARD["native"](grad, hs, *arguments(pool, plan), plan.offsets, True, True)
    parts = [
        torch.zeros(6, d, dtype=torch.float64),
        torch.zeros(6, d, dtype=torch.float64),
        torch.zeros(6).double(),
    ]
    wide = (*(t.double() for t in pool[:3]), pool[3])
    for segment, rows in enumerate(plan.rows.view(4, 15)):
        alone = rk.make_plan([(spans[segment], rows)])
        mine = hs[15 * segment : 15 * segment + 15].double()
        sums = INTERVENE_BACKWARD["reference"](
            grad.double(), mine, *arguments(wide, alone), alone.offsets, False, True
        )
        for total_sum, part in zip(parts, sums[1:]):
            total_sum += part
    for name, mine, expected in zip(("ddown", "dup", "dbias"), whole[1:], parts):
        close(mine, expected.to(mine.dtype), name)


def test_thread_counts_give_the_same_bits():
    d, total = 512, 1200
    plan, pool = make_case([8, 8, 3], [500, 100, 500], total), make_pool(19, d, torch.float32)
    h, grad = torch.randn(2, total, d)
    outcomes = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            edited = INTERVENE["native"](h, *arguments(pool, plan), plan.offsets)
            hs = h[plan.rows.long()]
            gradients = INTERVENE_BACKWARD["native"](
                grad, hs, *arguments(pool, plan), plan.offsets, True, True
            )
            outcomes.append((edited, *gradients))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_indices_beyond_two_to_the_31():
    """The last rows of an h and of a pool with more than 2³¹ elements (never touched elsewhere)."""
    d, rank = 4096, 2
    rows = 2**31 // d + 8
    try:
        h, down, up = (torch.empty(rows, d, dtype=torch.bfloat16) for _ in range(3))
    except RuntimeError:
        pytest.skip("no address space for three tensors of 4.3 GB")
    pool = make_pool(rank, d, torch.bfloat16, mixed=False)
    down[-rank:], up[-rank:] = pool[0], pool[1]
    bias, kind = torch.zeros(rows), torch.zeros(rows, dtype=torch.int32)
    bias[-rank:] = pool[2]
    h[-3:] = torch.randn(3, d).bfloat16()
    expected = h[-3:].clone()
    INTERVENE_["native"](expected, *arguments(pool, rk.make_plan([(rk.Span(0, rank), [0, 2])])))
    plan = rk.make_plan([(rk.Span(rows - rank, rank), [rows - 3, rows - 1])])
    INTERVENE_["native"](h, down, up, bias, kind, plan.rows, plan.tiles, plan.spans)
    assert torch.equal(h[-3:], expected)


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "h float64": (
        {"h": torch.zeros(4, 8, dtype=torch.float64)},
        "h: dtype.*the reference backend takes Double",
    ),
    "h scalar": ({"h": torch.tensor(1.0)}, "h: must be"),
    "down width": ({"down": torch.zeros(5, 7)}, "down: must have 2 dimensions and a last one of 8"),
    "down dtype": ({"down": torch.zeros(5, 8, dtype=torch.float16)}, "down: dtype must be h's or Float"),
    "down strides": ({"down": torch.zeros(8, 5).T}, "down: must be contiguous"),
    "up rows": ({"up": torch.zeros(4, 8)}, "up: must have the shape of down"),
    "up dtype": ({"up": torch.zeros(5, 8, dtype=torch.float16)}, "up: dtype must be Float"),
    "bias length": ({"bias": torch.zeros(4)}, "bias: must have 1 dimension and a last one of 5"),
    "bias dtype": ({"bias": torch.zeros(5).double()}, "bias: dtype must be Float"),
    "kind dtype": ({"kind": torch.zeros(5)}, "kind: dtype must be Int"),
    "rows dtype": ({"rows": torch.arange(3)}, "rows: dtype must be Int"),
    "rows range": ({"rows": ints(0, 1, 4)}, "rows: must be less than 4"),
    "tiles shape": (
        {"tiles": torch.zeros(2, 2, dtype=torch.int32)},
        "tiles: must have 2 dimensions and a last one of 3",
    ),
    "tile count": ({"tiles": ints([0, 0, TILE + 1])}, "tiles: tile 0 has a count of 17"),
    "tile count negative": ({"tiles": ints([0, 0, -1])}, "tiles: tile 0 has a count of -1"),
    "tile segment": ({"tiles": ints([2, 0, 1])}, "tiles: tile 0 names segment 2 of 2"),
    "tile segment negative": ({"tiles": ints([-2, 0, 1])}, "tiles: tile 0 names segment -2 of 2"),
    "tile start": ({"tiles": ints([0, 2, 2])}, r"tiles: tile 0 takes rows \[2, 4\) of a plan of 3"),
    "tile start negative": ({"tiles": ints([0, -1, 2])}, "tiles: tile 0 takes rows"),
    "span end": (
        {"spans": ints([0, 2], [4, 2])},
        r"spans: segment 1 takes pool rows \[4, 6\), the pool has 5",
    ),
    "span start": ({"spans": ints([-1, 2], [2, 2])}, "spans: segment 0 takes pool rows"),
    "span rank": ({"spans": ints([0, -2], [2, 2])}, "spans: segment 0 takes pool rows"),
    "spans shape": ({"spans": ints(0, 2)}, "spans: must have 2 dimensions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_before_anything_is_written(name):
    changes, message = BAD[name]
    pool = dict(zip(("down", "up", "bias", "kind"), make_pool(5, 8, torch.float32)))
    plan = {"rows": ints(0, 2, 3), "tiles": ints([0, 0, 1], [1, 1, 2]), "spans": ints([0, 2], [2, 2])}
    case = {"h": torch.randn(4, 8), **pool, **plan, **changes}
    before = case["h"].clone()
    with pytest.raises(RuntimeError, match=message):
        INTERVENE_["native"](*case.values())
    assert torch.equal(case["h"], before)
    with pytest.raises(RuntimeError, match=message):
        INTERVENE["native"](*case.values(), ints(0, 1, 3))


def test_backward_refuses_saved_rows_that_do_not_fit():
    plan, pool = make_case([2], [6], 6), make_pool(2, 8, torch.float32)
    rest = (*arguments(pool, plan), plan.offsets, True, True)
    with pytest.raises(RuntimeError, match=r"hs: must be \[n, d\] = \[6, 8\]"):
        INTERVENE_BACKWARD["native"](torch.zeros(6, 8), torch.zeros(5, 8), *rest)
    with pytest.raises(RuntimeError, match="hs: must have grad's dtype"):
        INTERVENE_BACKWARD["native"](torch.zeros(6, 8), torch.zeros(6, 8).half(), *rest)


def test_h_that_shares_memory_with_the_pool_is_refused():
    storage = torch.randn(10, 8)
    h, down = storage[:6], storage[5:7]
    _, up, bias, kind = make_pool(2, 8, torch.float32)
    plan = rk.make_plan([(rk.Span(0, 2), [0, 1])])
    with pytest.raises(RuntimeError, match="h: shares memory with down"):
        INTERVENE_["native"](h, down, up, bias, kind, plan.rows, plan.tiles, plan.spans)
    INTERVENE_["native"](storage[:5], down, up, bias, kind, plan.rows, plan.tiles, plan.spans)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,), (2, 0, 8)])
def test_nothing_to_do(shape):
    """No rows, no width, no tiles, no rank, an empty pool: nothing is written, nothing fails."""
    h = torch.randn(shape)
    for pool_rows, plan in ((0, rk.make_plan([])), (3, rk.make_plan([(rk.Span(0, 0), [])]))):
        pool = make_pool(pool_rows, shape[-1], torch.float32)
        assert INTERVENE_["native"](h, *arguments(pool, plan)) is None
        assert INTERVENE["native"](h, *arguments(pool, plan), plan.offsets).shape == h.shape
        hs = torch.zeros(0, shape[-1])
        dh, ddown, dup, dbias = INTERVENE_BACKWARD["native"](
            h, hs, *arguments(pool, plan), plan.offsets, True, True
        )
        assert torch.equal(dh, h) and not any(t.any() for t in (ddown, dup, dbias))


def test_what_backward_need_not_give_has_no_elements():
    plan, pool = make_case([2], [6], 6), make_pool(2, 8, torch.float32)
    grad, hs = torch.randn(2, 6, 8)
    inputs = (grad, hs, *arguments(pool, plan), plan.offsets)
    both = INTERVENE_BACKWARD["native"](*inputs, True, True)
    only_h = INTERVENE_BACKWARD["native"](*inputs, True, False)
    only_pool = INTERVENE_BACKWARD["native"](*inputs, False, True)
    assert torch.equal(only_h[0], both[0]) and [t.numel() for t in only_h[1:]] == [0, 0, 0]
    assert only_pool[0].numel() == 0 and all(torch.equal(a, b) for a, b in zip(only_pool[1:], both[1:]))


if __name__ == "__main__":
    check_level()
