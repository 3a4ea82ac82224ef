"""Models to measure on: named shapes with random weights, or a path or hub name; twins share weights."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from .record import ResultError

#: Llama shapes: hidden size, layers, intermediate size, heads, key-value heads, vocabulary.
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (64, 2, 128, 4, 4, 256),
    "llama-512x8": (512, 8, 1408, 8, 8, 16000),
    "llama-1024x8": (1024, 8, 2816, 16, 16, 32000),
    "1b": (2048, 16, 8192, 32, 8, 128256),
    "7b": (4096, 32, 11008, 32, 32, 32000),
    "8b": (4096, 32, 14336, 32, 8, 128256),
    # A quarter of its layers and of its vocabulary: the share of each part of a step is the same, and what an
    # edit adds to a layer has the same weight, in a quarter of the time and with a fourth of the compiling.
    "8b-quarter": (4096, 8, 14336, 32, 8, 32064),
}

_FREE_SHAPE = re.compile(r"llama-(\d+)x(\d+)")


def _shape(name: str) -> tuple[int, int, int, int, int, int] | None:
    if name in SHAPES:
        return SHAPES[name]
    match = _FREE_SHAPE.fullmatch(name)
    if match is None:
        return None
    width, depth = int(match[1]), int(match[2])
    if width < 64 or width % 64 or depth < 1:
        raise ResultError(f"--model {name}: the width must be a multiple of 64, with at least one layer")
    return width, depth, width * 11 // 4, width // 64, width // 64, 32000


def build(name: str, dtype: torch.dtype, device: str, seed: int) -> nn.Module:
    """The model in eval mode, frozen: a named shape, "llama-<width>x<layers>", a path or a hub name.

    Raises: ResultError for a name that is neither a shape nor something that transformers can load.
    """
    import transformers

    shape = _shape(name)
    if shape is None:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
        except (OSError, ValueError) as error:
            shapes = ", ".join(SHAPES)
            reason = str(error).splitlines()[0]
            raise ResultError(
                f"--model {name}: no shape ({shapes}, llama-<width>x<layers>) and can't be loaded: {reason}"
            ) from error
    else:
        model = random_llama(shape, dtype, device, seed)
    return model.eval().requires_grad_(False)


def random_llama(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: str, seed: int
) -> nn.Module:
    """A frozen Llama in eval mode with random weights; shape: as in `SHAPES`."""
    import transformers

    width, depth, inner, heads, kv_heads, vocabulary = shape
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def depth(model: nn.Module) -> int:
    """Number of decoder layers."""
    return model.config.get_text_config().num_hidden_layers


def width(model: nn.Module) -> int:
    """Length of a hidden state."""
    return model.config.get_text_config().hidden_size


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder layers."""
    count = depth(model)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ResultError(f"{type(model).__name__}: no list of {count} decoder layers was found")


def twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares all parameters and buffers with `model`.

    Systems that are compared then read the same memory: no system is lucky with where its weights lie, and
    a model of any size fits once.
    """
    shared: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        shared[id(tensor)] = tensor
    return copy.deepcopy(model, shared)


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` layers, evenly spread, the last one always among them."""
    return sorted({total - 1 - (index * total) // count for index in range(count)})
