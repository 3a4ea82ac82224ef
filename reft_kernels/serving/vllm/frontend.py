"""In the process that takes requests in: which adapter a request asks for, and what is refused."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

from ... import __version__
from ..catalog import NAME, SCALE, Catalog, Model
from ..config import ServingConfig, Source
from ..ticket import Ticket
from .extension import NAME as EXTENSION
from .guard import asked_for, wrong_request
from .layers import Unsupported
from .runner import FIELD
from .staging import Staging, check_version


def check_config(config: Any) -> None:
    """Refuses what edits would be wrong with, and sets what the plugin needs. Raises ValueError."""
    serving = ServingConfig.parse(config.additional_config["reft"])
    requests = config.scheduler_config.max_num_seqs
    if serving.max_adapters is not None and serving.max_adapters < requests:
        raise ValueError(
            f"reft.max_adapters: {serving.max_adapters} adapters can't serve the {requests} requests that "
            "run together (max_num_seqs), each of which may ask for another; raise one or lower the other"
        )
    for what, wrong in _unsupported(config).items():
        if wrong:
            raise Unsupported(f"reft: adapters are not served with {what}")
    taken = config.parallel_config.worker_extension_cls
    if taken not in ("", None, EXTENSION):
        raise Unsupported(f"reft: needs worker_extension_cls for itself, was {taken!r}")
    config.parallel_config.worker_extension_cls = EXTENSION
    # It is a part of the key under which vLLM keeps compiled models.
    config.additional_config["reft"] = {**config.additional_config["reft"], "plugin": __version__}


def _unsupported(config: Any) -> dict[str, bool]:
    """Features, and whether they are on."""
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    passes = config.compilation_config.pass_config
    return {
        "speculative decoding": config.speculative_config is not None,
        "dual-batch overlap": bool(getattr(parallel, "use_ubatching", False)),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "sequence-parallel MoE": bool(getattr(parallel, "use_sequence_parallel_moe", False)),
        "sequence parallelism (pass_config.enable_sp)": bool(getattr(passes, "enable_sp", False)),
        "KV connectors, whose caches know no adapter": config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": bool(getattr(cache, "kv_sharing_fast_prefill", False)),
        "sleep mode": bool(getattr(model, "enable_sleep_mode", False)),
        "encoder-decoder models": bool(getattr(model, "is_encoder_decoder", False)),
    }


def catalog_of(processor: Any) -> Catalog | None:
    """That of an `InputProcessor`, made when first asked for."""
    found = processor.__dict__.get("reft_catalog", False)
    if found is False:
        config, found = processor.vllm_config, None
        if asked_for(config):
            model = config.model_config
            shape = Model(model.get_hidden_size(), model.hf_text_config.num_hidden_layers)
            found = Catalog(ServingConfig.parse(config.additional_config["reft"]), shape)
        processor.reft_catalog = found
    return found


def is_adapter(path: str) -> bool:
    """Whether a folder that came as a LoRA's is one of ours."""
    folder = Path(path)
    return (folder / "reft_config.json").is_file() or (
        folder.is_dir() and not (folder / "adapter_config.json").is_file() and any(folder.glob("intkey_*"))
    )


def wrap_processor(processor_class: Any) -> None:
    """`InputProcessor.process_inputs`, through which every request goes, resolves the adapter."""
    init, process = processor_class.__init__, processor_class.process_inputs

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        catalog_of(self)  # a wrong adapter stops the server

    @functools.wraps(process)
    def process_inputs(
        self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            ticket, kwargs["lora_request"] = _asked(catalog_of(self), params, **kwargs)
        except (ValueError, OSError) as error:
            raise wrong_request(error) from error
        request = process(self, request_id, prompt, params, *args, **kwargs)
        if ticket is not None:
            try:
                _check_prompt(ticket, request)
            except ValueError as error:
                raise wrong_request(error) from error
            # The request's own copy of the parameters; the caller's are not touched.
            extra = request.sampling_params.extra_args or {}
            rest = {name: value for name, value in extra.items() if name not in (NAME, SCALE)}
            request.sampling_params.extra_args = {**rest, FIELD: ticket.to_dict()}
        return request

    processor_class.__init__, processor_class.process_inputs = __init__, process_inputs


def _asked(
    catalog: Catalog | None, params: Any, lora_request: Any = None, resumable: bool = False, **_: Any
) -> tuple[Ticket | None, Any]:
    """A request's adapter, and the LoRA that it has beside. Raises ValueError for what can't be served."""
    extra = getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None) or {}
    asked = {name: extra[name] for name in (NAME, SCALE) if name in extra}
    if FIELD in extra:
        raise ValueError(f"{FIELD}: is the plugin's own")
    if catalog is None:
        if asked:
            raise ValueError(f'{NAME}: the server has no adapters; start it with additional_config["reft"]')
        return None, lora_request
    if lora_request is not None and is_adapter(lora_request.lora_path):
        if NAME in asked:
            raise ValueError(
                f"{NAME}: was given beside {lora_request.lora_name!r}, which is an adapter itself"
            )
        asked |= _named(catalog, lora_request)
        lora_request = None
    ticket = catalog.ticket(asked)
    if ticket is not None and resumable:
        raise ValueError(f"{NAME}: requests whose prompt grows are not served with adapters")
    if ticket is not None and not hasattr(params, "max_tokens"):
        raise ValueError(f"{NAME}: adapters are served for generation only")
    return ticket, lora_request


def _named(catalog: Catalog, lora: Any) -> dict[str, Any]:
    """The argument for an adapter that came as a LoRA: its name, where that is known, or its folder."""
    known = lora.lora_name in catalog.names and catalog.source(lora.lora_name).path == lora.lora_path
    return {NAME: lora.lora_name if known else Source(lora.lora_path)}


def _check_prompt(ticket: Ticket, request: Any) -> None:
    """Raises ValueError for positions that the prompt lacks."""
    from ...batch import intervals_of

    tokens, embeds = request.prompt_token_ids, request.prompt_embeds
    intervals_of(ticket.groups, len(tokens) if tokens is not None else len(embeds))


def wrap_engines(engine_class: Any, async_class: Any) -> None:
    """The engines' front ends: handshake, adapters read beside the steps, and those that came as a LoRA."""
    init, add_lora = engine_class.__init__, engine_class.add_lora

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if asked_for(self.vllm_config):
            core = self.engine_core
            inner = getattr(core, "engine_core", None)
            check_version(inner.reft_report() if inner is not None else core.call_utility("reft_report"))

    @functools.wraps(add_lora)
    def add_lora_or_adapter(self: Any, lora_request: Any) -> bool:
        catalog = catalog_of(self.input_processor)
        if catalog is None or not is_adapter(lora_request.lora_path):
            return add_lora(self, lora_request)
        catalog.of_source(Source(lora_request.lora_path))
        return True

    engine_class.__init__, engine_class.add_lora = __init__, add_lora_or_adapter
    add, add_lora_async = async_class._add_request, async_class.add_lora

    @functools.wraps(add)
    async def _add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        extra = getattr(request.sampling_params, "extra_args", None)
        if extra and FIELD in extra:
            await _staging(self).have(Ticket.from_dict(extra[FIELD]))
        return await add(self, request, *args, **kwargs)

    @functools.wraps(add_lora_async)
    async def add_lora_or_adapter_async(self: Any, lora_request: Any) -> bool:
        catalog = catalog_of(self.input_processor)
        if catalog is None or not is_adapter(lora_request.lora_path):
            return await add_lora_async(self, lora_request)
        ticket = await asyncio.to_thread(catalog.of_source, Source(lora_request.lora_path))
        await _staging(self).have(ticket)
        return True

    async_class._add_request, async_class.add_lora = _add_request, add_lora_or_adapter_async


def _staging(engine: Any) -> Staging:
    found = engine.__dict__.get("reft_staging")
    if found is None:
        config = ServingConfig.parse(engine.vllm_config.additional_config["reft"])
        found = engine.reft_staging = Staging(engine.engine_core, config.staged)
    return found
