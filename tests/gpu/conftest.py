"""Everything in this folder needs a GPU, and runs on each fused backend that is there."""

from __future__ import annotations

import pytest

import reft_kernels as rk
from reft_kernels import ops


@pytest.fixture(params=["native", "triton"])
def fused(request: pytest.FixtureRequest):
    """The name of a backend, which every op inside the test takes."""
    reason = ops.why_not(request.param, "cuda")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with rk.backend(request.param):
        yield request.param
