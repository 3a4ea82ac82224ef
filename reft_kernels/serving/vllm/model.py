"""The edits in a model of vLLM's: one op behind each layer, that reads tables at addresses which stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...batch import Place
from ..config import ServingConfig
from ..worker import Worker
from .layers import find_layers

#: Whose tables the ops read: the worker whose step runs. (Compiled code is kept on disk and used by other
#: engines, so the ops can't name it.)
_current: Worker | None = None

_library = torch.library.Library("reft_serving", "DEF")
_library.define("edit_(Tensor(a!) h, int layer) -> ()")
_library.define("edit_sum_(Tensor(a!) h, Tensor(b!) addend, int layer) -> ()")


def _arguments(worker: Worker, h: Tensor, layer: int) -> tuple[Tensor, ...] | None:
    """What the op takes beside h; None where it has nothing to do."""
    captured = h.is_cuda and torch.cuda.is_current_stream_capturing()
    if not captured and not worker.tables.used[1]:
        return None
    return worker.arguments(h.shape[0], captured)[layer]


def _edit_(h: Tensor, layer: int) -> None:
    worker = _current
    if worker is not None and (arguments := _arguments(worker, h, layer)) is not None:
        worker.edit(h, *arguments)


def _edit_sum_(h: Tensor, addend: Tensor, layer: int) -> None:
    worker = _current
    if worker is not None and (arguments := _arguments(worker, h, layer)) is not None:
        worker.edit_sum(h, addend, *arguments)


for _name, _function in (("edit_", _edit_), ("edit_sum_", _edit_sum_)):
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"reft_serving::{_name}", lambda *arguments: None, lib=_library)


class _Edit:
    """A forward hook of one layer."""

    def __init__(self, layer: int, summed: bool) -> None:
        self.layer, self.summed = layer, summed

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self.summed:
            hidden, residual = output
            torch.ops.reft_serving.edit_sum_(residual, hidden, self.layer)
        else:
            torch.ops.reft_serving.edit_(output[0] if isinstance(output, tuple) else output, self.layer)


def attach(model: nn.Module, vllm_config: Any) -> Worker:
    """Puts the ops into a model that was just made, before anything is compiled.

    Raises Unsupported for a model whose layers are not found.
    """
    config = ServingConfig.parse(vllm_config.additional_config["reft"])
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    text = model_config.hf_text_config
    width, dtype = model_config.get_hidden_size(), model_config.dtype
    layers = find_layers(model, text.num_hidden_layers, width, dtype)
    device = next(model.parameters()).device
    worker = Worker(
        list(layers.modules),
        width,
        Place(device, dtype),
        max_adapters=config.max_adapters or scheduler.max_num_seqs,
        max_requests=scheduler.max_num_seqs,
        max_tokens=scheduler.max_num_batched_tokens,
        max_rank=config.max_rank,
        staged=config.staged,
    )
    for number, layer in layers.modules.items():
        layer.register_forward_hook(_Edit(number, layers.summed))
    worker.stage_first(list(config.adapters.values()))
    model.__dict__["reft_worker"] = worker
    use(worker)
    return worker


def worker_of(model: nn.Module) -> Worker | None:
    """That of a model that `attach` was called for."""
    return model.__dict__.get("reft_worker")


def use(worker: Worker) -> None:
    """The next forward is of this worker's model."""
    global _current
    _current = worker
