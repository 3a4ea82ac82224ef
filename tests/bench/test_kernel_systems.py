"""The op alone: cases, the work they count, and that a wrong system is found out."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from reft_bench.kernels import systems
from reft_bench.kernels.cases import MIXES, KernelCase, Problem
from reft_bench.measure.ceilings import Ceilings
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
