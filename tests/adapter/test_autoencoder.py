"""Features of sparse autoencoders: what is read of their weights edits as the whole autoencoder says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reft_kernels as rk
from reft_kernels.ops.reference import activate
from reft_kernels.ops.schema import NO_PRODUCT

D, N = 12, 40
FEATURES = [3, 30, 17]


def weights_of(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    if kind == "jumprelu":
        shapes["threshold"] = (N,)
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    if kind == "jumprelu":
        made["threshold"][3] = -0.5  # as 0, since a ReLU gives nothing below that
        made["threshold"][17] = 1.5
    return made


def activations(weights: dict[str, Tensor], h: Tensor, apply_b_dec_to_input: bool) -> Tensor:
    """All features [n, N], as SAELens encodes: a ReLU, and a mask of what is above the threshold."""
    z = (h - weights["b_dec"] * apply_b_dec_to_input) @ weights["W_enc"] + weights["b_enc"]
    return torch.relu(z) * (z > weights["threshold"]) if "threshold" in weights else torch.relu(z)


def edited(adapter: rk.Adapter, h: Tensor) -> Tensor:
    fold = adapter.interventions[0].fold()
    z = torch.where((fold.kind & NO_PRODUCT) != 0, fold.bias, h @ fold.down.T + fold.bias)
    return h + activate(z, fold.kind) @ fold.up


@pytest.mark.parametrize("target", [0.0, 0.7, 4.0])
@pytest.mark.parametrize("mode", ["clamp", "minimum"])
@pytest.mark.parametrize("apply_b_dec_to_input", [False, True])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_a_feature_is_clamped_in_the_whole_autoencoder(kind, apply_b_dec_to_input, mode, target) -> None:
    """What the decoder makes of the clamped features, less what it made of them, is added to h."""
    weights = weights_of(kind)
    feature = rk.sae_features(weights, FEATURES, apply_b_dec_to_input=apply_b_dec_to_input)
    adapter = rk.Adapter.from_tensors("sae", {0: feature}, options={"mode": mode, "target": target})
    h = 2 * torch.randn(200, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = activations(weights, h, apply_b_dec_to_input)
    after = before.clone()
    after[:, FEATURES] = target if mode == "clamp" else before[:, FEATURES].clamp_min(target)
    wanted = h + (after - before) @ weights["W_dec"]
    torch.testing.assert_close(edited(adapter, h), wanted, rtol=1e-10, atol=1e-10)
    if kind == "jumprelu":  # the draw has all three: off, between 0 and the threshold, and on
        z = (h - weights["b_dec"] * apply_b_dec_to_input) @ weights["W_enc"][:, 17] + weights["b_enc"][17]
        assert ((z > 0) & (z < 1.5)).any() and (z > 1.5).any() and (z < 0).any()


@pytest.mark.parametrize("mode", ["clamp", "minimum"])
def test_at_the_threshold_itself_a_feature_is_off(mode) -> None:
    one = torch.ones(1, D, dtype=torch.float64)
    feature = {"w_enc": one / D, "b_enc": torch.zeros(1), "w_dec": one, "threshold": torch.ones(1)}
    adapter = rk.Adapter.from_tensors("sae", {0: feature}, options={"mode": mode, "target": 0.5})
    assert torch.equal(edited(adapter, one), one + 0.5)
    assert torch.equal(edited(adapter, 2 * one), 2 * one + (0.5 - 2 if mode == "clamp" else 0))


def test_one_feature_of_half_precision_weights(tmp_path) -> None:
    weights = weights_of("jumprelu", torch.bfloat16)
    feature = rk.sae_features(weights, 30, apply_b_dec_to_input=True)
    assert {tensor.dtype for tensor in feature.values()} == {torch.float32}
    assert torch.equal(feature["w_dec"], weights["W_dec"][30:31].float())
    assert feature["w_enc"].data_ptr() != weights["W_enc"].data_ptr()
    adapter = rk.Adapter.from_tensors("sae", {2: feature}, options={"target": 3.0})
    adapter.save_pretrained(tmp_path)
    loaded = rk.Adapter.from_pretrained(tmp_path).interventions[0]
    assert loaded.options == {"mode": "clamp"}
    assert all(torch.equal(getattr(loaded, name), tensor) for name, tensor in feature.items())


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda w: w.pop("b_dec"), {}, "^weights: .*missing: b_dec"),
        (lambda w: w.pop("W_dec"), {"apply_b_dec_to_input": False}, "^weights: .*missing: W_dec"),
        (lambda w: w.update(b_gate=w["b_enc"]), {}, "^weights: .*unknown: b_gate"),
        (lambda w: w.update(W_enc=w["W_enc"][0]), {}, r"^W_enc: must be \[d, n\], was \[40\]"),
        (lambda w: w.update(W_enc=w["W_enc"].T), {}, r"^b_enc: must be \[12\] beside W_enc, was \[40\]"),
        (lambda w: None, {"features": 40}, "^features: must be numbers from 0 to 39, was 40"),
        (lambda w: None, {"features": [True]}, "^features: .*was True"),
        (lambda w: None, {"features": []}, "^features: .*at least one"),
        (lambda w: None, {"features": [1, 1]}, "^features: must be distinct"),
    ],
)
def test_what_is_wrong_is_named(change, arguments, words) -> None:
    weights = weights_of("relu")
    change(weights)
    with pytest.raises(ValueError, match=words):
        rk.sae_features(weights, **{"features": 1, "apply_b_dec_to_input": True} | arguments)
