"""The op alone: cases, the work they count, and that a wrong system is found out."""

from __future__ import annotations

import os
import types

import numpy as np
import pytest
import torch
from reft_bench.cli import parser
from reft_bench.commands import kernels as run
from reft_bench.gpu import plan as gpu_plan
from reft_bench.kernels import systems
from reft_bench.kernels.cases import MIXES, USUAL_POOL, KernelCase, Problem, problems
from reft_bench.measure.ceilings import Ceilings
from reft_bench.measure.session import LeftOut
from reft_bench.measure.timer import CpuClock


def _case(direction="forward", dtype="float32", rows=12, width=96, rank=3, adapters=5, mix="distinct"):
    return KernelCase(direction, dtype, rows, width, rank, adapters, mix)


@pytest.mark.parametrize("direction", ["forward", "norm", "backward"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["eager", "native", "reference", "rk.functional", "gather+bmm"])
def test_systems_give_the_reference(name, mix, direction):
    system, case = systems.all_systems()[name], _case(direction, mix=mix)
    reason = system.why_not(case, "cpu")
    if reason is not None:
        pytest.skip(reason)
    assert systems.check(system, Problem(case, "cpu", 0)) <= 1e-5


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or Triton's interpreter")
def test_the_shrink_and_expand_peer_gives_the_reference():
    system = systems.all_systems()["shrink+expand"]
    problem = Problem(_case(width=600), "cpu", 0)
    assert system.why_not(problem.case, "cpu") is None
    before = problem.h.clone()
    assert systems.check(system, problem) <= 1e-5
    assert torch.equal(problem.h, before)


class _Idle(systems.Eager):
    def forward(self, problem):
        return lambda: problem.h

    def norm(self, problem):
        return lambda: systems.rms_norm(problem.h, problem.weight)


class _WrongAdapter(systems.Gather):
    def forward(self, problem):
        problem.index = torch.zeros_like(problem.index)
        return super().forward(problem)


class _NotFinite(systems.Eager):
    def forward(self, problem):
        return lambda: problem.h * float("nan")

    def norm(self, problem):
        return systems.System.norm(self, problem)


class _NormedTwice(systems.Ours):
    def norm(self, problem):
        call = super().norm(problem)
        return lambda: 1.001 * systems.rms_norm(call(), problem.weight)


@pytest.mark.parametrize("direction", ["forward", "norm"])
@pytest.mark.parametrize("wrong", [_Idle(), _WrongAdapter(), _NotFinite(), _NormedTwice("native")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_systems_are_beyond_the_tolerance(wrong, dtype, direction):
    if isinstance(wrong, _NormedTwice) and direction == "forward":
        pytest.skip("right without the norm")
    case = _case(direction, dtype=dtype)
    assert systems.check(wrong, Problem(case, "cpu", 0)) > 2 * systems.tolerance(case)


def test_mixes_draw_what_they_say():
    def counts(mix):
        return np.bincount(_case(rows=4000, adapters=8, mix=mix).assignment(0), minlength=8)

    assert counts("identical").tolist() == [4000] + [0] * 7
    assert counts("distinct").tolist() == [500] * 8
    assert counts("uniform").min() > 400
    zipf = counts("zipf")
    assert 1.6 < zipf[0] / zipf[1] < 2.4 and 3.0 < zipf[0] / zipf[3] < 5.2


def test_work_counts_bytes_once_each_way():
    work = _case(rows=2, width=96, rank=3, adapters=5).work(0)
    weights = 2 * 3 * (2 * 96 * 4 + 8)  # two adapters are used; 8 bytes a pool row for bias and kind
    assert work.moved == 2 * 2 * 96 * 4 + weights
    assert work.footprint == 2 * 96 * 4 + weights
    assert work.operations == 2 * (2 * 2 * 3 * 96)
    norm = _case("norm", rows=2, width=96, rank=3, adapters=5).work(0)
    assert norm.moved == work.moved + 2 * 96 * 4 + 96 * 4


def test_repeated_edits_in_place_stay_finite():
    problem = Problem(_case(), "cpu", 0)
    call = systems.Ours("reference").forward(problem)
    with systems.Ours("reference").context():
        for _ in range(200):
            call()
    assert problem.h.abs().max() < 100


def test_a_floor_is_the_longer_of_bytes_and_operations_plus_a_call():
    work = _case(rows=64, width=512).work(0)
    floor = Ceilings("cpu", CpuClock(span=2e-4)).floor(work, torch.float32)
    assert floor["bytes_s"] == work.moved / floor["copy_rate"]
    assert floor["floor_s"] == max(floor["bytes_s"], floor["operations_s"]) + floor["empty_call_s"]
    assert 1e8 < floor["copy_rate"] < 1e13 and 1e8 < floor["matrix_rate"] < 1e16
    assert 1e-8 < floor["empty_call_s"] < 1e-3


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_input_sets_have_their_adapters_at_other_places(direction):
    case = _case(direction, rows=5, width=64, rank=8, adapters=200)
    sets = problems(case, "cpu", 0, sets=6)
    places = {(id(it.pool), it.plan.spans[0, 0].item()) for it in sets}
    assert len(places) == 6
    # Two sets fill a pool; a backward, which gives gradients for all of its pool, has one for each set.
    sizes = [it.pool.capacity for it in {id(it.pool): it for it in sets}.values()]
    assert sizes == ([1600] * 6 if direction == "backward" else [USUAL_POOL] * 3)
    for name in ("native", "gather+bmm", "eager"):
        for it in sets:
            assert systems.check(systems.all_systems()[name], it) <= 1e-5, name
    assert all(it.h is sets[0].h and it.plan.rows is sets[0].plan.rows for it in sets)
    apart = problems(case, "cpu", 0, sets=2, own_rows=True)
    assert apart[0].h.data_ptr() != apart[1].h.data_ptr() and torch.equal(apart[0].h, apart[1].h)


#: Of an H200.
L2 = 60 << 20


def _kit_cases():
    for part in gpu_plan.BENCHMARKS:
        for _, text, *_ in gpu_plan.BENCHMARKS[part]:
            if text.startswith("kernels"):
                yield from run.cases_of(parser("kernels").parse_args(text.split()))


@pytest.mark.parametrize("case", list(_kit_cases()), ids=lambda case: case.id)
def test_on_a_gpu_adapters_come_from_memory(case):
    """All sets of a run together are far beyond the L2, so that none is found there at the next replay."""
    work = case.work(0)
    cached = work.of_rows <= L2 / 4 and case.direction != "backward"
    cold = run.cold_bytes(work, cached)
    assert run.sets_beyond(L2, cold) * cold >= run.CACHES * L2
    if cached:
        weights = case.adapters * case.rank * 2 * case.width
        assert cold >= weights  # not h, which is in the L2 by purpose


def test_a_large_pool_is_one_pool():
    (case,) = [case for case in _kit_cases() if case.pool_rows]
    sets = run.sets_beyond(L2, run.cold_bytes(case.work(0), True))
    assert case.pool_capacity(sets) == case.pool_rows >= 16384
    assert case.pool_rows >= sets * case.adapters * case.rank and case.id.endswith(f"pool={case.pool_rows}")


class _WrongOps(systems.Ours):
    def backward_ops(self, problem):
        call = super().backward_ops(problem)
        return lambda: (call()[0], *(2 * gradient for gradient in call()[1:]))


def test_what_a_graph_holds_of_a_backward_is_checked_too():
    problem = Problem(_case("backward"), "cpu", 0)
    assert systems.check(systems.Ours("native"), problem) <= 1e-5
    assert systems.check(_WrongOps("native"), problem) > 0.5


class _NoGraph(CpuClock):
    """A clock that can't prepare one system, as a graph can't hold some."""

    def __init__(self, refused):
        super().__init__(span=1e-5)
        self.refused = refused

    def prepare(self, candidate):
        if candidate.name == self.refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().prepare(candidate)


def _bench(monkeypatch, refused=""):
    args = parser("kernels").parse_args(["kernels", "--rounds", "2"])
    chosen = {name: systems.all_systems()[name] for name in ("eager", "native", "gather+bmm")}
    session = types.SimpleNamespace(note=lambda text: None, results=types.SimpleNamespace())
    bench = run.Bench(session, chosen, args, "cpu")
    monkeypatch.setattr(run, "_clock", lambda *words: _NoGraph(refused))
    return bench


def test_a_backward_is_captured_by_its_ops(monkeypatch):
    bench, called = _bench(monkeypatch), []
    ops = systems.Ours.backward_ops
    monkeypatch.setattr(
        systems.Ours, "backward_ops", lambda self, problem: called.append("ops") or ops(self, problem)
    )
    monkeypatch.setattr(systems, "check", lambda system, problem: 0.0)
    bench.measure(_case("backward"), lambda: None)
    assert not called  # launched one by one, it is autograd's
    bench.captures = True
    bench.measure(_case("backward"), lambda: None)
    assert called == ["ops"]


def test_a_system_that_no_graph_holds_is_left_out(monkeypatch):
    (result,) = _bench(monkeypatch, "gather+bmm").measure(_case(), lambda: None)
    assert set(result.systems) == {"eager", "eager (A/A)", "native"}
    assert "not permitted when stream is capturing" in result.left_out["gather+bmm"]
    with pytest.raises(LeftOut, match="not permitted"):
        _bench(monkeypatch, "eager").measure(_case(), lambda: None)
