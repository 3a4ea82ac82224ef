"""Which backend runs, and that nothing falls back in silence."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import reft_kernels as rk
from reft_kernels import ops
from reft_kernels.ops import dispatch

Q = torch.zeros(2, 4)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test resolves anew, with no choice made by the environment."""
    monkeypatch.setattr(dispatch, "_resolved", {})
    monkeypatch.setattr(dispatch, "_chosen", None)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="backend.*'tritn'.*'native', 'triton', 'reference'"):
        with rk.backend("tritn"):
            pass


def test_the_choice_holds_inside_the_block_only() -> None:
    before = ops.current_backend(Q.device) if ops.why_not("native", "cpu") is None else None
    with rk.backend("reference"):
        assert ops.current_backend(Q.device) == "reference"
        with pytest.raises(KeyError), rk.backend("reference"):
            raise KeyError
        assert ops.current_backend(Q.device) == "reference"
    if before:
        assert ops.current_backend(Q.device) == before


def test_a_backend_that_was_asked_for_and_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.native, "cpu_missing", "it was never built")
    h = torch.ones(2, 4)
    pool, plan = rk.Pool(4, capacity=4), rk.make_plan([(rk.Span(0, 2), [0])])
    before = h.clone()
    with rk.backend("native"):
        with pytest.raises(rk.BackendUnavailable, match="'native'.*cpu.*it was never built"):
            rk.functional.intervene_(h, pool, plan)
    assert torch.equal(h, before)


def test_a_missing_best_backend_warns_once_and_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.native, "cpu_missing", "it was never built")
    with pytest.warns(RuntimeWarning, match="reference backend runs on cpu.*it was never built"):
        assert ops.current_backend(Q.device) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.current_backend(Q.device) == "reference"


def test_the_best_backend_is_taken_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.native, "cpu_missing", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.current_backend(Q.device) == "native"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("reference", "reference"), ("", "None"), ("nativ", "REFT_KERNELS_BACKEND: unknown backend 'nativ'")],
)
def test_the_environment(name: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from reft_kernels import ops; print(ops.chosen_backend())"],
        env={**os.environ, "REFT_KERNELS_BACKEND": name},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout + done.stderr
