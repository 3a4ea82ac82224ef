"""Plain eager hooks: what one writes by hand, one pass over the adapters of the batch at each layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import reft_kernels as rk
from reft_kernels.ops.schema import ACT_MASK, NO_PRODUCT

from . import adapters, models
from .base import Runner, Setup, System


class Edit:
    """h + (h @ D.T + c) @ U; a constant edit is one vector, and h is not multiplied."""

    def __init__(self, fold: rk.Fold, setup: Setup) -> None:
        where = {"device": setup.device, "dtype": setup.dtype}
        self.constant: Tensor | None = None
        if bool((fold.kind & NO_PRODUCT).all()):
            self.constant = (fold.bias @ fold.up).to(**where)
        self.down, self.up, self.bias = (t.to(**where) for t in (fold.down, fold.up, fold.bias))

    def __call__(self, h: Tensor) -> Tensor:
        if self.constant is not None:
            return h + self.constant
        return h + (h @ self.down.T + self.bias) @ self.up


class EditHook:
    """The edit of each adapter on its rows of h; without rows, on all of h."""

    def __init__(self, runner: HooksRunner, weights: list[Edit]) -> None:
        self.runner, self.weights = runner, weights

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        rows = self.runner.rows
        if rows is None:
            return None
        if len(self.weights) == 1 and self.runner.everywhere:
            edited = self.weights[0](h)
        else:
            edited = h
            flat = h.view(-1, h.shape[-1])
            for edit, index in zip(self.weights, rows):
                flat[index] = edit(flat[index])
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


class HooksRunner(Runner):
    attributed = (__name__,)

    def __init__(self, setup) -> None:
        super().__init__(setup, models.twin(setup.merged))
        point = setup.point
        self.everywhere = setup.every_position
        batch_rows = torch.tensor(setup.adapter_of)
        of_adapter = [torch.nonzero(batch_rows == number).flatten() for number in range(point.adapters)]
        positions = torch.tensor(setup.prompt_positions())
        self.prompt_rows = [
            (rows[:, None] * point.prompt + positions).flatten().to(setup.device) for rows in of_adapter
        ]
        self.step_rows = [rows.to(setup.device) for rows in of_adapter] if self.everywhere else None
        self.rows: list[Tensor] | None = None
        for place, layer in enumerate(setup.layers):
            weights = [Edit(adapter.interventions[place].fold(), setup) for adapter in setup.adapters]
            models.blocks(self.model)[layer].register_forward_hook(EditHook(self, weights))
        self._choose = models.blocks(self.model)[0].register_forward_pre_hook(self._pick, with_kwargs=True)

    def _pick(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        self.rows = self.prompt_rows if h.shape[1] == self.setup.point.prompt else self.step_rows


class EagerHooks(System):
    name = "eager hooks"

    def why_not(self, setup):
        if setup.point.site != adapters.SITE:
            return f"written for {adapters.SITE}"
        fold: object = setup.adapters[0].interventions[0].fold()
        # A constant row has D = 0; a φ, or an edit that is no fold, is not what these hooks do.
        if not isinstance(fold, rk.Fold) or bool((fold.kind & ACT_MASK).any()):
            return "written for edits that are linear in h"
        # The hooks tell a prompt from a decode step by its length.
        return "needs prompts of at least 2 tokens" if setup.point.prompt < 2 else None

    def build(self, setup):
        return HooksRunner(setup)
