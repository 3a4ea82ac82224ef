"""The methods: which parameters each has, and how they fold to the one form h + Uᵀ φ(D h + c).

Formulas are those of pyreft 0.1.0 (its interventions.py), whose `rotate_layer` is our R transposed and
whose `proj_layer` and `learned_source` are, for NoReFT and NoDiReFT, our (W2, b2) and (W1, b1).
LoReFT: Wu et al. 2024, arXiv 2404.03592, eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.schema import NO_PRODUCT, Act
from ..pool import Fold

#: Names of activations (transformers' ACT2FN) → codes of the kernels.
ACTIVATIONS: dict[str, Act] = {
    "linear": Act.NONE,
    "relu": Act.RELU,
    "gelu": Act.GELU,
    "gelu_python": Act.GELU,
    "gelu_new": Act.GELU_TANH,
    "gelu_fast": Act.GELU_TANH,
    "gelu_accurate": Act.GELU_TANH,
    "gelu_python_tanh": Act.GELU_TANH,
    "gelu_pytorch_tanh": Act.GELU_TANH,
    "silu": Act.SILU,
    "swish": Act.SILU,
    "sigmoid": Act.SIGMOID,
    "tanh": Act.TANH,
    "quick_gelu": Act.QUICK_GELU,
    "leaky_relu": Act.LEAKY_RELU,
}


def activation(act_fn: str | None) -> Act:
    """The code of an activation's name. Raises ValueError that lists the names."""
    if act_fn is None:
        return Act.NONE
    if not isinstance(act_fn, str) or act_fn not in ACTIVATIONS:
        raise ValueError(f"act_fn: must be None or one of {', '.join(ACTIVATIONS)}; was {act_fn!r}")
    return ACTIVATIONS[act_fn]


Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One way to edit a hidden state.

    Attributes:
        shapes: parameter name → "rd" ([r, d]) or "r" ([r]), r the rank and d the width.
        fold: parameters (in one dtype, float32 at least) and activation code → Fold.
        optional: parameters that may be absent.
        takes_activation: whether an act_fn means something.
        splits: whether a nonlinear φ makes the fold 2r rows, because φ acts on a part of the product only.
        orthonormal: parameters whose rows are kept orthonormal in training.
        trainable: whether it can be trained here.
    """

    shapes: Mapping[str, str]
    fold: Callable[[Parameters, Act], Fold]
    optional: frozenset[str] = frozenset()
    takes_activation: bool = False
    splits: bool = False
    orthonormal: tuple[str, ...] = ()
    trainable: bool = False


def _kinds(like: Tensor, code: int) -> Tensor:
    return torch.full((like.shape[0],), int(code), dtype=torch.int32, device=like.device)


def _difference(w: Tensor, b: Tensor, w2: Tensor, b2: Tensor | None, act: Act) -> Fold:
    """h + w2ᵀ(φ(w h + b) − w2 h − b2): LoReFT with w2 = R, and NoReFT."""
    if act is Act.NONE:
        return Fold(w - w2, w2, b if b2 is None else b - b2, _kinds(w, Act.NONE))
    second = torch.zeros_like(b) if b2 is None else -b2
    kind = torch.cat([_kinds(w, act), _kinds(w, Act.NONE)])
    return Fold(torch.cat([w, -w2]), torch.cat([w2, w2]), torch.cat([b, second]), kind)


def _folded(p: Parameters, act: Act) -> Fold:
    return Fold(p["down"], p["up"], p["bias"], p["kind"])


METHODS: dict[str, Method] = {
    # h + Rᵀ(φ(W h + b) − R h)
    "loreft": Method(
        shapes={"R": "rd", "W": "rd", "b": "r"},
        fold=lambda p, act: _difference(p["W"], p["b"], p["R"], None, act),
        takes_activation=True,
        splits=True,
        orthonormal=("R",),
        trainable=True,
    ),
    # h + W2ᵀ(φ(W1 h + b1) − W2 h − b2)
    "noreft": Method(
        shapes={"W1": "rd", "b1": "r", "W2": "rd", "b2": "r"},
        fold=lambda p, act: _difference(p["W1"], p["b1"], p["W2"], p.get("b2"), act),
        optional=frozenset({"b2"}),
        takes_activation=True,
        splits=True,
    ),
    # h + Rᵀ(b − R h)
    "consreft": Method(
        shapes={"R": "rd", "b": "r"},
        fold=lambda p, act: Fold(-p["R"], p["R"], p["b"], _kinds(p["b"], Act.NONE)),
        orthonormal=("R",),
    ),
    # h + Rᵀ b
    "lobireft": Method(
        shapes={"R": "rd", "b": "r"},
        fold=lambda p, act: Fold(torch.zeros_like(p["R"]), p["R"], p["b"], _kinds(p["b"], NO_PRODUCT)),
        orthonormal=("R",),
    ),
    # h + Rᵀ φ(W h + b)
    "direft": Method(
        shapes={"R": "rd", "W": "rd", "b": "r"},
        fold=lambda p, act: Fold(p["W"], p["R"], p["b"], _kinds(p["b"], act)),
        takes_activation=True,
        orthonormal=("R",),
        trainable=True,
    ),
    # h + W2ᵀ φ(W1 h + b1)
    "nodireft": Method(
        shapes={"W1": "rd", "b1": "r", "W2": "rd"},
        fold=lambda p, act: Fold(p["W1"], p["W2"], p["b1"], _kinds(p["b1"], act)),
        takes_activation=True,
    ),
    # h + Uᵀ φ(D h + c): what a composition leaves, with `kind` [r] int32 holding the activation of every row.
    "folded": Method(
        shapes={"down": "rd", "up": "rd", "bias": "r", "kind": "r"},
        fold=_folded,
    ),
}
