"""rk.functional: what is refused, with which words, before anything is written."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from support.cases import same_bits
from support.pools import draw, plan_of, pool_and_plan

import reft_kernels as rk
from reft_kernels import functional
from reft_kernels.ops import current_backend


def test_in_place_edits_are_refused_where_autograd_needs_h() -> None:
    pool, plan = pool_and_plan()
    h = draw(0, (6, 8))[0].requires_grad_()
    before = h.detach().clone()
    with pytest.raises(ValueError, match="h: requires a gradient.*use intervene"):
        functional.intervene_(h, pool, plan)
    with pytest.raises(ValueError, match="h: requires a gradient"):
        functional.intervene_(h * 1, pool, plan)
    assert same_bits(h, before)
    with torch.no_grad():
        functional.intervene_(h, pool, plan)
    assert not same_bits(h, before)


def _bad_calls() -> dict[str, tuple]:
    """name → (h, pool, plan, message)."""
    pool, plan = pool_and_plan()[0], plan_of()
    (h,) = draw(0, (6, 8))
    half, _ = pool_and_plan(dtype=torch.bfloat16)
    meta = rk.Pool(8, device="meta", capacity=8)
    plan_elsewhere = rk.Plan(*(t.to("meta") for t in plan))
    width = "h: last dimension must be the pool's width 8"
    devices = "h, pool and plan must be on one device"
    dtype = "h: must be float64, float32, bfloat16 or float16, was torch."
    return {
        "a plan for a pool": (h, plan, plan, "pool: must be a Pool, was a Plan"),
        "tensors for a plan": (h, pool, tuple(plan), "plan: must be a Plan, was a tuple"),
        "narrow": (h[:, :7].clone(), pool, plan, width),
        "wide": (torch.ones(6, 9), pool, plan, width),
        "scalar": (torch.tensor(1.0), pool, plan, width),
        "pool on another device": (h, meta, plan, devices),
        "plan on another device": (h, pool, plan_elsewhere, devices),
        "h on another device": (h.to("meta"), pool, plan, devices),
        "pool narrower than h": (h, half, plan, "pool: its dtype must be h's .torch.float32. or"),
        "pool of the other half": (h.half(), half, plan, "pool: its dtype must be h's .torch.float16. or"),
        "integers": (h.int(), pool, plan, dtype + "int32"),
        "complex": (h.to(torch.complex64), pool, plan, dtype + "complex64"),
    }


@pytest.mark.parametrize("name", _bad_calls())
@pytest.mark.parametrize("function", [functional.intervene_, functional.intervene])
def test_bad_calls_of_intervene(function, name: str) -> None:
    h, pool, plan, message = _bad_calls()[name]
    before = h.clone()
    with pytest.raises(ValueError, match=message):
        function(h, pool, plan)
    if h.device.type != "meta":
        assert torch.equal(h, before)


@pytest.mark.parametrize("name", _bad_calls())
def test_bad_calls_of_intervene_norm(name: str) -> None:
    h, pool, plan, message = _bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        functional.intervene_norm_(h, pool, plan, torch.ones(8))


BAD_NORMS = {
    "weight's shape": ({"weight": torch.ones(7)}, r"weight: must be \[8\] to fit h, was \[7\]"),
    "weight's dimensions": ({"weight": torch.ones(1, 8)}, r"weight: must be \[8\].*was \[1, 8\]"),
    "weight's dtype": (
        {"weight": torch.ones(8).half()},
        "weight: its dtype must be h's .torch.float32., was",
    ),
    "weight's device": ({"weight": torch.ones(8, device="meta")}, "weight: is on meta, but h is on cpu"),
    "weight's strides": ({"weight": torch.ones(16)[::2]}, "weight: must be contiguous, had a stride of 2"),
    "shift's shape": ({"shift": torch.ones(9)}, r"shift: must be \[8\]"),
    "shift's dtype": ({"shift": torch.ones(8).double()}, "shift: its dtype"),
    "negative eps": ({"eps": -1e-6}, "eps: must be finite and 0 or more, was -1e-06"),
    "eps that is no number": ({"eps": float("nan")}, "eps: must be finite"),
    "unknown norm": ({"norm": 8}, "norm: must be a sum of.*RMS, CENTRED, PLUS_ONE and ROUND, was 8"),
    "negative norm": ({"norm": -1}, "norm: must be a sum"),
    "gradient of the weight": ({"weight": torch.ones(8).requires_grad_()}, "weight: requires a gradient"),
    "gradient of the shift": ({"shift": torch.ones(8).requires_grad_()}, "shift: requires a gradient"),
}


@pytest.mark.parametrize("name", BAD_NORMS)
def test_bad_norms(name: str) -> None:
    changes, message = BAD_NORMS[name]
    pool, plan = pool_and_plan(cover=True)
    (h,) = draw(0, (6, 8))
    before = h.clone()
    with pytest.raises(ValueError, match=message):
        functional.intervene_norm_(h, pool, plan, **{"weight": torch.ones(8), **changes})
    assert same_bits(h, before)


def test_a_norm_needs_a_plan_that_names_every_row(backend: str, device: str) -> None:
    pool, plan = pool_and_plan(device)
    (h,), weight = draw(0, (6, 8), device=device), torch.ones(8, device=device)
    before = h.clone()
    with rk.backend(backend):
        with pytest.raises(ValueError, match="plan: must name every row of h, has 3 of 6; make_plan takes"):
            functional.intervene_norm_(h, pool, plan, weight)
        with pytest.raises(ValueError, match="h: requires a gradient"):
            cover = plan_of(device, cover=True)
            functional.intervene_norm_(h.clone().requires_grad_(), pool, cover, weight)
    assert same_bits(h, before)


def test_a_row_that_h_lacks_reaches_no_other_memory(backend: str, device: str) -> None:
    """make_plan can't know the h of every call. Refused, or skipped where rows are not read back."""
    if device != "cpu" and backend == "reference":
        pytest.skip("torch's own indexing takes the whole device down")
    pool, _ = pool_and_plan(device)
    plan = rk.make_plan([(rk.Span(0, 2), [1, 7])], device)
    (memory,) = draw(0, (9, 8), device=device)
    wanted = memory.clone()
    h = memory[:6]
    with rk.backend(backend):
        try:
            functional.intervene_(h, pool, plan)
        except ValueError as error:
            assert re.match("(rows|plan): ", str(error)) and ".cpp" not in str(error)
        else:
            functional.intervene_(wanted[:6], pool, rk.make_plan([(rk.Span(0, 2), [1])], device))
    assert same_bits(memory, wanted)


def test_h_whose_rows_have_no_single_stride_is_no_silent_copy(backend: str, device: str) -> None:
    """In place: an error, or an edit that the caller sees. Out of place: an error, or the right result."""
    pool, plan = pool_and_plan(device)
    (base,) = draw(0, (2, 4, 8), device=device)
    for h in (base[:, :3], base.new_empty(8, 6).copy_(base.reshape(-1)[:48].view(8, 6)).T):
        plain = h.contiguous()
        with rk.backend(backend):
            want = functional.intervene(plain, pool, plan)
            for function in (functional.intervene, functional.intervene_):
                before = h.clone()
                try:
                    got = function(h, pool, plan)
                except ValueError as error:
                    assert str(error).startswith("h: its last dimension must be contiguous and the others")
                    assert same_bits(h, before)
                else:
                    assert same_bits(got, want)
                    assert same_bits(h, before if function is functional.intervene else want)


@pytest.mark.parametrize("norm", [False, True])
def test_h_that_lies_wrong_in_memory_is_a_value_error_on_every_backend(
    backend: str, device: str, norm: bool
) -> None:
    pool, plan = pool_and_plan(device, cover=norm)
    wrong = {
        "h: its last dimension must be contiguous": draw(0, (6, 16), device=device)[0][:, ::2],
        r"h: .* its shape was \[6, 8\], its strides \[1, 6\]": draw(0, (8, 6), device=device)[0].T,
        "h: its rows overlap in memory .row stride 0": draw(0, (1, 8), device=device)[0].expand(6, 8),
        "h: its rows overlap in memory .row stride 4": draw(0, (28,), device=device)[0].as_strided(
            (6, 8), (4, 1)
        ),
    }
    with rk.backend(backend):
        for message, h in wrong.items():
            before = h.clone()
            with pytest.raises(ValueError, match=message):
                if norm:
                    functional.intervene_norm_(h, pool, plan, torch.ones(8, device=device))
                else:
                    functional.intervene_(h, pool, plan)
            assert same_bits(h, before)
        wide = draw(0, (2, 3, 24), device=device)[0][..., 8:16]  # one stride, rows apart: as good as any
        edited = functional.intervene(wide, pool, plan)
        assert same_bits(functional.intervene_(wide, pool, plan), edited)


def test_what_the_compiled_library_refuses_is_a_value_error_without_a_source_line() -> None:
    if rk.ops.why_not("native", "cpu") is not None:
        pytest.skip("the native library is not there")
    pool, plan = pool_and_plan(cover=True)
    (h,), weight = draw(0, (6, 8)), torch.ones(8)
    beyond = rk.make_plan([(rk.Span(0, 2), [1, 7])])
    no_range = rk.make_plan([(rk.Span(7, 3), [1])])
    twice = plan._replace(rows=plan.rows.clone().fill_(2))
    wide = rk.Pool(8, torch.float64)
    calls = [
        (
            lambda: functional.intervene_(h, pool, beyond),
            "rows: must be less than 6, the number of rows of h; ",
        ),
        (lambda: functional.intervene(h, pool, beyond), "rows: must be less than 6"),
        (
            lambda: functional.intervene(h, pool, no_range),
            "spans: segment 0 takes pool rows [7, 10), the pool",
        ),
        (lambda: functional.intervene_norm_(h, pool, twice, weight), "rows: row 2 of h is named twice"),
        (lambda: functional.intervene_(pool.down, pool, plan), "h: shares memory with down, so it can't"),
        (lambda: functional.intervene_norm_(h, pool, plan, h[0]), "weight"),
        (lambda: functional.intervene(h.double(), wide, beyond), "h: dtype must be Float, BFloat16 or Half"),
        (lambda: functional.loreft(h.double(), *draw(0, (2, 8), (2, 8), (2,))), "h: dtype must be Float"),
    ]
    before = h.clone()
    with rk.backend("native"):
        for call, message in calls:
            with pytest.raises(ValueError) as caught:
                call()
            if message != "weight":  # "h: shares memory with weight"
                assert str(caught.value).startswith(message)
            assert ".cpp" not in str(caught.value) and ".h:" not in str(caught.value)
            assert caught.value.__suppress_context__
    assert same_bits(h, before)


def test_errors_that_are_no_fault_of_an_argument_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("python_bindings/cuda.cpp:7, the CUDA kernel was not launched")

    pool, plan = pool_and_plan()
    monkeypatch.setitem(rk.ops.INTERVENE_, current_backend("cpu"), out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="the CUDA kernel was not launched"):
        functional.intervene_(draw(0, (6, 8))[0], pool, plan)


def _bad_loreft() -> dict[str, tuple]:
    h, R, W, b = *draw(0, (2, 3, 8)), *draw(1, (2, 8), (2, 8), (2,))
    return {
        "R too narrow": ((h, R[:, :7], W, b), r"R: must be \[r, 8\] to fit h \[2, 3, 8\], was \[2, 7\]"),
        "R of one dimension": ((h, R[0], W, b), r"R: must be \[r, 8\]"),
        "W of another rank": ((h, R, W[:1], b), r"W: must have R's shape \[2, 8\], was \[1, 8\]"),
        "b too long": ((h, R, W, torch.ones(3)), r"b: must be \[2\], was \[3\]"),
        "b of one value": ((h, R, W, torch.ones(1)), r"b: must be \[2\], was \[1\]"),
        "R of another dtype": ((h, R.half(), W, b), "R: dtype must be h's .torch.float32. or"),
        "W of another dtype": ((h.half(), R, W.bfloat16(), b), "W: dtype must be h's .torch.float16. or"),
        "R elsewhere": ((h, R.to("meta"), W, b), "R: is on meta, but h is on cpu"),
        "b elsewhere": ((h, R, W, b.to("meta")), "b: is on meta, but h is on cpu"),
        "row twice": ((h, R, W, b, [0, 2, 0]), "rows: row 0 is named twice"),
        "negative row": ((h, R, W, b, [-1]), r"rows: rows must lie in \[0, 6\); found -1"),
        "row beyond": ((h, R, W, b, torch.tensor([6])), r"rows: rows must lie in \[0, 6\); found 6"),
        "fractional row": ((h, R, W, b, [0.5]), "rows: rows must be integers"),
        "mask for rows": ((h, R, W, b, torch.ones(6, dtype=torch.bool)), "rows: rows must be integers"),
        "integers for h": (
            (h.int(), R, W, b),
            "h: must be float64, float32, bfloat16 or float16, was torch.int32",
        ),
    }


@pytest.mark.parametrize("name", _bad_loreft())
def test_bad_calls_of_loreft(name: str) -> None:
    arguments, message = _bad_loreft()[name]
    with pytest.raises(ValueError, match=message):
        functional.loreft(*arguments)


def test_unavailable_backend_before_anything_is_written() -> None:
    pool, plan = pool_and_plan()
    (h,) = draw(0, (6, 8))
    missing = [name for name in ("native", "triton") if rk.ops.why_not(name, "cpu") is not None]
    before = h.clone()
    functions = (
        functional.intervene_,
        functional.intervene,
        lambda h, pool, _: functional.intervene_norm_(h, pool, plan_of(cover=True), torch.ones(8)),
    )
    for name, function in itertools.product(missing, functions):
        with rk.backend(name), pytest.raises(rk.BackendUnavailable, match=f"'{name}'"):
            function(h, pool, plan)
    assert same_bits(h, before)
    assert current_backend("cpu") not in missing
