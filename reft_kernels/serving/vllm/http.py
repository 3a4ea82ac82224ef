"""vLLM's HTTP server: adapters as models of their own name, loaded and unloaded at run time."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from ..catalog import NAME, Catalog
from ..config import Source
from .frontend import catalog_of, is_adapter
from .guard import wrong_request

_NO_BEAMS = "beam search asks the engine anew for every token, which then takes all before it for the prompt"


def refuse_beams(method: Any) -> Any:
    """A `beam_search` of vLLM's that refuses adapters which came as a LoRA."""

    @functools.wraps(method)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        lora = kwargs.get("lora_request")
        for one in lora if isinstance(lora, list) else [lora]:
            if one is not None and is_adapter(one.lora_path):
                raise wrong_request(f"use_beam_search: not with {one.lora_name!r}; {_NO_BEAMS}")
        return method(self, *args, **kwargs)

    return beam_search


def _refuse_beam_parameters(request_class: Any) -> None:
    original = request_class.to_beam_search_params

    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM drops vllm_xargs here.
        if NAME in (self.vllm_xargs or {}):
            raise wrong_request(f"use_beam_search: not with {NAME}; {_NO_BEAMS}")
        return original(self, *args, **kwargs)

    request_class.to_beam_search_params = to_beam_search_params


def install() -> None:
    """Hooks the HTTP server. Raises an ImportError or AttributeError for a vLLM that lacks a place."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    if hasattr(OpenAIServingModels.load_lora_adapter, "__wrapped__"):
        return
    BeamSearchOnlineMixin.beam_search = refuse_beams(BeamSearchOnlineMixin.beam_search)
    for request_class in (ChatCompletionRequest, CompletionRequest):
        _refuse_beam_parameters(request_class)
    _wrap_models(OpenAIServingModels)


def _wrap_models(models_class: Any) -> None:
    """The registry of names that a request may give as `model`."""
    init, load, unload = (
        models_class.init_static_loras,
        models_class.load_lora_adapter,
        models_class.unload_lora_adapter,
    )

    @functools.wraps(init)
    async def init_static_loras(self: Any) -> None:
        catalog = catalog_of(self.input_processor)
        if catalog is not None:
            for name in catalog.names:
                _offer(self, catalog, name)
        await init(self)

    @functools.wraps(load)
    async def load_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        catalog = catalog_of(self.input_processor)
        if catalog is None or not request.lora_path or not is_adapter(request.lora_path):
            return await load(self, request, *args, **kwargs)
        try:
            # Read here first, so that a folder with a mistake in it is the caller's error.
            await asyncio.to_thread(catalog.of_source, Source(request.lora_path))
        except (ValueError, OSError) as error:
            return _error(f"{request.lora_name}: {error}")
        answer = await load(self, request, *args, **kwargs)
        if isinstance(answer, str):
            catalog.add(request.lora_name, Source(request.lora_path))
        return answer

    @functools.wraps(unload)
    async def unload_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await unload(self, request, *args, **kwargs)
        catalog = catalog_of(self.input_processor)
        if isinstance(answer, str) and catalog is not None and request.lora_name in catalog.names:
            catalog.remove(request.lora_name)
        return answer

    models_class.init_static_loras = init_static_loras
    models_class.load_lora_adapter = load_lora_adapter
    models_class.unload_lora_adapter = unload_lora_adapter


def _offer(models: Any, catalog: Catalog, name: str) -> None:
    from vllm.lora.request import LoRARequest

    if models.is_base_model(name):
        raise ValueError(f"reft.adapters: {name!r} is the model's own name")
    number, path = models.lora_id_counter.inc(1), catalog.source(name).path
    models.lora_requests[name] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def _error(message: str) -> Any:
    from http import HTTPStatus

    from vllm.entrypoints.openai.models import serving

    return serving.create_error_response(
        message=message, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST
    )
