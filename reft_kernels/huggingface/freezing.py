"""Freezing the base model while adapters train, and giving requires_grad back as it was."""

from __future__ import annotations

from torch import nn


def peft_parameters(model: nn.Module) -> set[int]:
    """Parameters of PEFT's adapters on the model: they go on training."""
    found: set[int] = set()
    for module in model.modules():
        for attribute in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, attribute, None)
            if isinstance(part, nn.Module):
                found.update(id(p) for p in part.parameters())
    return found


class Freeze:
    """Remembers which parameters of a model required a gradient before they were frozen."""

    def __init__(self) -> None:
        self._were: dict[str, bool] = {}

    def freeze(self, model: nn.Module, own: nn.Module) -> None:
        """Freezes what is neither `own` nor PEFT's. Again and again is the same as once."""
        keep = {id(p) for p in own.parameters()} | peft_parameters(model)
        for name, parameter in model.named_parameters():
            if id(parameter) not in keep:
                self._were.setdefault(name, parameter.requires_grad)
                parameter.requires_grad_(False)

    def thaw(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name, required in self._were.items():
            if name in parameters:
                parameters[name].requires_grad_(required)
        self._were.clear()
