"""transformers' continuous batching: an adapter for each request, by the plan of an engine's step.

Its batches are flat: the tokens of all requests one behind the other in one row, some in the middle of their
prompts, some decoding. Which request each token is of is known on the host just before a forward, where
`ContinuousBatchingIOs.prepare_batch_tensors` lays a batch out; the forward that follows is planned of it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..batch import Prompts, Selection
from ..batch.stacks import RowNames, names_of
from .runtime import Runtime

#: More requests' names than this are looked through for finished ones.
_MANY = 4096


class _Laid(NamedTuple):
    """The batch of the forward to come: each request's id, prompt length, first token and how many."""

    ids: tuple[str, ...]
    prompts: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


def why_not() -> str | None:
    """Why adapters by request can't be had with this transformers; None where they can."""
    try:
        import transformers
        from transformers.generation.continuous_batching import continuous_api, input_outputs, requests

        manager = continuous_api.ContinuousBatchingManager
        prepare = inspect.signature(input_outputs.ContinuousBatchingIOs.prepare_batch_tensors).parameters
        fields = requests.RequestState.__dataclass_fields__
        known = (
            hasattr(manager, "_create_batch_processor")
            and "requests_in_batch" in prepare
            and {"position_offset", "initial_tokens", "_true_initial_tokens"} <= set(fields)
            and "query_length" in requests.FutureRequestState.__slots__
        )
    except (ImportError, AttributeError) as error:
        known, reason = False, f" ({error})"
    else:
        reason = ""
    if known:
        return None
    return f"transformers {transformers.__version__} does not say which tokens are whose{reason}"


def check(runtime: Runtime, inputs: Sequence[Sequence[int]], given: Any) -> tuple[RowNames, ...]:
    """What each request takes. Raises ValueError for an unknown one, where a prompt lacks a position, and for
    adapters with modules of their own, which take whole rows."""
    planner = runtime.planner
    names: tuple[RowNames, ...] = (runtime.active,) * len(inputs)
    if given is not None:
        names = planner.check_names(given, len(inputs))
    for name in names_of(names):
        if runtime.store.find(name).saved_modules:
            raise ValueError(
                f"adapter_names: {name!r} has modules_to_save, which continuous batches can't run"
            )
    planner.select(names, Prompts.unpadded([len(tokens) for tokens in inputs]))
    return names


def batched(runtime: Runtime, manager: Any) -> Any:
    """The manager, taking adapters by request. Raises ValueError for one that was at work before."""
    if isinstance(getattr(manager.add_request, "__self__", None), Batching):
        return manager
    if manager.batch_processor is not None:
        raise ValueError(
            "init_continuous_batching: the model's cached manager was made before the model was patched; "
            "call model.destroy_cached_continuous_batching_manager() first"
        )
    Batching(runtime, manager).attach()
    return manager


class Batching:
    """What a patched model knows of one manager of continuous batching.

    Holds the adapters of its requests, and the batch that was laid out last. `attach` puts stand-ins on the
    manager's own methods; the manager is a model's by `init_continuous_batching`.
    """

    def __init__(self, runtime: Runtime, manager: Any) -> None:
        self.runtime, self.manager = runtime, manager
        self.names: dict[str, RowNames] = {}
        self.laid: _Laid | None = None
        self._selected: tuple[tuple, Selection] | None = None
        self._lock = threading.Lock()
        #: Requests on their way to the scheduler, and between its queues seen by nobody.
        self._coming: set[str] = set()
        _all.add(self)

    def attach(self) -> None:
        """Blocks are not shared between requests from here on, as their keys and values are edited. Graphs
        and compiled code would go on reading the plan of the batch that they were made with."""
        manager = self.manager
        config = copy.copy(manager.continuous_batching_config)
        config.allow_block_sharing = False
        config.use_cuda_graph = (False, False)
        config.varlen_compile_config = config.decode_compile_config = None
        config.use_async_batching = False
        manager.continuous_batching_config, manager._use_prefix_sharing = config, False
        self._add, self._create = manager.add_request, manager._create_batch_processor
        manager.add_request, manager._create_batch_processor = self.add_request, self.create_processor
        self._add_many = manager.add_requests
        manager.add_requests = self.add_requests

    # Requests --------------------------------------------------------------------------------------------

    def add_request(self, input_ids: Any, *args: Any, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """`ContinuousBatchingManager.add_request`, with the request's adapter."""
        bound = inspect.signature(self._add).bind(input_ids, *args, **kwargs)
        with self._lock:
            names = check(self.runtime, [input_ids], None if adapter_name is None else [adapter_name])
            if bound.arguments.get("request_id") is None:
                # As the manager numbers them; under its own lock.
                with self.manager._request_lock:
                    bound.arguments["request_id"] = f"req_{self.manager._request_counter}"
                    self.manager._request_counter += 1
            request = bound.arguments["request_id"]
            self._note(request, names[0])
        return self._put(request, *bound.args, **bound.kwargs)

    def _note(self, request: str, names: RowNames) -> None:
        self.names[request] = names
        self._coming.add(request)

    def _put(self, request: str, *args: Any, **kwargs: Any) -> Any:
        """The manager's own `add_request`; a request that it drops or refuses is no longer on its way."""
        put = None
        try:
            put = self._add(*args, **kwargs)
        finally:
            if put is None:
                self._coming.discard(request)
        return put

    def add_requests(
        self, inputs: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """`ContinuousBatchingManager.add_requests`, with an adapter for each."""
        given = said.take() if adapter_names is None else adapter_names
        manager = self.manager

        def add_next(*args: Any, **kwargs: Any) -> Any:
            self._note(kwargs["request_id"], next(left))
            return self._put(kwargs["request_id"], *args, **kwargs)

        with self._lock:  # it calls add_request for one after the other, in their order
            left = iter(check(self.runtime, inputs, given))
            manager.add_request = add_next
            try:
                return self._add_many(inputs, *args, **kwargs)
            finally:
                manager.add_request = self.add_request

    def _name(self, request: str) -> RowNames:
        """The adapter of a request. What forks from one takes its adapter along."""
        if request not in self.names:
            self.names[request] = self.names[request.rpartition("__child#")[0]]
        return self.names[request]

    def users(self, name: str) -> list[str]:
        """Requests with that adapter that wait or run."""
        manager = self.manager
        alive = {state.request_id for state in list(manager.input_queue.queue)}
        if manager.is_running():  # else those that it had were answered, and these wait for its start
            alive |= self._coming
            processor = manager.batch_processor
            if processor is not None:
                scheduler = processor.scheduler
                # Scheduled requests are in both for a moment; those thrown out of a full cache go back.
                for queue in (scheduler.waiting_requests, scheduler.active_requests):
                    alive |= set(queue)
                alive |= set(scheduler.waiting_requests)
        return sorted(one for one in alive if name in names_of([self._known(one)]))

    def _known(self, request: str) -> RowNames:
        return self.names.get(request, self.names.get(request.rpartition("__child#")[0]))

    # Batches ---------------------------------------------------------------------------------------------

    def create_processor(self) -> Any:
        """`ContinuousBatchingManager._create_batch_processor`; listens to how batches are laid out."""
        processor = self._create()
        ios = processor.inputs_and_outputs
        if not isinstance(ios.prepare_batch_tensors, _Listener):
            _batchings[processor.cache] = self
            ios.prepare_batch_tensors = _Listener(ios.prepare_batch_tensors, self)
            self._follow_arrivals(processor)
        # Of a loop that was stopped: what it had taken out of the queue is gone.
        self._coming &= {state.request_id for state in list(self.manager.input_queue.queue)}
        return processor

    def _follow_arrivals(self, processor: Any) -> None:
        """A request is on its way until the scheduler has it, or it failed before."""
        scheduler = processor.scheduler
        arrive, fail = scheduler.add_waiting_request, processor._handle_request_error

        def add_waiting_request(state: Any, *args: Any, **kwargs: Any) -> Any:
            found = arrive(state, *args, **kwargs)
            self._coming.discard(state.request_id)
            return found

        def _handle_request_error(error: Exception, state: Any) -> Any:
            self._coming.discard(state.request_id)
            return fail(error, state)

        scheduler.add_waiting_request = add_waiting_request
        processor._handle_request_error = _handle_request_error

    def lay_out(self, listed: Sequence[Any]) -> None:
        """Notes a batch before its forward. listed: transformers' FutureRequestStates."""
        states = [one.state for one in listed]
        self.laid = _Laid(
            tuple(state.request_id for state in states),
            # A request that was thrown out of a full cache comes again with its answer in its prompt.
            np.array([state._true_initial_tokens or len(state.initial_tokens) for state in states]),
            np.array([state.position_offset for state in states]),
            np.array([one.query_length for one in listed]),
        )
        if len(self.names) > _MANY:
            scheduler = self.manager.batch_processor.scheduler
            waiting = {state.request_id for state in list(self.manager.input_queue.queue)}
            known = waiting | set(scheduler.active_requests) | set(scheduler.waiting_requests)
            self.names = {name: one for name, one in self.names.items() if name in known}

    def step(self) -> tuple[Selection, np.ndarray, np.ndarray]:
        """(selection, starts, counts) of the forward under way, for `Planner.step`."""
        laid = self.laid
        assert laid is not None
        key = (laid.ids, tuple(laid.prompts), self.runtime.store.version)
        if self._selected is None or self._selected[0] != key:
            names = [self._name(request) for request in laid.ids]
            selection = self.runtime.planner.select(names, Prompts.unpadded(laid.prompts))
            self._selected = key, selection
        return self._selected[1], laid.starts, laid.counts


class _Listener:
    """Stands for `prepare_batch_tensors`, which moves the requests on: what they were before is noted."""

    def __init__(self, original: Any, batching: Batching) -> None:
        self.original, self.batching = original, batching

    def __call__(self, requests_in_batch: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self.batching.lay_out(requests_in_batch)
        return self.original(requests_in_batch, *args, **kwargs)


#: The batching that a cache is of: a forward is given the cache, and nothing else that tells.
_batchings: weakref.WeakKeyDictionary[Any, Batching] = weakref.WeakKeyDictionary()


#: All that are alive, started or not.
_all: weakref.WeakSet[Batching] = weakref.WeakSet()


@contextlib.contextmanager
def unused(runtime: Runtime, name: str) -> Iterator[None]:
    """Inside, no request of continuous batching has that adapter, and none that comes gets it.

    Raises ValueError where some wait or run with it.
    """
    mine = [batching for batching in list(_all) if batching.runtime is runtime]
    with contextlib.ExitStack() as stack:
        for batching in mine:
            stack.enter_context(batching._lock)
        users = [request for batching in mine for request in batching.users(name)]
        if users:
            shown = ", ".join(users[:3]) + (", …" if len(users) > 3 else "")
            raise ValueError(
                f"name: {name!r} has {len(users)} unfinished request(s) of continuous batching ({shown}); "
                "wait for their results, or cancel_request them, before it is deleted"
            )
        yield


def batching_of(call: dict[str, Any]) -> Batching | None:
    """The batching that a forward is of; None for one that is of none that is known."""
    cache = call.get("cache")
    return None if cache is None else _batchings.get(cache)


def is_packed(call: dict[str, Any]) -> bool:
    """Whether a forward's row holds several requests, as continuous batching lays them out."""
    return call.get("cu_seq_lens_q") is not None and call.get("cache") is not None


class _Said(threading.local):
    """Names that `generate_batch` was given, until its manager adds the requests."""

    names: Any = None

    def take(self) -> Any:
        names, self.names = self.names, None
        return names

    @contextlib.contextmanager
    def saying(self, names: Any) -> Iterator[None]:
        self.names = names
        try:
            yield
        finally:
            self.names = None


said = _Said()
