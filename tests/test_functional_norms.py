"""rk.functional.keep_norm, row_norms and restore_norms_: around edits, gradients, bad input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from support.cases import DTYPES, same_bits
from support.oracle import UNIT
from support.pools import draw

import reft_kernels as rk
from reft_kernels import functional

ROWS = [[4, 0, 3], None, torch.tensor([1, 5]), []]


@pytest.fixture(autouse=True)
def _on_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that takes `backend` runs on it."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    with rk.backend(name) if name else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", sorted({h for h, _ in DTYPES}, key=str), ids=str)
def test_edited_rows_have_their_old_norm(backend: str, device: str, dtype: torch.dtype, rows) -> None:
    h, R, W, b = draw(3, (2, 3, 7), (2, 7), (2, 7), (2,), device=device)
    h = h.to(dtype)
    edited = functional.loreft(h, R, W, b, rows)
    out = functional.keep_norm(edited, h, rows)
    x, y, flat = (t.double().view(-1, 7) for t in (h, edited, out))
    index = torch.arange(6) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
    want = y.clone()
    want[index] = (y * (x.norm(dim=-1) / y.norm(dim=-1))[:, None])[index]
    assert ((flat - want).abs() <= (UNIT[dtype] + 8 * UNIT[torch.float32]) * want.abs()).all()
    rest = [row for row in range(6) if row not in index.tolist()]
    assert same_bits(out.view(-1, 7)[rest], edited.view(-1, 7)[rest])


@pytest.mark.parametrize("rows", [[4, 0, 3], None], ids=str)
def test_gradients_in_float64(device: str, rows) -> None:
    h, edited, v = draw(5, (2, 3, 4), (2, 3, 4), (4,), dtype=torch.float64, device=device)
    for tensor in (h, edited, v):
        tensor.requires_grad_()
    with rk.backend("reference"):
        assert torch.autograd.gradcheck(lambda *t: functional.keep_norm(*t, rows), (edited, h))
        assert torch.autograd.gradcheck(lambda h, v: functional.keep_norm(h + v, h, rows), (h, v))


def test_an_edit_of_nothing_has_a_gradient(backend: str, device: str) -> None:
    """A vector begins as 0, where no row is scaled: what is trained is still the direction."""
    (h,) = draw(5, (3, 6), device=device)
    v = torch.zeros(6, device=device, requires_grad=True)
    out = functional.keep_norm(h + v, h)
    assert torch.equal(out, h)
    (dv,) = torch.autograd.grad(out[:, 0].sum(), v)
    x = h.double()
    want = torch.eye(6, dtype=torch.float64, device=device)[0] - x * (x[:, :1] / x.square().sum(-1, True))
    torch.testing.assert_close(dv.double(), want.sum(0), rtol=1e-5, atol=1e-5)


def test_by_a_plan_only_segments_with_a_rank_keep_their_norm(backend: str, device: str) -> None:
    (h, v) = draw(9, (5, 8), (1, 8), device=device)
    pool = rk.Pool(8, device=device)
    kind = torch.full((1,), rk.ops.NO_PRODUCT, dtype=torch.int32)
    span = pool.add(rk.Fold(torch.zeros(1, 8), v, torch.ones(1), kind))
    keeping = rk.make_plan([(span, [3, 0]), (rk.Span(0, 0), [1])], device)
    edits = rk.make_plan([(span, [3, 0, 1])], device)
    before = h.clone()
    norms = functional.row_norms(h, keeping)
    functional.intervene_(h, pool, edits)
    assert functional.restore_norms_(h, norms, keeping) is h
    torch.testing.assert_close(h[[3, 0]].norm(dim=-1), before[[3, 0]].norm(dim=-1))
    assert same_bits(h[[2, 4]], before[[2, 4]])
    assert torch.equal(h[1], functional.intervene(before, pool, edits)[1])
    assert same_bits(
        h[[3, 0]], functional.keep_norm(functional.intervene(before, pool, edits), before)[[3, 0]]
    )


def test_bad_input_is_refused_by_name(backend: str, device: str) -> None:
    h, other = draw(1, (4, 6), (5, 6), device=device)
    plan = rk.make_plan([(rk.Span(0, 1), [0, 2])], device)
    norms = functional.row_norms(h, plan)
    leaf = h.clone().requires_grad_()
    for message, call in (
        ("edited: must be \\[4, 6\\]", lambda: functional.keep_norm(other, h)),
        ("edited: must be", lambda: functional.keep_norm(h.double(), h)),
        ("h: must be float64", lambda: functional.keep_norm(h.int(), h.int())),
        ("rows: row 1 is named twice", lambda: functional.keep_norm(h, h, [1, 1])),
        ("rows: rows must lie in", lambda: functional.keep_norm(h, h, [4])),
        ("plan: must be a Plan", lambda: functional.row_norms(h, plan[:-1])),
        ("h: must be float64", lambda: functional.row_norms(h.int(), plan)),
        ("norms: ", lambda: functional.restore_norms_(h, norms[:1], plan)),
        ("norms: ", lambda: functional.restore_norms_(h, norms.half(), plan)),
        ("h: requires a gradient", lambda: functional.restore_norms_(leaf, norms, plan)),
        ("h: its last dimension", lambda: functional.restore_norms_(h.T, norms, plan)),
    ):
        before = h.clone()
        with pytest.raises(ValueError, match=message):
            call()
        assert torch.equal(h, before)
