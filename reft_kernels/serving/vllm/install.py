"""All places at which vLLM is hooked."""

from __future__ import annotations

import functools
import sys
import threading
from typing import Any

from . import engine, frontend, http, runner
from .guard import asked_for
from .model import attach

_nesting = threading.local()


def install() -> None:
    """Hooks vLLM in this process. Raises an ImportError or AttributeError for a vLLM that lacks a place."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.model_executor.model_loader import utils as loading
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    create = EngineArgs.create_engine_config

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        if asked_for(config):
            frontend.check_config(config)
        return config

    initialize = loading.initialize_model

    @functools.wraps(initialize)
    def initialize_model(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        # A model may make others as parts of itself.
        depth = getattr(_nesting, "depth", 0)
        _nesting.depth = depth + 1
        try:
            model = initialize(vllm_config, *args, **kwargs)
        finally:
            _nesting.depth = depth
        other = kwargs.get("model_config")
        if depth == 0 and asked_for(vllm_config) and other in (None, vllm_config.model_config):
            attach(model, vllm_config)
            runner.offer_state(model, vllm_config)
            runner.wrap_v1()
        return model

    start = AsyncLLM.__init__

    @functools.wraps(start)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if asked_for(self.vllm_config):
            http.install()  # not before, as only servers have all that it takes

    AsyncLLM.__init__ = __init__  # type: ignore[method-assign]
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]
    replace_everywhere(initialize, initialize_model)
    keys = kv_cache_utils.generate_block_hash_extra_keys
    replace_everywhere(keys, engine.keyed(keys))
    engine.wrap_core(EngineCore)
    frontend.wrap_processor(InputProcessor)
    frontend.wrap_engines(LLMEngine, AsyncLLM)
    BeamSearchOfflineMixin.beam_search = http.refuse_beams(BeamSearchOfflineMixin.beam_search)


def replace_everywhere(original: Any, replacement: Any) -> None:
    """Puts a function in another's place in every module of vLLM's that has it by its name."""
    own = original.__name__
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "vllm" and module is not None and getattr(module, own, None) is original:
            setattr(module, own, replacement)
