"""The linear layers behind which, or in front of which, the sites of a model lie."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

#: Makes a context in which a model runs without adapters.
Bare = Callable[[], contextlib.AbstractContextManager]


def is_projection(module: nn.Module) -> bool:
    """Whether it is a plain linear layer, and no quantised or wrapped one."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """[out, in]; transformers' Conv1D keeps it the other way round."""
    return weight if type(module) is nn.Linear else weight.mT


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Without dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def projections_behind(model: nn.Module, modules: set[nn.Module], bare: Bare) -> dict[nn.Module, nn.Module]:
    """For each module the linear layer in it whose output is its output, untouched; those without are absent.

    Runs the model on three tokens, and compares where in memory the outputs lie.
    """
    outputs: dict[nn.Module, Tensor] = {}
    handles = []

    def note(module: nn.Module, args: object, output: object) -> None:
        h = output[0] if isinstance(output, tuple) else output
        if isinstance(h, Tensor):
            outputs[module] = h  # kept, so that its memory is not given to another

    inner = {part for module in modules for part in module.modules() if is_projection(part)}
    try:
        for module in modules | inner:
            handles.append(module.register_forward_hook(note))
        device = next(model.parameters()).device
        with bare(), _in_eval(model):
            model(input_ids=torch.arange(3, device=device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[nn.Module, nn.Module] = {}
    for module in modules & outputs.keys():
        for part in module.modules():
            if part in inner and part in outputs and _same_memory(outputs[part], outputs[module]):
                found[module] = part
    return found


def _same_memory(one: Tensor, other: Tensor) -> bool:
    place = (other.data_ptr(), other.shape, other.stride())
    return (one.data_ptr(), one.shape, one.stride()) == place
