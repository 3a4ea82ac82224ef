"""Methods that scale and shift h element by element: s ⊙ h + v, which has no low-rank form.

RED: Wu et al. 2024, arXiv 2402.15179. JoLA: Lai et al. 2025, arXiv 2502.01179; where the paper and the
authors' code (jola 0.0.1) differ, the code is meant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.schema import Act
from ..scale_pool import ScaleFold
from ..sites import HEAD_SITE
from .method import Method, Option, Options, Parameters, flag, number

#: JoLA's hard concrete gates: temperature, the ends of the stretch, how far off 0 and 1 the noise is kept.
_TEMPERATURE, _LOW, _HIGH, _EPS = 0.33, -0.1, 1.1, 1e-6


def _summed(scale_less_one: Tensor, shift: Tensor) -> ScaleFold:
    """The sum of r such edits, s − 1 and v [r, d] of each, all of the unedited h."""
    return ScaleFold(scale_less_one.sum(0, keepdim=True), shift.sum(0, keepdim=True))


class Red(Method):
    """scaling ⊙ h + bias"""

    shapes = {"scaling": "rd", "bias": "rd"}
    optional = frozenset({"bias"})
    options = {"bias": flag(True)}
    rank = 1

    def has(self, name: str, options: Options) -> bool:
        return options["bias"]

    def stored(self, options: Options) -> dict:
        return {}  # whether there is a bias says it

    def init(
        self, name: str, tensor: Tensor, width: int, options: Options, generator: torch.Generator | None
    ) -> None:
        tensor.fill_(1.0 if name == "scaling" else 0.0)

    def fold(self, p: Parameters, act: Act, options: Options) -> ScaleFold:
        scaling = p["scaling"]
        return _summed(scaling - 1, p["bias"] if "bias" in p else torch.zeros_like(scaling))


def _gate(log_g: Tensor, noise: Tensor | None) -> Tensor:
    """In [0, 1]; 0 and 1 themselves are likely. noise: that of training, logits of uniform numbers."""
    concrete = log_g if noise is None else (log_g + noise) / _TEMPERATURE
    return (torch.sigmoid(concrete) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


class Jola(Method):
    """(1 + g2 A) ⊙ z + g1 v, z the output of one attention head, g1 and g2 gates in [0, 1]

    A gate is clamp(1.2 σ(log_g) − 0.1, 0, 1), in training with noise: σ((log_g + logit u) / 0.33) takes the
    place of σ(log_g), u uniform and drawn for each forward. (The authors divide by 0.33 in training alone, so
    this is not its expectation.) The penalty of a head is penalty · (gate_lambda · p(log_g1) +
    (1 − gate_lambda) · p(log_g2)), where p is the probability that a gate is open. The authors' code weighs
    it by 1 / (layers · heads²), 2⁻¹⁵ for 32 layers of 32 heads, and changes gate_lambda in training.
    """

    shapes = {"A": "rd", "v": "rd", "log_g1": "r", "log_g2": "r"}
    options = {
        "penalty": number(2.0**-15),
        "gate_lambda": Option(4e-5, lambda value: isinstance(value, float) and 0 <= value <= 1, "in [0, 1]"),
    }
    sites = (HEAD_SITE,)
    rank = 1

    def init(
        self, name: str, tensor: Tensor, width: int, options: Options, generator: torch.Generator | None
    ) -> None:
        if name in ("A", "v"):
            tensor.normal_(0, 1e-3, generator=generator)
        else:  # xavier_uniform_ of [32, 1], the gates of 32 heads
            bound = math.sqrt(6 / 33)
            tensor.uniform_(-bound, bound, generator=generator)

    def draw(self, p: Parameters, options: Options) -> dict[str, Tensor]:
        def logits(like: Tensor) -> Tensor:
            wide = torch.promote_types(like.dtype, torch.float32)
            return torch.rand_like(like, dtype=wide).mul(1 - 2 * _EPS).add(_EPS).logit()

        return {"noise1": logits(p["log_g1"]), "noise2": logits(p["log_g2"])}

    def fold(self, p: Parameters, act: Act, options: Options) -> ScaleFold:
        g1, g2 = (_gate(p[f"log_g{i}"], p.get(f"noise{i}"))[:, None] for i in (1, 2))
        return _summed(g2 * p["A"], g1 * p["v"])

    def penalty(self, p: Parameters, options: Options) -> Tensor:
        shift = _TEMPERATURE * math.log(-_LOW / _HIGH)
        open1, open2 = (torch.sigmoid(p[f"log_g{i}"] - shift).clamp(_EPS, 1 - _EPS).sum() for i in (1, 2))
        weight = options["gate_lambda"]
        return options["penalty"] * (weight * open1 + (1 - weight) * open2)


class FoldedScale(Method):
    """(1 + scale_less_one) ⊙ h + shift, what a composition of elementwise edits leaves"""

    shapes = {"scale_less_one": "rd", "shift": "rd"}
    trainable = False
    rank = 1

    def fold(self, p: Parameters, act: Act, options: Options) -> ScaleFold:
        return _summed(p["scale_less_one"], p["shift"])
