"""Finds the decoder layers of a model of vLLM's, and what they return, without knowing the family by name."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

#: Rows of hidden states that a layer is tried with.
_ROWS = 3


class Unsupported(ValueError):
    """A model, or a feature of the engine, with which edits would not be right."""


class Layers(NamedTuple):
    """The layers of this process by their number in the model, and whether they return a sum of two."""

    modules: dict[int, nn.Module]
    summed: bool


def find_layers(model: nn.Module, depth: int, width: int, dtype: torch.dtype) -> Layers:
    """The layers among the model's modules.

    depth, width: of the whole model. Of a pipeline's other stages there are no layers here.

    Raises Unsupported where there is no one list of `depth` layers, or where what they return is not known.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(map(_is_layer, module))
    ]
    text = [pair for pair in lists if not _is_inner(pair[0], lists)]
    if len(text) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise Unsupported(
            f"reft: {type(model).__name__} must have one list of {depth} decoder layers; found are {found}"
        )
    modules = {number: layer for number, layer in enumerate(text[0][1]) if _is_layer(layer)}
    forms = {type(layer): returns_sum(layer, width, dtype) for layer in modules.values()}
    if len(set(forms.values())) != 1:
        raise Unsupported(f"reft: the layers of {type(model).__name__} return different things")
    return Layers(modules, next(iter(forms.values())))


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of this process; vLLM has a placeholder for those of other stages."""
    return type(module).__name__ not in ("PPMissingLayer", "StageMissingLayer") and any(
        True for _ in module.children()
    )


def _is_inner(name: str, lists: Sequence[tuple[str, nn.Module]]) -> bool:
    return any(name.startswith(other + ".") for other, _ in lists)


def returns_sum(layer: nn.Module, width: int, dtype: torch.dtype) -> bool:
    """Whether a layer returns (hidden states, residual), whose sum is its output, rather than the output.

    Found out by running it with its attention and its MLP giving zeros: its output is then its input.

    Raises Unsupported where neither is so.
    """
    parameters = inspect.signature(layer.forward).parameters
    takes_residual = "residual" in parameters
    device = next(layer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    h, residual = (torch.randn(_ROWS, width, generator=generator).to(device, dtype) for _ in range(2))
    expected = h + residual if takes_residual else h.clone()
    given = {"positions": torch.arange(_ROWS, device=device), "hidden_states": h.clone()}
    if takes_residual:
        given["residual"] = residual.clone()
    missing = [
        name
        for name, one in parameters.items()
        if one.default is one.empty
        and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        and name not in given
    ]
    given = {name: value for name, value in given.items() if name in parameters}
    if missing or "hidden_states" not in given:
        raise Unsupported(f"reft: {type(layer).__name__}.forward takes {', '.join(parameters)}: not known")
    try:
        with _without_parts(layer), torch.inference_mode():
            output = layer.forward(**given)
    except Exception as error:
        raise Unsupported(
            f"reft: {type(layer).__name__} could not be tried: {type(error).__name__}: {error}"
        ) from error
    both = isinstance(output, tuple) and len(output) == 2 and takes_residual
    tensors = output if isinstance(output, tuple) else (output,)
    if (both or len(tensors) == 1) and all(isinstance(one, torch.Tensor) for one in tensors):
        total = sum(one.float() for one in tensors)
        if torch.allclose(total, expected.float(), rtol=2e-2, atol=2e-2):
            return both
    raise Unsupported(
        f"reft: what {type(layer).__name__} returns is neither its output nor two tensors that add up to it"
    )


@contextlib.contextmanager
def _without_parts(layer: nn.Module) -> Iterator[None]:
    """Inside, the layer's parts that have matrices (attention, MLP) give zeros."""
    parts = [part for part in layer.children() if any(p.dim() > 1 for p in part.parameters())]
    if not parts:
        raise Unsupported(f"{type(layer).__name__} has no attention and no MLP")
    try:
        for part in parts:
            part.__dict__["forward"] = _zeros
        yield
    finally:
        for part in parts:
            del part.__dict__["forward"]


def _zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
    h = kwargs.get("hidden_states")
    if h is None:
        h = next(one for one in (*args, *kwargs.values()) if torch.is_tensor(one) and one.is_floating_point())
    return torch.zeros_like(h)
