"""Finding a model's decoder blocks, and the modules of its sites, without knowing the family by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..sites import HEAD_SITE, SITES


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


#: Names that families give the parts of a block.
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "output")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_ATTENTION_OUT = ("o_proj", "c_proj", "dense", "out_proj", "wo")


def _part(module: nn.Module, names: tuple[str, ...], site: str) -> nn.Module:
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            return part
    raise ValueError(
        f"site: {site!r} was not found in {type(module).__name__}; "
        f"none of its parts is called {', '.join(names)}"
    )


def site_module(block: nn.Module, site: str) -> nn.Module:
    """The module of a block whose output (or input, for the last of these) is the site.

    block_output, block_input: the block; mlp_output: its MLP; attention_output: its attention;
    head_attention_value_output: the attention's output projection, whose input holds the heads.
    """
    if site in ("block_output", "block_input"):
        return block
    if site == "mlp_output":
        return _part(block, _MLP, site)
    attention = _part(block, _ATTENTION, site)
    if site == "attention_output":
        return attention
    if site == HEAD_SITE:
        return _part(attention, _ATTENTION_OUT, site)
    raise ValueError(f"site: unknown site {site!r}; allowed are {', '.join(map(repr, SITES))}")


def head_width(model: nn.Module) -> int:
    """d of one attention head."""
    config = text_config(model)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def edits_input(site: str) -> bool:
    """Whether the site is the input of its module."""
    return site in ("block_input", HEAD_SITE)


def _floating(tensors: Iterator[torch.Tensor]) -> torch.Tensor | None:
    return next((t for t in tensors if t.is_floating_point() and t.device.type != "meta"), None)


def place_of(block: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a block's hidden states are expected: device and dtype (corrected at the first call if not)."""
    sample = _floating(block.parameters()) if not hasattr(block, "_hf_hook") else None
    if sample is None:
        sample = _floating(model.parameters())
    if sample is None:
        return torch.device("cpu"), torch.get_default_dtype()
    return sample.device, sample.dtype
