"""Plain eager hooks: what one writes by hand, one pass over the adapters of the batch at each layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import models
from .base import Runner, System


class EditHook:
    """h[rows] + (h[rows] @ D.T + c) @ U for each adapter; without rows, on all of h."""

    def __init__(self, runner: HooksRunner, weights: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.runner, self.weights = runner, weights

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        rows = self.runner.rows
        if rows is None:
            return None
        if len(self.weights) == 1 and self.runner.everywhere:
            down, up, bias = self.weights[0]
            edited = h + (h @ down.T + bias) @ up
        else:
            edited = h
            flat = h.view(-1, h.shape[-1])
            for (down, up, bias), index in zip(self.weights, rows):
                x = flat[index]
                flat[index] = x + (x @ down.T + bias) @ up
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
        where = {"device": setup.device, "dtype": setup.dtype}
        for place, layer in enumerate(setup.layers):
            weights = []
            for adapter in setup.adapters:
                one = adapter.interventions[place]
                weights.append(((one.W - one.R).to(**where), one.R.to(**where), one.b.to(**where)))
            models.blocks(self.model)[layer].register_forward_hook(EditHook(self, weights))
        self._choose = models.blocks(self.model)[0].register_forward_pre_hook(self._pick, with_kwargs=True)

    def _pick(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        self.rows = self.prompt_rows if h.shape[1] == self.setup.point.prompt else self.step_rows


class EagerHooks(System):
    name = "eager hooks"

    def why_not(self, setup):
        # The hooks tell a prompt from a decode step by its length.
        return "needs prompts of at least 2 tokens" if setup.point.prompt < 2 else None

    def build(self, setup):
        return HooksRunner(setup)
