"""Bottleneck adapters behind a block, an attention or an MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.schema import Act
from ..pool import Fold
from .method import Method, Options, Parameters, flag


class Bottleneck(Method):
    """h + W_upᵀ φ(W_down h + b_down) + b_up

    Houlsby et al. 2019, arXiv 1902.00751. On decoders whose residual stream is not normed behind the block it
    is AdapterHub's `SeqBnConfig` at block_output, and its `DoubleSeqBnConfig` at attention_output and
    mlp_output; a factor of theirs is multiplied into W_up and b_up. A fresh one edits nothing: W_up and the
    biases are 0, W_down is as of a torch.nn.Linear.
    """

    shapes = {"W_down": "rd", "b_down": "r", "W_up": "rd", "b_up": "d"}
    optional = frozenset({"b_down", "b_up"})
    takes_activation = True
    options = {"bias": flag(True)}

    def has(self, name: str, options: Options) -> bool:
        return options["bias"]

    def stored(self, options: Options) -> dict:
        return {}  # which biases there are says it

    def init(
        self, name: str, tensor: Tensor, width: int, options: Options, generator: torch.Generator | None
    ) -> None:
        if name == "W_down":
            super().init(name, tensor, width, options, generator)
        else:
            tensor.zero_()

    def fold(self, p: Parameters, act: Act, options: Options) -> Fold:
        down, up = p["W_down"], p["W_up"]
        fold = self.rows(down, up, p["b_down"] if "b_down" in p else torch.zeros_like(down[:, 0]), act)
        if "b_up" not in p:
            return fold
        return self.joined(fold, self.rows(None, p["b_up"][None], torch.ones_like(down[:1, 0])))
