"""LoRA by PEFT: merged (the baseline), unmerged, and unmerged with mixed adapter_names."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from . import models
from .base import BASELINE, Runner, Setup, System, Unable, quiet


def peft_missing() -> str | None:
    return None if importlib.util.find_spec("peft") else "PEFT is not installed (pip install peft)"


def _config(setup: Setup) -> Any:
    from peft import LoraConfig

    # Random B, so that a merge changes the weights; PEFT's own choice of modules for the model type.
    return LoraConfig(
        r=setup.point.rank,
        lora_alpha=2 * setup.point.rank,
        layers_to_transform=setup.layers,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def lora(setup: Setup, base: nn.Module, count: int) -> Any:
    """A PEFT model on `base` with `count` LoRAs "l0", "l1", …; the same weights for the same seed."""
    from peft import get_peft_model

    torch.manual_seed(setup.seed)
    with quiet():
        try:
            model = get_peft_model(base, _config(setup), adapter_name="l0")
        except ValueError as error:
            raise Unable(f"PEFT: {str(error).splitlines()[0]}") from error
        for number in range(1, count):
            model.add_adapter(f"l{number}", _config(setup))
    return model.to(setup.device).eval().requires_grad_(False)


def merge(setup: Setup) -> nn.Module:
    """A model with a LoRA merged into its own copy of the target weights; all else is shared."""
    base = models.twin(setup.original)
    model = lora(setup, base, 1)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            inner = module.get_base_layer()
            inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    return model.merge_and_unload()


class MergedLora(System):
    """The model with the LoRA in its weights, or without PEFT the bare model, which costs the same."""

    name, family = BASELINE, "lora"

    def build(self, setup):
        runner = Runner(setup, models.twin(setup.merged))
        runner.single = True
        return runner


class BareModel(System):
    """The model as it was loaded: what the baseline costs but for what PEFT leaves behind."""

    name, family = "bare model", "bare"

    def build(self, setup):
        runner = Runner(setup, models.twin(setup.original))
        runner.single = True
        return runner


class LoraRunner(Runner):
    def __init__(self, setup: Setup, count: int) -> None:
        super().__init__(setup, lora(setup, models.twin(setup.original), count))
        self.count = count

    def arguments(self):
        if self.count == 1:
            return {}
        return {"adapter_names": [f"l{number}" for number in self.setup.adapter_of]}


class UnmergedLora(System):
    name, family = "PEFT LoRA unmerged", "lora"

    def why_not(self, setup):
        return peft_missing()

    def build(self, setup):
        runner = LoraRunner(setup, 1)
        runner.single = True
        return runner


class MixedLora(System):
    name, family = "PEFT LoRA mixed", "lora"

    def why_not(self, setup):
        if setup.point.adapters == 1:
            return "one adapter only: nothing to mix"
        return peft_missing()

    def build(self, setup):
        return LoraRunner(setup, setup.point.adapters)
