"""Methods that scale and shift h element by element: s ⊙ h + v, which has no low-rank form.

RED: Wu et al. 2024, arXiv 2402.15179.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.schema import Act
from ..scale_pool import ScaleFold
from .method import Method, Options, Parameters, flag


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


class FoldedScale(Method):
    """(1 + scale_less_one) ⊙ h + shift, what a composition of elementwise edits leaves"""

    shapes = {"scale_less_one": "rd", "shift": "rd"}
    trainable = False
    rank = 1

    def fold(self, p: Parameters, act: Act, options: Options) -> ScaleFold:
        return _summed(p["scale_less_one"], p["shift"])
