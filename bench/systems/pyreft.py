"""pyreft, the reference library: its hooks, with one adapter for the whole batch (it can't mix)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from . import adapters, models
from .base import Runner, Setup, System, Unable, quiet


def pyreft_missing() -> str | None:
    for package in ("pyreft", "pyvene"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install --no-deps pyreft pyvene)"
    return None


def imported() -> Any:
    """pyreft, without what pyvene prints as it is imported. Raises Unable."""
    try:
        with quiet():
            import pyreft
    except ImportError as error:
        raise Unable(f"pyreft can't be imported: {error}") from error
    return pyreft


def interventions(pyreft: Any, setup: Setup, base: nn.Module) -> Any:
    """pyreft's model on `base`, with the weights of the setup's first adapter."""
    representations = []
    for layer, one in zip(setup.layers, setup.adapters[0].interventions):
        intervention = pyreft.LoreftIntervention(
            embed_dim=models.width(base), low_rank_dimension=setup.point.rank, dtype=setup.dtype
        )
        with torch.no_grad():
            intervention.rotate_layer.weight = one.R.T.contiguous()
            intervention.learned_source.weight.copy_(one.W)
            intervention.learned_source.bias.copy_(one.b)
        representations.append(
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": setup.point.rank,
                "intervention": intervention,
            }
        )
    with quiet():
        config = pyreft.ReftConfig(representations=representations)
        model = pyreft.get_reft_model(base, config, set_device=False)
    model.set_device(setup.device)
    return model


class PyreftRunner(Runner):
    single = True

    def __init__(self, setup: Setup) -> None:
        pyreft = imported()
        model = interventions(pyreft, setup, models.twin(setup.merged))
        model.eval()  # pyvene's returns None
        super().__init__(setup, model)
        self.locations: Any = None
        if not setup.every_position:
            one_layer = [setup.prompt_positions()] * setup.point.batch
            self.locations = {"sources->base": (None, [one_layer] * len(setup.layers))}

    def call(self, decode, **inputs):
        if decode and self.locations is not None:
            raise Unable("pyreft has no decode step of its own for prompt positions")
        _, out = self.model(inputs, unit_locations=self.locations)
        return out

    def generate(self, tokens, **options):
        # For prompt positions pyreft edits the prompt only; without locations, every token.
        arguments = self.generation(tokens) | options
        base = {name: arguments.pop(name) for name in ("input_ids", "attention_mask")}
        _, out = self.model.generate(
            base, unit_locations=self.locations, intervene_on_prompt=True, **arguments
        )
        return out


class Pyreft(System):
    name = "pyreft"

    def why_not(self, setup):
        if (setup.point.method, setup.point.site) != (adapters.METHOD, adapters.SITE):
            return f"set up for {adapters.METHOD} at {adapters.SITE}"
        return pyreft_missing()

    def build(self, setup):
        return PyreftRunner(setup)
