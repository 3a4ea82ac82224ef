"""Where and on what the tests run: devices, backends, hypothesis profiles, markers."""

from __future__ import annotations

import os
import time

import torch

# Before anything imports triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
from support import interpreter

from reft_kernels import ops

if os.environ.get("TRITON_INTERPRET") == "1" and ops.why_not("triton", "cpu") is None:
    interpreter.fix_the_order_of_sums()

torch.set_num_threads(2)

# "ci" draws the same examples every time; HYPOTHESIS_PROFILE=thorough draws new and many more.
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=40, database=None, print_blob=True
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=400, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    config.addinivalue_line("markers", "slow: takes many seconds or gigabytes; `-m 'not slow'` leaves it out")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def pytest_runtest_teardown() -> None:
    """What a kernel did wrong is its own test's failure, and leaves CUDA of no use to this process.

    So a worker of xdist ends here, and another one takes over.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            time.sleep(1)  # what was reported so far is on its way
            os._exit(1)
        raise


# Session scope, so that hypothesis may run many examples within one use of the fixture.
@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="session", params=ops.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """Every backend that can run on `device`; the others are skipped with the reason."""
    reason = ops.why_not(request.param, device)
    if reason is not None:
        pytest.skip(f"{request.param} on {device}: {reason}")
    return request.param
