"""In the process that schedules: the keys of its prefix cache, and whether all its workers are there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ... import __version__
from ...positions import Positions
from ..block_key import BlockKeys
from ..config import Source
from ..ticket import Part, Ticket
from .guard import asked_for
from .layers import Unsupported
from .runner import FIELD, ticket_of


def keyed(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `generate_block_hash_extra_keys` with the adapter's part of the key."""

    @functools.wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> Any:
        extra, after = original(request, start_token_idx, end_token_idx, start_mm_idx)
        keys = _keys_of(request)
        mine = None if keys is None else keys.until(end_token_idx)
        return (extra, after) if mine is None else ((*(extra or ()), ("reft", mine)), after)

    return generate_block_hash_extra_keys


def _keys_of(request: Any) -> BlockKeys | None:
    try:
        return request._reft_keys
    except AttributeError:
        ticket = ticket_of(request.sampling_params)
        keys = None if ticket is None else BlockKeys(ticket, request.num_prompt_tokens)
        request._reft_keys = keys
        return keys


def check_keys() -> None:
    """Hashes blocks as vLLM does, of requests that differ in their adapters alone.

    Raises Unsupported for a vLLM whose hashes don't ask for the key.
    """
    from vllm.v1.core import kv_cache_utils

    def request(positions: str | None, content: str) -> Any:
        groups = (Positions.parse(positions),) if positions else ()
        ticket = Ticket((Part(Source("-"), content),), 1.0, groups)
        extra = {FIELD: ticket.to_dict()} if positions else None
        tokens = list(range(12))
        return SimpleNamespace(
            request_id="-", block_hashes=[], num_tokens=12, num_prompt_tokens=12, all_token_ids=tokens,
            prompt_token_ids=tokens, mm_features=[], lora_request=None, cache_salt=None, prompt_embeds=None,
            sampling_params=SimpleNamespace(extra_args=extra), pooling_params=None,
        )  # fmt: skip

    try:
        hasher = kv_cache_utils.get_request_block_hasher(4, lambda value: repr(value).encode())
        bare, one, other, later = (
            [bytes(block) for block in hasher(request(*it))]
            for it in ((None, ""), ("all", "a"), ("all", "b"), ("l2", "a"))
        )
    except Exception as error:
        raise Unsupported(
            "reft: this vLLM computes the keys of its prefix cache in a way that is not known "
            f"({type(error).__name__}: {error}); start it with prefix caching off"
        ) from error
    apart = all(len({*blocks}) == 3 for blocks in zip(bare, one, other))
    if not apart or later[:2] != bare[:2] or later[2] in (bare[2], one[2]):
        raise Unsupported(
            "reft: this vLLM does not ask for an adapter's part in the keys of its prefix cache; start it "
            "with prefix caching off"
        )


def check_reports(reports: list[Any], depth: int) -> None:
    """Raises RuntimeError where the workers don't cover all layers with one version of the plugin."""
    for rank, report in enumerate(reports):
        if not isinstance(report, dict) or report.get("plugin") != __version__:
            raise RuntimeError(
                f"reft: worker {rank} answers {report!r}; wanted is the plugin in version {__version__}"
            )
        if report["layers"] is None:
            raise RuntimeError(f"reft: the plugin is not active in worker {rank}: its model has no edits")
    layers = {layer for report in reports for layer in report["layers"]}
    if layers != set(range(depth)):
        raise RuntimeError(
            f"reft: the workers edit the layers {sorted(layers)} of {depth}; is the plugin active in all?"
        )


def wrap_core(core_class: Any) -> None:
    """The engine's core: the handshake with the workers when it is made, and an answer to the front end."""
    original = core_class.__init__

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if asked_for(vllm_config):
            if vllm_config.cache_config.enable_prefix_caching:
                check_keys()
            self.reft_report()

    def reft_report(self: Any) -> str:
        """The plugin's version, once all workers have answered that they have it too."""
        depth = self.vllm_config.model_config.hf_text_config.num_hidden_layers
        check_reports(self.model_executor.collective_rpc("reft_report"), depth)
        return __version__

    def reft_stage(self: Any, tickets: dict[str, dict[str, Any]]) -> tuple[str, dict[str, str | None]]:
        """The plugin's version, and `Worker.staged` of each in all workers, which begin to read them."""
        return __version__, states_of(self.model_executor.collective_rpc("reft_stage", args=(tickets,)))

    core_class.__init__, core_class.reft_report = __init__, reft_report
    core_class.reft_stage = reft_stage


def states_of(workers: list[dict[str, str | None]]) -> dict[str, str | None]:
    """What all workers say of adapters: one's error, else None while one of them reads, else ""."""
    found: dict[str, str | None] = {}
    for key in workers[0]:
        states = [worker[key] for worker in workers]
        errors = [state for state in states if state]
        found[key] = errors[0] if errors else None if None in states else ""
    return found
