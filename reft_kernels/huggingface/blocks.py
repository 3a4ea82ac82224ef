"""Finding a model's decoder blocks, without knowing the family by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


class NotPatchable(ValueError):
    """The model has no decoder layers that could be found, or is patched already."""


class Blocks(NamedTuple):
    """A model's blocks. `stack` is their parent: its forward runs them all."""

    stack: nn.Module
    layers: nn.ModuleList
    width: int


def text_config(model: nn.Module):
    """The configuration that describes the blocks (the text part of a multimodal model)."""
    config = getattr(model, "config", None)
    if config is None:
        raise NotPatchable(f"model: expected a Hugging Face model with a config, was {type(model).__name__}")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_blocks(model: nn.Module) -> Blocks:
    """The ModuleList of blocks: as many as the config has layers, each a GradientCheckpointingLayer.

    (The longest ModuleList would be wrong: Mixtral's experts.) Raises NotPatchable where there is none, or
    more than one, as in encoder-decoder models.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # here: the ops need no transformers

    config = text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    found: list[tuple[nn.Module, nn.ModuleList]] = []
    for parent in model.modules():
        for child in parent.children():
            if (
                isinstance(child, nn.ModuleList)
                and len(child) == depth
                and all(isinstance(layer, GradientCheckpointingLayer) for layer in child)
            ):
                found.append((parent, child))
    if len(found) > 1 and hasattr(model, "get_decoder") and not getattr(config, "is_encoder_decoder", False):
        decoder = model.get_decoder()  # type: ignore[operator]
        found = [pair for pair in found if pair[0] is decoder] or found
    if not found:
        raise NotPatchable(
            f"model: no decoder layers were found in {type(model).__name__}: no ModuleList of "
            f"{depth} transformer layers"
        )
    if len(found) > 1:
        raise NotPatchable(
            f"model: {type(model).__name__} has {len(found)} stacks of {depth} layers; encoder-decoder "
            "models are not supported. Patch the part that you want to edit"
        )
    return Blocks(found[0][0], found[0][1], config.hidden_size)


def _floating(tensors: Iterator[torch.Tensor]) -> torch.Tensor | None:
    return next((t for t in tensors if t.is_floating_point() and t.device.type != "meta"), None)


def place_of(block: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where hidden states of a block (or another module) are expected: device and dtype (corrected at the
    first call if not)."""
    sample = _floating(block.parameters()) if not hasattr(block, "_hf_hook") else None
    if sample is None:
        sample = _floating(model.parameters())
    if sample is None:
        return torch.device("cpu"), torch.get_default_dtype()
    return sample.device, sample.dtype
