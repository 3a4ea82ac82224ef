"""Folds: h + Uᵀ φ(D h + c) against each method's own formula, and their gradients."""

from __future__ import annotations

import pytest
import torch
from support import formulas
from torch import Tensor

from reft_kernels.adapter import Intervention
from reft_kernels.adapter.methods import ACTIVATIONS, METHODS, activation
from reft_kernels.ops.reference import activate
from reft_kernels.ops.schema import NO_PRODUCT
from reft_kernels.pool import Fold
from reft_kernels.positions import Positions
from reft_kernels.scale_pool import ScaleFold
from reft_kernels.sites import HEAD_SITE

D, R = 12, 3
ALL = Positions.parse("all")


def parameters(
    method: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options
) -> dict[str, Tensor]:
    return formulas.parameters(method, R, D, dtype, seed, options)


def apply(fold: Fold | ScaleFold, h: Tensor) -> Tensor:
    if isinstance(fold, ScaleFold):
        return h * (1 + fold.scale_less_one[0]) + fold.shift[0]
    z = torch.where((fold.kind & NO_PRODUCT) != 0, fold.bias, h @ fold.down.T + fold.bias)
    return h + activate(z, fold.kind) @ fold.up


def intervention(
    method: str, tensors: dict[str, Tensor], act_fn: str | None = None, **options
) -> Intervention:
    head = 0 if METHODS[method].sites == (HEAD_SITE,) else None
    site = "block_output" if head is None else HEAD_SITE
    return Intervention(method, 0, site, ALL, tensors, act_fn=act_fn, head=head, options=options)


METHODS_WITH_FORMULA = [name for name in METHODS if name != "folded"]
CASES = [
    (name, act, options)
    for name in METHODS_WITH_FORMULA
    for options in formulas.VARIANTS.get(name, [{}])
    for act in (list(ACTIVATIONS) if METHODS[name].takes_activation else []) + [None]
]


@pytest.mark.parametrize(("method", "act_fn", "options"), CASES)
def test_a_fold_is_its_formula(method: str, act_fn: str | None, options: dict) -> None:
    activations = pytest.importorskip("transformers.activations")
    act = activations.ACT2FN[act_fn or "linear"]
    p = parameters(method, **options)
    one = intervention(method, p, act_fn, **options)
    fold = one.fold()
    h = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # gelu_fast writes sqrt(2/π) with ten digits.
    wanted = formulas.written_out(method, p, act, h, options)
    torch.testing.assert_close(apply(fold, h), wanted, rtol=1e-8, atol=1e-8)
    assert (fold.rank, fold.form) == (one.pool_rows, one.form)
    assert isinstance(fold, ScaleFold) or fold.kind.dtype is torch.int32


def test_a_noreft_without_its_second_bias() -> None:
    p = parameters("noreft")
    del p["b2"]
    h = torch.randn(5, D, dtype=torch.float64)
    for act_fn, act in ((None, lambda z: z), ("relu", torch.relu)):
        got = apply(intervention("noreft", p, act_fn).fold(), h)
        torch.testing.assert_close(got, formulas.written_out("noreft", p, act, h))


@pytest.mark.parametrize(
    ("method", "act_fn", "rows"),
    [
        ("loreft", None, R),
        ("loreft", "linear", R),
        ("loreft", "gelu", 2 * R),
        ("noreft", "relu", 2 * R),
        ("direft", "relu", R),
        ("lobireft", None, R),
        ("vector", None, R),
        ("adapter", "gelu", R + 1),  # the bias behind it is a row
        ("sae", None, 3 * R),  # with a threshold
        ("red", None, 1),
    ],
)
def test_pool_rows(method: str, act_fn: str | None, rows: int) -> None:
    one = intervention(method, parameters(method), act_fn)
    assert (one.pool_rows, one.rank, one.width) == (rows, R, D)


def test_a_red_of_half_precision_keeps_its_digits() -> None:
    """1 − 2⁻⁸ times 1 − 2⁻⁸, say, is 1 − 2⁻⁷ in bfloat16. And without a bias nothing is shifted."""
    scaling = torch.full((1, D), 1 - 2**-8, dtype=torch.bfloat16)
    fold = intervention("red", {"scaling": scaling}).fold()
    assert isinstance(fold, ScaleFold)
    assert (fold.scale_less_one == -(2**-8)).all() and not fold.shift.any()


def test_lobireft_never_multiplies_h() -> None:
    fold = intervention("lobireft", parameters("lobireft")).fold()
    assert (fold.kind == NO_PRODUCT).all() and not fold.down.any()
    h = torch.full((1, D), float("inf"), dtype=torch.float64)
    assert (apply(fold, h) == float("inf")).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_difference_is_taken_in_float32(dtype: torch.dtype) -> None:
    """pyreft keeps R in float32 and W, b in bfloat16: D must not be rounded to the narrower."""
    p = parameters("loreft")
    p = {"R": p["R"].float(), "W": p["W"].to(dtype), "b": p["b"].to(dtype)}
    fold = intervention("loreft", p).fold()
    assert {fold.down.dtype, fold.up.dtype, fold.bias.dtype} == {torch.float32}
    assert torch.equal(fold.down, p["W"].float() - p["R"])
    assert torch.equal(fold.up, p["R"])


@pytest.mark.parametrize(
    ("method", "act_fn"),
    [("loreft", None), ("loreft", "gelu"), ("direft", None), ("direft", "silu"), ("noreft", "tanh"),
     ("consreft", None), ("lobireft", None), ("nodireft", "sigmoid"), ("vector", None), ("lofit", None),
     ("ablation", None), ("concept", None), ("adapter", "gelu"), ("red", None), ("jola", None)],
)  # fmt: skip
def test_gradients(method: str, act_fn: str | None) -> None:
    one = intervention(method, parameters(method), act_fn).requires_grad_(True)
    one.orthonormalize = bool(METHODS[method].orthonormal)
    h = torch.randn(2, D, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *_: apply(one.fold(), h), tuple(one.parameters()))


@pytest.mark.parametrize("method", METHODS_WITH_FORMULA)
def test_a_fold_of_half_precision_parameters_is_float32(method: str) -> None:
    fold = intervention(method, parameters(method, torch.bfloat16)).fold()
    assert {tensor.dtype for tensor in fold if tensor.is_floating_point()} == {torch.float32}


def test_an_unknown_activation_lists_the_known() -> None:
    with pytest.raises(ValueError, match="relu.*quick_gelu.*hardswish"):
        activation("hardswish")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("W"), ("missing", "W")),
        (lambda p: p.update(V=p["W"]), ("unknown", "V")),
        (lambda p: p.update(W=p["W"][:, :-1]), ("W:", f"[{R}, {D}]", f"[{R}, {D - 1}]")),
        (lambda p: p.update(b=p["b"][None]), ("b:", f"[{R}]")),
        (lambda p: p.update(b=p["b"].int()), ("b:", "dtype", "int32")),
        (lambda p: p.update(R=p["R"][0]), ("R:", "[r, d]")),
        (lambda p: p.update({name: t[:0] for name, t in p.items()}), ("R:", "at least 1")),
    ],
)
def test_bad_tensors_are_named(change, words: tuple[str, ...]) -> None:
    p = parameters("loreft")
    change(p)
    with pytest.raises(ValueError) as caught:
        intervention("loreft", p)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", [99, 0x200, -1])
def test_a_bad_kind_is_refused(kind: int) -> None:
    p = parameters("folded")
    p["kind"][1] = kind
    with pytest.raises(ValueError, match=f"kind.*{kind}"):
        intervention("folded", p)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"layer": -1}, "layer"),
        ({"layer": True}, "layer"),
        ({"site": "somewhere"}, "site"),
        ({"site": "head_attention_value_output"}, "head"),
        ({"head": 1}, "head"),
        ({"dropout": 2}, "dropout"),
        ({"method": "lora"}, "method"),
        ({"act_fn": "mish"}, "act_fn"),
    ],
)
def test_a_bad_place_is_named(arguments: dict, word: str) -> None:
    full = {"method": "loreft", "layer": 0, "site": "block_output", "positions": ALL} | arguments
    with pytest.raises(ValueError, match=f"^{word}:"):
        Intervention(tensors=parameters("loreft"), **full)
