"""rk.functional: one adapter, many adapters, and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import DTYPES, same_bits
from support.oracle import UNIT
from support.pools import draw, plan_of, pool_and_plan
from torch import Tensor

import reft_kernels as rk
from reft_kernels import functional
from reft_kernels.ops import InterveneInPlace, Norm


def formula(h: Tensor, R: Tensor, W: Tensor, b: Tensor, rows: list[int] | None = None) -> Tensor:
    """h + Rᵀ(W h + b − R h), as the paper has it, on some of the rows."""
    flat = h.reshape(-1, h.shape[-1])
    edited = flat + (flat @ W.T + b - flat @ R.T) @ R
    if rows is not None:
        mask = torch.zeros(len(flat), dtype=torch.bool, device=h.device)
        mask[rows] = True
        edited = torch.where(mask[:, None], edited, flat)
    return edited.reshape(h.shape)


shapes = st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4), (0,), (3, 0)])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_loreft_is_the_papers_formula(backend: str, device: str, dtypes: tuple) -> None:
    dtype, weights = dtypes

    @given(shapes, st.integers(1, 5), st.integers(1, 20), st.booleans(), st.integers(0, 99))
    def holds(lead: tuple, r: int, d: int, every: bool, seed: int) -> None:
        (h,) = draw(seed, (*lead, d), dtype=dtype, device=device)
        R, W = draw(seed + 1, (r, d), (r, d), dtype=weights, device=device)
        (b,) = draw(seed + 2, (r,), dtype=weights, device=device)
        rows = None if every else list(range(h.numel() // d))[::-2]
        with rk.backend(backend):
            out = functional.loreft(h, R, W, b, rows)
        h64, R64, W64, b64 = (t.double() for t in (h, R, W, b))
        # W − R is rounded once to the weights' dtype.
        size = formula(h64.abs(), -R64.abs(), 2 * W64.abs() + R64.abs(), b64.abs())
        limit = (UNIT[dtype] * 2 + UNIT[weights] * 2 + 2.0**-24 * (d + 8)) * (size.abs() + 1) * (1 + r)
        assert out.shape == h.shape and out.dtype == dtype
        assert ((out.double() - formula(h64, R64, W64, b64, rows)).abs() <= limit).all()
        untouched = sorted(set(range(h.numel() // d)) - set(range(h.numel() // d) if every else rows))
        assert same_bits(out.reshape(-1, d)[untouched], h.reshape(-1, d)[untouched])

    holds()


@pytest.mark.parametrize("rows", [None, [4, 0, 3], []], ids=str)
@pytest.mark.parametrize("needed", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 1)], ids=str)
def test_loreft_passes_gradcheck(rows: list[int] | None, needed: tuple) -> None:
    leaves = draw(0, (2, 3, 7), (3, 7), (3, 7), (3,), dtype=torch.float64)
    leaves = [leaf.requires_grad_(bool(need)) for leaf, need in zip(leaves, needed)]
    with rk.backend("reference"):
        assert torch.autograd.gradcheck(lambda *t: functional.loreft(*t, rows), leaves)


@pytest.mark.parametrize("rows", [None, [4, 0, 3]], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_loreft_gradients_in_lower_precision(backend: str, device: str, dtypes: tuple, rows) -> None:
    """Against float64 autograd of the paper's formula."""
    dtype, weights = dtypes
    h, grad = draw(1, (2, 5, 40), (2, 5, 40), dtype=dtype, device=device)
    leaves = [h, *draw(2, (4, 40), (4, 40), (4,), dtype=weights, device=device)]
    leaves[1:3] = [t / 40**0.5 for t in leaves[1:3]]
    leaves = [t.requires_grad_() for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    with rk.backend(backend):
        mine = torch.autograd.grad(functional.loreft(*leaves, rows), leaves, grad)
    theirs = torch.autograd.grad(formula(*wide, rows), wide, grad.double())
    unit = max(UNIT[dtype], UNIT[weights])
    for name, it, truth in zip(("h", "R", "W", "b"), mine, theirs):
        assert it.dtype == (dtype if name == "h" else weights)
        error = (it.double() - truth).norm() / truth.norm()
        assert error <= 4 * unit + 1e-6, f"{name}: {error:.2e}"


def _by_hand(h: Tensor, pool: rk.Pool) -> Tensor:
    out = h.double().clone()
    for rows, span in (([1, 5], slice(0, 2)), ([0], slice(2, 5))):
        x, down, up = h.double()[rows], pool.down[span].double(), pool.up[span].double()
        out[rows] = x + (x @ down.T + pool.bias[span].double()) @ up
    return out


def test_intervene_and_intervene_in_place(backend: str, device: str) -> None:
    pool, plan = pool_and_plan(device)
    (h,) = draw(0, (6, 8), device=device)
    before = h.clone()
    with rk.backend(backend):
        out = functional.intervene(h, pool, plan)
        assert same_bits(h, before)
        assert functional.intervene_(h, pool, plan) is h
    assert same_bits(out, h)
    torch.testing.assert_close(out.double(), _by_hand(before, pool), rtol=1e-6, atol=1e-5)


def test_a_plan_that_covers_edits_the_same_forward_and_backward(backend: str, device: str) -> None:
    """Tiles of segment −1 edit nothing: what stands before the spans table is not a span of theirs."""
    pool, plan = pool_and_plan(device)
    cover = plan_of(device, cover=True)
    before = cover.spans.new_tensor([[0, 2]])
    cover = cover._replace(spans=torch.cat([before, cover.spans])[1:])
    h, grad = draw(0, (6, 8), (6, 8), device=device)
    found = []
    with rk.backend(backend):
        for one in (plan, cover):
            leaf = h.clone().requires_grad_()
            out = functional.intervene(leaf, pool, one)
            found.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
    for plain, covered in zip(*found):
        assert same_bits(plain, covered)


@pytest.mark.parametrize("norm", [Norm.RMS, Norm.CENTRED | Norm.ROUND], ids=str)
def test_intervene_norm_is_the_edit_and_the_norm(backend: str, device: str, norm: Norm) -> None:
    pool, plan = pool_and_plan(device, cover=True)
    (h,), (weight, shift) = draw(0, (6, 8), device=device), draw(1, (8,), (8,), device=device)
    edited = h.clone()
    with rk.backend(backend):
        functional.intervene_(edited, pool, plan_of(device))
        plain = functional.intervene_norm_(
            edited, pool, rk.make_plan([], device, 6, cover=True), weight, norm=norm
        )
        out = functional.intervene_norm_(h, pool, plan, weight, shift, 1e-3, norm)
    assert same_bits(h, edited) and out.is_contiguous()
    x = edited.double() - (edited.double().mean(-1, keepdim=True) if norm & Norm.CENTRED else 0)
    for it, eps, last in ((plain, 1e-6, 0), (out, 1e-3, shift.double())):
        expected = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double() + last
        torch.testing.assert_close(it.double(), expected, rtol=1e-6, atol=1e-6)


def test_intervene_is_differentiable_in_h_only(backend: str, device: str) -> None:
    pool, plan = pool_and_plan(device)
    (h,) = draw(0, (6, 8), device=device)
    h.requires_grad_()
    wide = h.detach().double().requires_grad_()
    with rk.backend(backend):
        functional.intervene(h, pool, plan).square().sum().backward()
    flat = wide.unbind()
    parts = {1: slice(0, 2), 5: slice(0, 2), 0: slice(2, 5)}
    edited = [
        x + (pool.down[parts[i]].double() @ x + pool.bias[parts[i]].double()) @ pool.up[parts[i]].double()
        if i in parts
        else x
        for i, x in enumerate(flat)
    ]
    torch.stack(edited).square().sum().backward()
    torch.testing.assert_close(h.grad.double(), wide.grad, rtol=1e-5, atol=1e-4)
    assert not any(t.requires_grad for t in (pool.down, pool.up, pool.bias))


def test_intervene_passes_gradcheck_with_activations() -> None:
    """h and every tensor of the pool, through the in-place function too."""
    pool, plan = pool_and_plan(dtype=torch.float64)
    kind = torch.tensor([0, 2, 4 | 0x100, 6, 7, 0, 0, 0], dtype=torch.int32)
    leaves = [
        t.requires_grad_() for t in (*draw(0, (6, 8), dtype=torch.float64), pool.down, pool.up, pool.bias)
    ]
    args = (kind, *plan[:3], plan.offsets)

    def in_place(h: Tensor, *rest: Tensor) -> Tensor:
        return InterveneInPlace.apply(h * 1.5, *rest, *args, "reference")

    def out_of_place(h: Tensor, *rest: Tensor) -> Tensor:
        return torch.ops.reft_kernels.intervene.reference(h, *rest, *args)

    for function in (in_place, out_of_place):
        assert torch.autograd.gradcheck(function, leaves)


def test_loreft_takes_parameters_of_any_strides(backend: str, device: str) -> None:
    (h,), (R, W), (b,) = (
        draw(s, *shapes, device=device) for s, shapes in enumerate((((6, 8),), ((8, 2),) * 2, ((4,),)))
    )
    with rk.backend(backend):
        strided = functional.loreft(h, R.T, W.T, b[::2])
        plain = functional.loreft(h, R.T.contiguous(), W.T.contiguous(), b[::2].contiguous())
    assert same_bits(strided, plain)
