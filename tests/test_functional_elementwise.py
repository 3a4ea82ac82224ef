"""rk.functional.scale_shift and rk.functional.interchange: formulas, gradients, bad input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from support.cases import DTYPES, same_bits
from support.oracle import UNIT
from support.pools import draw
from torch import Tensor

import reft_kernels as rk
from reft_kernels import functional

ROWS = [[4, 0, 3], None, torch.tensor([1, 5]), []]


@pytest.fixture(autouse=True)
def _on_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that takes `backend` runs on it."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    with rk.backend(name) if name else contextlib.nullcontext():
        yield


def _where(rows, edited: Tensor, flat: Tensor) -> Tensor:
    mask = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    mask[slice(None) if rows is None else rows] = True
    return torch.where(mask[:, None], edited, flat)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", sorted({h for h, _ in DTYPES}, key=str), ids=str)
def test_scale_shift_is_the_formula(backend: str, device: str, dtype: torch.dtype, rows) -> None:
    h, scale, shift = draw(3, (2, 3, 7), (7,), (7,), device=device)
    h, scale[2] = h.to(dtype), 0
    out = functional.scale_shift(h, scale, shift, rows)
    flat = h.double().view(-1, 7)
    want = _where(rows, flat * scale.double() + shift.double(), flat)
    terms = (flat * scale).abs() + shift.abs() + flat.abs()
    assert ((out.double().view(-1, 7) - want).abs() <= (UNIT[dtype] + 8 * UNIT[torch.float32]) * terms).all()
    rest = torch.tensor([row for row in range(6) if rows is not None and row not in list(rows)], dtype=int)
    assert same_bits(out.view(-1, 7)[rest], h.view(-1, 7)[rest])


def test_a_scale_near_one_is_not_swallowed(backend: str, device: str) -> None:
    """In bfloat16 the next number after 1 is 1.0078; a trained scale of 1 + 1e-6 times 1e6 must show."""
    h = torch.full((1, 3), 1.0, device=device)
    out = functional.scale_shift(
        h, torch.full((3,), 1 + 2.0**-20, device=device), torch.zeros(3, device=device)
    )
    assert torch.equal(out, h + 2.0**-20)


@pytest.mark.parametrize("rows", [[4, 0, 3], None], ids=str)
def test_gradients_in_float64(device: str, rows) -> None:
    h, scale, shift, source, R, mask = draw(
        5,
        (2, 3, 4),
        (4,),
        (4,),
        (6 if rows is None else 3, 4),
        (2, 4),
        (2,),
        dtype=torch.float64,
        device=device,
    )
    for tensor in (h, scale, shift, source, R, mask):
        tensor.requires_grad_()
    with rk.backend("reference"):
        assert torch.autograd.gradcheck(lambda *t: functional.scale_shift(*t, rows), (h, scale, shift))
        assert torch.autograd.gradcheck(
            lambda h, source, R, mask: functional.interchange(h, source, R, rows, mask), (h, source, R, mask)
        )
        seen = (source @ R.T).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda *t: functional.interchange(*t, rows), (h, seen, R))


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_interchange_takes_what_lies_along_R_from_the_source(
    dtype, rows, masked: bool, backend: str, device: str
) -> None:
    """With orthonormal R it is the swap itself: R out = R source, and the rest of h stays."""
    if dtype is torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference backend's")
    count = 6 if rows is None else len(rows)
    h, source, square = draw(7, (2, 3, 8), (count, 8), (8, 8), dtype=torch.float64, device=device)
    h, source, R = h.to(dtype), source.to(dtype), torch.linalg.qr(square).Q[:3].to(dtype)
    mask = torch.tensor([1.0, 0.0, 0.25], dtype=dtype, device=device) if masked else None
    out = functional.interchange(h, source, R, rows, mask)
    assert out.shape == h.shape and out.dtype is dtype and out.is_contiguous()
    x, base = h.double().view(-1, 8), R.double()
    index = torch.arange(6) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
    m = torch.ones(3, dtype=torch.float64) if mask is None else mask.double()
    want = x.clone()
    for place, row in enumerate(index.tolist()):
        inside = m * (base @ source[place].double()) + (1 - m) * (base @ x[row])
        want[row] = x[row] - base.T @ (base @ x[row]) + base.T @ inside
    sums = UNIT[torch.float64 if dtype is torch.float64 else torch.float32]
    limit = UNIT[dtype] * want.abs() * 1.01 + 200 * sums
    assert ((out.double().view(-1, 8) - want).abs() <= limit).all()
    rest = [row for row in range(6) if row not in index.tolist()]
    assert same_bits(out.view(-1, 8)[rest], h.view(-1, 8)[rest])
    seen = functional.interchange(h, (source.double() @ base.T).to(torch.float64), R, rows, mask)
    torch.testing.assert_close(seen, out, rtol=2**-6 if dtype is torch.bfloat16 else 1e-5, atol=2**-6)


def test_bad_input_is_refused_by_name(device: str) -> None:
    h, vector, R, source = draw(1, (4, 6), (6,), (2, 6), (4, 6), device=device)
    for message, call in (
        ("scale: must be \\[6\\]", lambda: functional.scale_shift(h, vector[:5], vector)),
        ("shift: must be \\[6\\]", lambda: functional.scale_shift(h, vector, vector[None])),
        ("shift: must be floating", lambda: functional.scale_shift(h, vector, vector.int())),
        ("rows: row 1 is named twice", lambda: functional.scale_shift(h, vector, vector, [1, 1])),
        ("h: must be float64", lambda: functional.scale_shift(h.int(), vector, vector)),
        ("rows: rows must lie in \\[0, 4\\)", lambda: functional.interchange(h, source[:1], R, [4])),
        ("source: must be \\[4, 6\\] or \\[4, 2\\]", lambda: functional.interchange(h, source[:2], R)),
        ("source: must be \\[2, 6\\]", lambda: functional.interchange(h, source, R, [0, 1])),
        ("R: must be", lambda: functional.interchange(h, source, R[:, :5])),
        ("mask: must be \\[2\\]", lambda: functional.interchange(h, source, R, mask=vector)),
        ("R: must be floating", lambda: functional.interchange(h, source, R.int())),
    ):
        before = h.clone()
        with pytest.raises(ValueError, match=message):
            call()
        assert torch.equal(h, before)


def test_many_adapters_take_a_source_for_each_row(backend: str, device: str) -> None:
    """Rows of two adapters of different rank: as interchange by itself, with each one's R."""
    h, square, states = draw(11, (2, 3, 8), (8, 8), (4, 8), device=device)
    R = torch.linalg.qr(square.cpu()).Q.to(device)
    pool, spans = rk.Pool(8, device=device), []
    for basis in (R[:2], R[2:5]):
        kind = torch.zeros(len(basis), dtype=torch.int32)
        spans.append(pool.add(rk.Fold(-basis, basis, torch.zeros(len(basis)), kind)))
    plan = rk.make_plan([(spans[0], [4, 0]), (spans[1], [2, 5])], device)
    source = torch.zeros(4, 3, device=device)
    source[:2, :2], source[2:] = states[:2] @ R[:2].T, states[2:] @ R[2:5].T
    want = functional.interchange(h, states[:2], R[:2], [4, 0])
    want = functional.interchange(want, states[2:], R[2:5], [2, 5])
    leaf = source.requires_grad_()
    out = functional.intervene(h, pool, plan, leaf)
    torch.testing.assert_close(out, want)
    (dsource,) = torch.autograd.grad(out.sum(), leaf)
    torch.testing.assert_close(dsource[3], R[2:5].sum(1))
    edited = h.clone()
    assert functional.intervene_(edited, pool, plan, source.detach()) is edited
    assert same_bits(edited, out)
    scales = rk.ScalePool(8, device=device)
    with pytest.raises(ValueError, match="source: a ScalePool takes none"):
        functional.intervene(h, scales, plan._replace(spans=plan.spans.clone()), source)
    with pytest.raises(ValueError, match="source: must"):
        functional.intervene_(edited, pool, plan, source.detach()[:3])
