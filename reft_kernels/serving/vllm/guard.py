"""How the plugin says no: to a request, and to a server where it could not hook vLLM."""

from __future__ import annotations

import functools
from typing import Any


def asked_for(config: Any) -> bool:
    """Whether a VllmConfig asks for adapters."""
    additional = getattr(config, "additional_config", None)
    return isinstance(additional, dict) and "reft" in additional


def wrong_request(error: Exception | str) -> Exception:
    """An error of a request that vLLM's server answers with status 400."""
    from vllm import exceptions

    return getattr(exceptions, "VLLMValidationError", ValueError)(str(error))


def refuse(error: Exception) -> None:
    """Makes every engine configuration that asks for adapters an error."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if asked_for(config):
            raise RuntimeError(f"reft: the plugin could not be installed in this vLLM: {error}") from error
        return config

    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]
