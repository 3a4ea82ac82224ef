"""Which rows of a step are whose, as vLLM's two model runners know it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..ticket import Ticket
from ..worker import Worker
from .model import use, worker_of

#: Where a request's resolved adapter stands in its `extra_args`.
FIELD = "_reft"


def ticket_of(sampling_params: Any) -> Ticket | None:
    """The adapter of a request, as the front end resolved it.

    Raises RuntimeError for one that asks for an adapter and was not looked at there.
    """
    extra = getattr(sampling_params, "extra_args", None)
    if not extra:
        return None
    if FIELD in extra:
        return Ticket.from_dict(extra[FIELD])
    if "reft_adapter" in extra:
        raise RuntimeError(
            "reft: a request asks for an adapter, but the process that took it in has not the plugin"
        )
    return None


_wrapped: set[type] = set()


def wrap_v1() -> None:
    """Model runner V1 has no hook: its `_prepare_inputs` and `_dummy_run` are wrapped."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as runner_class

    if runner_class in _wrapped:
        return
    _wrapped.add(runner_class)
    prepare, dummy = runner_class._prepare_inputs, runner_class._dummy_run

    @functools.wraps(prepare)
    def _prepare_inputs(
        self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kw: Any
    ) -> Any:
        worker = worker_of(self.get_model())
        if worker is not None:
            use(worker)
            _follow_v1(self, worker, scheduler_output)
            batch = self.input_batch
            ids = batch.req_ids
            counts = np.asarray(num_scheduled_tokens)[: len(ids)]
            worker.step(ids, batch.num_computed_tokens_cpu[: len(ids)], counts)
        return prepare(self, scheduler_output, num_scheduled_tokens, *args, **kw)

    @functools.wraps(dummy)
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        worker = worker_of(self.get_model())
        if worker is not None:
            use(worker)
            worker.idle()
        return dummy(self, *args, **kwargs)

    runner_class._prepare_inputs, runner_class._dummy_run = _prepare_inputs, _dummy_run


def _follow_v1(runner: Any, worker: Worker, scheduler_output: Any) -> None:
    requests = runner.requests

    def look_up(request: str) -> tuple[Ticket | None, int]:
        state = requests[request]
        return ticket_of(state.sampling_params), state.num_prompt_tokens

    # A request that was finished may come again under its name within one step.
    again = [new.req_id for new in scheduler_output.scheduled_new_reqs]
    worker.forget(again)
    worker.follow(runner.input_batch.req_ids, look_up)


@functools.cache
def state_class(base: type) -> type:
    """A `ModelState` of model runner V2 that also fills the tables of each step."""

    class ReftModelState(base):  # type: ignore[misc, valid-type]
        def _worker(self) -> Worker:
            worker = worker_of(self.model)
            assert worker is not None
            return worker

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            # The prompt as it came in, also of a request that comes again with what it has generated.
            ticket = ticket_of(new_req_data.sampling_params)
            self._worker().add(new_req_data.req_id, ticket, new_req_data.prompt_len)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self._worker().remove(req_id)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            worker, n = self._worker(), input_batch.num_reqs
            use(worker)
            worker.step(
                input_batch.req_ids,
                input_batch.num_computed_tokens_np[:n],
                input_batch.num_scheduled_tokens[:n],
            )
            return super().prepare_inputs(input_batch, req_states)

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            use(self._worker())
            self._worker().idle()
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

    ReftModelState.__name__ = f"Reft{base.__name__}"
    return ReftModelState


def offer_state(model: Any, vllm_config: Any) -> None:
    """Gives a model the method by which it chooses its `ModelState` in model runner V2."""

    def get_model_state_cls() -> type:
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

        del model.__dict__["get_model_state_cls"]
        try:
            return state_class(resolve_model_state_cls(vllm_config, model))
        finally:
            model.__dict__["get_model_state_cls"] = get_model_state_cls

    model.__dict__["get_model_state_cls"] = get_model_state_cls
