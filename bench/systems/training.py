"""The systems of `reft-bench train`: what trains, on a frozen model, and the loss of a batch."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn

import reft_kernels as rk
from reft_kernels import ops

from . import models
from .base import Setup, System, quiet
from .lora import peft_missing
from .pyreft import imported as imported_pyreft
from .pyreft import interventions, pyreft_missing

BASELINE, CONTROL = "one vector", "one vector (A/A)"


class Trainee:
    """A frozen model with something to train.

    Attributes:
        model: in train mode.
        parameters: what the optimizer gets.
        probe: tensors whose gradients are compared with the reference's; (W, b) of each layer, or nothing.
        fresh: before the first step it computes what the bare model computes.
    """

    fresh = False

    def __init__(self, setup: Setup, model: nn.Module, parameters: list[Tensor]) -> None:
        self.setup, self.model, self.parameters = setup, model, parameters
        self.probe: list[Tensor] = []
        model.train()

    def context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, labels=labels, use_cache=False).loss


class Step:
    """One training step: forward, backward, AdamW."""

    def __init__(self, trainee: Trainee, input_ids: Tensor, labels: Tensor) -> None:
        self.trainee, self.input_ids, self.labels = trainee, input_ids, labels
        self.optimizer = torch.optim.AdamW(trainee.parameters, lr=1e-4)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.trainee.loss(self.input_ids, self.labels).backward()
        self.optimizer.step()


class OneVector(System):
    """The frozen model with one vector added at the first edited layer: the least that training can cost."""

    name = BASELINE

    def build(self, setup):
        model = models.twin(setup.original)
        vector = nn.Parameter(torch.zeros(models.width(model), device=setup.device, dtype=setup.dtype))

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + vector, *output[1:])
            return output + vector

        models.blocks(model)[setup.layers[0]].register_forward_hook(add)
        trainee = Trainee(setup, model, [vector])
        trainee.fresh = True
        return trainee


class OursTrainee(Trainee):
    def __init__(self, setup: Setup, backend: str) -> None:
        model = models.twin(setup.original)
        self.backend = backend
        adapter = copy.deepcopy(setup.adapters[0])
        adapter.trainable = True
        rk.patch(model).add_adapter("a0", adapter)
        super().__init__(setup, model, list(adapter.parameters()))
        self.probe = [tensor for one in adapter.interventions for tensor in (one.W, one.b)]

    def context(self):
        return rk.backend(self.backend)


class Ours(System):
    def __init__(self, backend: str) -> None:
        self.backend, self.name = backend, f"reft_kernels {backend}"

    def why_not(self, setup):
        return ops.why_not(self.backend, setup.device.type)

    def build(self, setup):
        return OursTrainee(setup, self.backend)


class Lora(System):
    """PEFT's LoRA on its own choice of modules, in the same layers."""

    name = "PEFT LoRA"

    def why_not(self, setup):
        return peft_missing()

    def build(self, setup):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=setup.point.rank,
            lora_alpha=2 * setup.point.rank,
            layers_to_transform=setup.layers,
            task_type="CAUSAL_LM",
        )
        with quiet():
            model = get_peft_model(models.twin(setup.original), config).to(setup.device)
        trainee = Trainee(setup, model, [p for p in model.parameters() if p.requires_grad])
        trainee.fresh = True
        return trainee


class PyreftTrainee(Trainee):
    def __init__(self, setup: Setup) -> None:
        pyreft = imported_pyreft()
        model = interventions(pyreft, setup, models.twin(setup.original))
        trained = list(model.interventions.values())
        super().__init__(setup, model, [p for one in trained for p in one.parameters() if p.requires_grad])
        self.probe = [t for one in trained for t in (one.learned_source.weight, one.learned_source.bias)]
        self.locations = None
        if not setup.every_position:
            one_layer = [setup.prompt_positions()] * setup.point.batch
            self.locations = {"sources->base": (None, [one_layer] * len(setup.layers))}

    def loss(self, input_ids, labels):
        inputs = {"input_ids": input_ids, "labels": labels, "use_cache": False}
        _, out = self.model(inputs, unit_locations=self.locations)
        return out.loss


class Pyreft(System):
    name = "pyreft"

    def why_not(self, setup):
        return pyreft_missing()

    def build(self, setup):
        return PyreftTrainee(setup)


def all_systems() -> dict[str, System]:
    """Name → system, the baseline first."""
    found: list[System] = [OneVector(), *(Ours(name) for name in ops.BACKENDS), Lora(), Pyreft()]
    return {system.name: system for system in found}
