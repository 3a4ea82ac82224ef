"""The same measurements for people who track them with pytest-benchmark: `pytest bench --benchmark-only`.

Systems are checked against the reference first; one that is wrong fails, one that can't run is skipped.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

import torch

from ..kernels import systems as kernel_systems
from ..kernels.cases import DIRECTIONS, KernelCase, Problem
from ..systems import Setup, Unable, all_systems, models
from ..systems.base import Point
from ..systems.correctness import TOLERANCE, References
from ..systems.lora import merge, peft_missing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [
    KernelCase(direction, dtype, rows, 4096, 8, 16, "distinct")
    for direction in DIRECTIONS
    for dtype in ("float32", "bfloat16")
    for rows in (1, 16, 64, 256)
]
MODEL = "llama-512x8"
POINTS = [Point(8, 32, 8, 8, "f3+l3", 8), Point(8, 32, 8, 8, "all", 8)]


def _synchronized(call):
    """On a GPU the clock of pytest-benchmark must wait for what was launched."""
    if DEVICE == "cpu":
        return call

    def waited():
        call()
        torch.cuda.synchronize()

    return waited


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.id)
@pytest.mark.parametrize("name", kernel_systems.all_systems())
def test_kernel(benchmark, case: KernelCase, name: str) -> None:
    system = kernel_systems.all_systems()[name]
    reason = system.why_not(case, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    problem = Problem(case, DEVICE, seed=0)
    system.start()
    error = kernel_systems.check(system, problem)
    assert error <= kernel_systems.tolerance(case)
    benchmark.group = case.id
    benchmark.extra_info.update(case.params, error=error)
    build = getattr(system, case.direction)
    with system.context(), torch.set_grad_enabled(case.direction == "backward"):
        benchmark(_synchronized(build(problem)))


@pytest.fixture(scope="module")
def model():
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    return models.build(MODEL, dtype, DEVICE, seed=0)


@pytest.fixture(scope="module", params=POINTS, ids=lambda point: f"{point.positions}")
def setup(request, model) -> Setup:
    made = Setup(model, request.param, seed=0)
    if peft_missing() is None:
        made.merged = merge(made)
    return made


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", all_systems())
def test_overhead(benchmark, setup: Setup, name: str, phase: str) -> None:
    system = all_systems()[name]
    try:
        reason = system.why_not(setup)
        if reason is not None:
            raise Unable(reason)
        runner = system.build(setup)
        error = References(setup).error(runner, system.family, decode=phase == "decode")
    except Unable as error:
        pytest.skip(str(error))
    assert error <= TOLERANCE[setup.dtype]
    benchmark.group = f"{phase} {MODEL} {setup.point}"
    benchmark.extra_info.update(vars(setup.point), error=error)
    call = runner.prefill if phase == "prefill" else runner.decode
    with runner.context(), torch.no_grad():
        runner.prefill()
        benchmark.pedantic(_synchronized(call), setup=runner.rewind, rounds=15, warmup_rounds=2)
