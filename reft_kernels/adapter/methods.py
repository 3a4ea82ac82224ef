"""The methods that there are; importing this registers them. `METHODS` has them by name.

Formulas are those of pyreft 0.1.0 (its interventions.py), whose `rotate_layer` is our R transposed and
whose `proj_layer` and `learned_source` are, for NoReFT and NoDiReFT, our (W2, b2) and (W1, b1).
LoReFT: Wu et al. 2024, arXiv 2404.03592, eq. 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.schema import ACT_MASK, NO_PRODUCT, Act
from ..pool import Fold
from .bottleneck import Bottleneck
from .elementwise import FoldedScale, Jola, Red
from .method import ACTIVATIONS, METHODS, Method, Options, Parameters, activation, flag, register_method
from .steering import Ablation, Concept, LoFiT, Sae, Vector

__all__ = ["ACTIVATIONS", "METHODS", "Method", "activation"]


def _difference(w: Tensor, b: Tensor, w2: Tensor, b2: Tensor | None, act: Act) -> Fold:
    """h + w2ᵀ(φ(w h + b) − w2 h − b2): LoReFT with w2 = R, and NoReFT. φ makes it twice the rows."""
    if act is Act.NONE:
        return Method.rows(w - w2, w2, b if b2 is None else b - b2)
    second = torch.zeros_like(b) if b2 is None else -b2
    return Method.joined(Method.rows(w, w2, b, act), Method.rows(-w2, w2, second))


class LoReft(Method):
    """h + Rᵀ(φ(W h + b) − R h)"""

    shapes = {"R": "rd", "W": "rd", "b": "r"}
    takes_activation = True
    orthonormal = ("R",)

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        return _difference(p["W"], p["b"], p["R"], None, act)


class NoReft(Method):
    """h + W2ᵀ(φ(W1 h + b1) − W2 h − b2)"""

    shapes = {"W1": "rd", "b1": "r", "W2": "rd", "b2": "r"}
    optional = frozenset({"b2"})
    takes_activation = True
    options = {"add_bias": flag(False)}

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        return _difference(p["W1"], p["b1"], p["W2"], p.get("b2"), act)

    def has(self, name: str, options: Options) -> bool:
        return options["add_bias"]

    def stored(self, options: Options) -> dict:
        return {}  # whether there is a b2 says it


class _Constant(Method):
    """What ConsReFT and LobiReFT share: R, and b drawn uniformly from [0, 1)."""

    shapes = {"R": "rd", "b": "r"}
    orthonormal = ("R",)

    def init(
        self, name: str, tensor: Tensor, width: int, options: Options, generator: torch.Generator | None
    ) -> None:
        if name == "b":
            tensor.uniform_(0, 1, generator=generator)
        else:
            super().init(name, tensor, width, options, generator)


class ConsReft(_Constant):
    """h + Rᵀ(b − R h)"""

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        return self.rows(-p["R"], p["R"], p["b"])


class LobiReft(_Constant):
    """h + Rᵀ b"""

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        return self.rows(None, p["R"], p["b"])


class DiReft(Method):
    """h + Rᵀ φ(W h + b)"""

    shapes = {"R": "rd", "W": "rd", "b": "r"}
    takes_activation = True
    orthonormal = ("R",)

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        return self.rows(p["W"], p["R"], p["b"], act)


class NoDiReft(Method):
    """h + W2ᵀ φ(W1 h + b1)"""

    shapes = {"W1": "rd", "b1": "r", "W2": "rd"}
    takes_activation = True

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        return self.rows(p["W1"], p["W2"], p["b1"], act)


class Folded(Method):
    """h + Uᵀ φ(D h + c), what a composition leaves; `kind` [r] int32 has the activation of every row."""

    shapes = {"down": "rd", "up": "rd", "bias": "r", "kind": "r"}
    fixed = frozenset({"kind"})
    trainable = False

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        return Fold(p["down"], p["up"], p["bias"], p["kind"])

    def check(self, p: Parameters, act: Act, options: Options) -> None:
        if p["kind"].dtype is not torch.int32:
            raise ValueError(f"kind: dtype must be torch.int32, was {p['kind'].dtype}")
        for value in torch.unique(p["kind"]).tolist():
            if value & ~(ACT_MASK | NO_PRODUCT) or (value & ACT_MASK) not in set(Act):
                raise ValueError(f"kind: {value} is no activation code, with or without the flag NO_PRODUCT")


register_method("loreft", LoReft())
register_method("noreft", NoReft())
register_method("consreft", ConsReft())
register_method("lobireft", LobiReft())
register_method("direft", DiReft())
register_method("nodireft", NoDiReft())
register_method("vector", Vector())
register_method("lofit", LoFiT())
register_method("ablation", Ablation())
register_method("concept", Concept())
register_method("sae", Sae())
register_method("adapter", Bottleneck())
register_method("red", Red())
register_method("jola", Jola())
register_method("folded", Folded())
register_method("folded_scale", FoldedScale())
