"""Features of a sparse autoencoder's weights, as the method `sae` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: What is read of an autoencoder, by SAELens's names, with its axes: d the width, n the features.
_SHAPES = {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d", "threshold": "n"}
_OPTIONAL = ("b_dec", "threshold")


def sae_features(
    weights: Mapping[str, Tensor], features: int | Sequence[int], *, apply_b_dec_to_input: bool
) -> dict[str, Tensor]:
    """Features of a ReLU or JumpReLU autoencoder, to clamp by `Adapter.from_tensors("sae", …)`.

    >>> d, n = 8, 32
    >>> weights = {"W_enc": torch.randn(d, n), "b_enc": torch.zeros(n), "W_dec": torch.randn(n, d)}
    >>> feature = rk.sae_features(weights, 17, apply_b_dec_to_input=False)
    >>> {name: list(tensor.shape) for name, tensor in feature.items()}
    {'w_enc': [1, 8], 'b_enc': [1], 'w_dec': [1, 8]}
    >>> loud = rk.Adapter.from_tensors("sae", {20: feature}, options={"mode": "minimum", "target": 8.0})

    Args:
        weights: by SAELens's names: W_enc [d, n], b_enc [n], W_dec [n, d], and where there are any b_dec [d]
            and threshold [n] (JumpReLU). Its sae_weights.safetensors holds them.
        features: number of a feature, or several, from 0 to n − 1.
        apply_b_dec_to_input: of the autoencoder's config: whether it takes b_dec from h before it encodes.

    Returns:
        w_enc, w_dec [r, d], b_enc [r] and, with a threshold, threshold [r]: copies, in float32 at least.

    Raises:
        ValueError: a tensor is missing, or of another shape than the others say; one that these two kinds of
            autoencoder don't have (gated ones, say); a feature that is not there.

    An autoencoder that scales its input first (`normalize_activations` in its config) wants that folded into
    its weights before.
    """
    _check(weights, apply_b_dec_to_input)
    count = weights["W_dec"].shape[0]
    listed = [features] if isinstance(features, int) else list(features)
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < count:
            raise ValueError(f"features: must be numbers from 0 to {count - 1}, was {one!r}")
    if not listed or len(set(listed)) != len(listed):
        raise ValueError(f"features: must be distinct, at least one, was {listed}")
    rows = torch.tensor(listed, device=weights["W_dec"].device)

    def taken(name: str, axis: int) -> Tensor:
        part = weights[name].detach().index_select(axis, rows)
        return part.to(torch.promote_types(part.dtype, torch.float32))

    found = {
        "w_enc": taken("W_enc", 1).mT.contiguous(),
        "b_enc": taken("b_enc", 0),
        "w_dec": taken("W_dec", 0),
    }
    if apply_b_dec_to_input:
        # w_enc (h − b_dec) + b_enc; the product is a difference of large numbers, so in float64.
        wide = found["b_enc"].double() - found["w_enc"].double() @ weights["b_dec"].detach().double()
        found["b_enc"] = wide.to(found["b_enc"].dtype)
    if "threshold" in weights:
        found["threshold"] = taken("threshold", 0)
    return found


def _check(weights: Mapping[str, Tensor], apply_b_dec_to_input: bool) -> None:
    needed = [name for name in _SHAPES if name not in _OPTIONAL or (name == "b_dec" and apply_b_dec_to_input)]
    missing = [name for name in needed if name not in weights]
    unknown = [name for name in weights if name not in _SHAPES]
    if missing or unknown:
        raise ValueError(
            f"weights: must be {', '.join(_SHAPES)} of a ReLU or JumpReLU autoencoder; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
        )
    if weights["W_enc"].dim() != 2:
        raise ValueError(f"W_enc: must be [d, n], was {list(weights['W_enc'].shape)}")
    width, count = weights["W_enc"].shape
    for name, tensor in weights.items():
        shape = [{"d": width, "n": count}[axis] for axis in _SHAPES[name]]
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: must be {shape} beside W_enc, was {list(tensor.shape)}")
