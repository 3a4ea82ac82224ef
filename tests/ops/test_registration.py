"""The ops as torch knows them: schemas, fakes, autograd, and torch.compile around them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.calls import backward, gathered, gradient_like, norm_of
from support.cases import USUAL, Case, Spec, build, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

import reft_kernels as rk
from reft_kernels.ops import INTERVENE, INTERVENE_, INTERVENE_BACKWARD, INTERVENE_NORM_, Norm
from reft_kernels.plan import Plan, make_plan
from reft_kernels.pool import Fold, Pool

SPECS = {
    "float32": USUAL,
    "strided bfloat16": dataclasses.replace(
        USUAL, dtypes=(torch.bfloat16, torch.bfloat16), row_pad=8, ragged=True
    ),
    "float16, float32 pool": dataclasses.replace(USUAL, dtypes=(torch.float16, torch.float32)),
    "no rows": dataclasses.replace(USUAL, lead=(0,), count=0),
    "no segments": dataclasses.replace(USUAL, ranks=(), gaps=(), shared=()),
}


def _finite(spec: Spec, device: str) -> Case:
    """opcheck compares values, and NaN is not equal to itself."""
    case = build(spec, device)
    for tensor in (case.storage, case.down, case.up, case.bias):
        tensor.nan_to_num_(0.5, 0.5, 0.5)
    return case


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_opcheck(backend: str, device: str, spec: Spec) -> None:
    case = _finite(spec, device)
    torch.library.opcheck(INTERVENE_[backend], (case.copy().h, *case.pool, *case.plan))
    covered = case.copy().covered()
    torch.library.opcheck(
        INTERVENE_NORM_[backend], (covered.h, *covered.pool, *covered.plan, *norm_of(covered))
    )
    leaves = [t.clone().requires_grad_() for t in (case.h, case.down, case.up, case.bias)]
    torch.library.opcheck(INTERVENE[backend], (*leaves, case.kind, *case.plan, case.offsets))
    hs = gathered(case).nan_to_num(0.5)
    grad = gradient_like(case)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            INTERVENE_BACKWARD[backend], (grad, hs, *case.pool, *case.plan, case.offsets, *need)
        )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_fakes_tell_the_truth(backend: str, device: str, spec: Spec) -> None:
    """Shapes, dtypes and strides of a fake result are those of the real one."""
    case = _finite(spec, device)
    grad, hs = gradient_like(case), gathered(case)
    covered = case.copy().covered()
    norm = norm_of(case)._replace(shift=None)
    real = (
        INTERVENE_NORM_[backend](covered.h, *covered.pool, *covered.plan, *norm),
        INTERVENE[backend](case.h, *case.pool, *case.plan, case.offsets),
        *backward(case, grad, backend),
    )
    with torch._subclasses.FakeTensorMode() as mode:
        h, grad, hs, offsets = (mode.from_tensor(t) for t in (case.h, grad, hs, case.offsets))
        rest = [mode.from_tensor(t) for t in (*case.pool, *case.plan)]
        plan, weight = [mode.from_tensor(t) for t in covered.plan], mode.from_tensor(norm.weight)
        fake = (
            INTERVENE_NORM_[backend](h, *rest[:4], *plan, weight, *norm[1:]),
            INTERVENE[backend](h, *rest, offsets),
            *INTERVENE_BACKWARD[backend](grad, hs, *rest, offsets, True, True),
        )
    for it, stand_in in zip(real, fake):
        assert (it.shape, it.dtype, it.stride()) == (stand_in.shape, stand_in.dtype, stand_in.stride())


def _pool(device: str, seed: int = 0) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    pool = Pool(24, torch.float32, device, capacity=16)
    for rank in (3, 5):
        down, up = torch.randn(2, rank, 24, generator=generator)
        pool.add(Fold(down, up, torch.randn(rank, generator=generator), torch.zeros(rank, dtype=torch.int32)))
    return pool


def _plans(device: str, cover: bool = False) -> list[Plan]:
    """Other rows and other ranges, the same shapes."""
    first, second = rk.Span(0, 3), rk.Span(3, 5)
    entries = [
        [(first, [0, 5]), (second, [3, 7, 8])],
        [(second, [2, 1]), (first, [9, 0, 4])],
        [(first, [11, 10]), (first, [1, 2, 3])],
    ]
    return [make_plan(it, device, total_rows=12, cover=cover) for it in entries]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_calls_give_the_eager_result(backend: str, device: str, compiler: str) -> None:
    """In one graph, without a break, and without compiling again for a plan of the same shapes."""
    pool = _pool(device)
    start = torch.randn(12, 24, generator=torch.Generator().manual_seed(3)).to(device)
    weight = torch.linspace(-1, 2, 24, device=device)

    def edit(h, plan):
        return rk.functional.intervene_(h * 2, pool, plan) + 1

    def edit_out_of_place(h, plan):
        return rk.functional.intervene(h * 2, pool, plan) + 1

    def edit_and_norm(h, plan):
        h = h * 2
        return h + rk.functional.intervene_norm_(h, pool, plan, weight, norm=Norm.ROUND)

    with rk.backend(backend):
        for function in (edit, edit_out_of_place, edit_and_norm):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend(compiler)
            compiled = torch.compile(function, backend=counter, fullgraph=True)
            for plan in _plans(device, cover=function is edit_and_norm):
                assert same_bits(compiled(start, plan), function(start, plan))
            assert counter.frame_count == 1


def test_an_in_place_edit_of_a_graph_input_is_seen_outside(backend: str, device: str) -> None:
    torch._dynamo.reset()
    pool, (plan, *_) = _pool(device), _plans(device)
    start = torch.randn(12, 24, generator=torch.Generator().manual_seed(3)).to(device)
    eager, compiled = start.clone(), start.clone()
    with rk.backend(backend):
        rk.functional.intervene_(eager, pool, plan)
        edit = torch.compile(rk.functional.intervene_, backend="aot_eager", fullgraph=True)
        assert edit(compiled, pool, plan).data_ptr() == compiled.data_ptr()
    assert same_bits(compiled, eager) and not same_bits(eager, start)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loreft_has_the_eager_gradients(backend: str, device: str, compiler: str) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(7)
    leaves = [torch.randn(*shape, generator=generator).to(device) for shape in ((2, 6, 24), (3, 24), (3, 24))]
    leaves = [t.requires_grad_() for t in (*leaves, torch.randn(3, generator=generator).to(device))]

    def loss(h, R, W, b, rows):
        return rk.functional.loreft(h, R, W, b, rows).square().sum()

    compiled = torch.compile(loss, backend=compiler, fullgraph=True)
    with rk.backend(backend):
        for rows in (None, torch.tensor([0, 4, 11], dtype=torch.int32, device=device)):
            eager = torch.autograd.grad(loss(*leaves, rows), leaves)
            for mine, theirs in zip(torch.autograd.grad(compiled(*leaves, rows), leaves), eager):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
