"""What stands for the methods of a model by which it is called: forward, generate and its helpers."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import BASE, BatchPlan
from ..batch.names import LENGTHS, NAMES, POSITIONS, SCALES
from . import continuous
from .checkpointing import keep_plans
from .reading import CallReader, Ours, ids_of
from .runtime import Columns, GenerateScope, Pending, cache_length
from .slips import Keywords
from .standin import StandIn

#: What the model's forward takes beside its own arguments.
_OURS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    for name, annotation in (
        *((name, Sequence[str | Sequence[str]] | None) for name in NAMES),
        (LENGTHS, Sequence[int] | Tensor | None),
        (POSITIONS, Sequence[Any] | Mapping[str, Any] | None),
        # The short name is not shown: Trainer would take a data set's column of that name for it.
        (SCALES[0], float | Sequence[Any] | Mapping[str, float] | None),
    )
]


def take_ours(kwargs: dict[str, Any], own: Collection[str] = ()) -> Ours:
    """Takes our own arguments out of a call's; None for those that it did not give.

    `reft_adapter_names` wins; `adapter_names` is then left to PEFT. `scale` is left to a model that has an
    argument of that name.
    """
    take = kwargs.pop
    return Ours(
        take(NAMES[0] if NAMES[0] in kwargs else NAMES[1], None),
        take(LENGTHS, None),
        take(POSITIONS, None),
        take(SCALES[0] if SCALES[0] in kwargs or SCALES[1] in own else SCALES[1], None),
    )


class _Call(StandIn):
    """Stands for a method of the model."""

    def __init__(self, module: nn.Module, name: str, reader: CallReader) -> None:
        super().__init__(module, name)
        self.reader, self.runtime = reader, reader.runtime
        self.names = self.parameters()
        self.keywords = Keywords(name, self.names)

    @torch.compiler.disable
    def _plan(self, args: tuple, kwargs: dict[str, Any]) -> BatchPlan | None:
        """The plan of this forward; takes our own arguments out of kwargs."""
        ours = take_ours(kwargs, self.names)
        call = {**dict(zip(self.names, args)), **kwargs} if args else kwargs
        if continuous.is_packed(call):
            return self.reader.packed(call, ours)
        scope = self.runtime.scope
        if scope is None:
            self.keywords.check(kwargs)
        elif ours.names is None and ours.positions is None and ours.scale is None:
            pending, scope.pending = scope.pending, None
            if pending is not None and pending.cache is call.get("past_key_values"):
                return self._still_right(pending, scope)
        if not torch.is_grad_enabled():
            return self.reader.forward(call, ours)
        keep_plans(self.runtime)
        plan = self.reader.forward(call, ours)
        if plan is not None and plan.table.segments and self.module.training:
            unnamed = self.runtime.store.adapters if ours.names is None else None
            self.runtime.told.training_step(self.module, plan, call, unnamed)
        return plan

    def _still_right(self, pending: Pending, scope: GenerateScope) -> BatchPlan | None:
        """The plan that generate prepared, or a new one if adapters came or went since: the ranges of the
        pool that it names may be another's now."""
        plan, columns = pending.plan, pending.columns
        if plan is None or columns is None or plan.table.version == self.runtime.store.version:
            return plan
        return self.reader.generate(scope, columns)

    # Under torch.compile this frame runs as plain Python, and the model's own forward below it is compiled.
    @torch.compiler.disable(recursive=False)
    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        runtime = self.runtime
        with runtime.lock:
            before = runtime.plan
            runtime.depth += 1
            runtime.prepared = False
            try:
                runtime.take(self._plan(args, kwargs))
                runtime.logits_to_keep = kwargs.get("logits_to_keep", 0)
                result = self.original(*args, **kwargs)
                runtime.fused.abandon()
                if runtime.unseen and runtime.depth == 1:
                    runtime.check_seen(runtime.plan)
                return result
            finally:
                runtime.depth -= 1
                runtime.take(before if runtime.depth else None)
                runtime.fused.forget()


class Forward(_Call):
    """The model's forward: takes our keyword arguments, makes the plan, holds the lock."""

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own, and what is ours. Trainer drops the columns of a data set that are not in it."""
        signature = inspect.signature(self.original)
        parameters = list(signature.parameters.values())
        rest = [one for one in parameters if one.kind is inspect.Parameter.VAR_KEYWORD]
        ours = [one for one in _OURS if one.name not in signature.parameters]
        return signature.replace(parameters=[one for one in parameters if one not in rest] + ours + rest)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.runtime.prepared and torch.compiler.is_compiling():
            return self.original(*args, **kwargs)  # generate's compiled decode step: the plan is made
        return self._run(args, kwargs)


class StackForward(_Call):
    """The forward of the stack of blocks: makes the plan where the model's forward was passed by."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.runtime
        if runtime.depth or (runtime.prepared and torch.compiler.is_compiling()):
            return self.original(*args, **kwargs)
        return self._run(args, kwargs)


class PrepareInputs(_Call):
    """`prepare_inputs_for_generation`: notes which columns the next forward of generate covers.

    The plan is made here rather than in forward, because a compiled decode step makes none.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.original(*args, **kwargs)
        scope = self.runtime.scope
        if scope is None:
            return inputs
        cache = inputs.get("past_key_values")
        columns = self._columns(scope, inputs, cache)
        compiled = getattr(cache, "is_compileable", False)
        if compiled:
            # The next step may be compiled code, which takes no lock and makes no plan of its own: both are
            # had here, and the lock is kept until this generate ends.
            scope.keep_lock(self.runtime.lock)
        plan = None
        if columns is not None:
            with self.runtime.lock:  # adapters neither come nor go meanwhile
                plan = self.reader.generate(scope, columns, compiled)
        if compiled:
            self.runtime.take(plan)
            self.runtime.prepared = True
        scope.pending = Pending(cache, plan, columns)
        return inputs

    def _columns(self, scope: GenerateScope, inputs: dict[str, Any], cache: Any) -> Columns | None:
        """What the next forward covers; None where nothing is ever done in it."""
        if scope.selection is None and not self.runtime.fused.devices:
            return None
        tokens = inputs.get("inputs_embeds")
        if tokens is None:
            tokens = inputs["input_ids"]
        batch, length = tokens.shape[:2]
        start = cache_length(cache, inputs.get("cache_position"))
        if start is None:
            start = scope.seen
        scope.seen = start + length
        wanted = scope.selection is not None and scope.selection.needs_ids
        return Columns(start, length, batch, ids_of(inputs) if wanted else None)


class Generate(_Call):
    """`generate` with `adapter_names` (or `reft_adapter_names`), `prompt_lengths` and `reft_positions`, one a
    prompt."""

    def __init__(self, module: nn.Module, name: str, reader: CallReader) -> None:
        super().__init__(module, name, reader)
        forward = inspect.signature(type(module).forward).parameters
        self.keywords = Keywords(name, [*self.names, *forward])
        self.known, self.own_names = tuple(forward), "adapter_names" in forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.keywords.check(kwargs)
        ours = take_ours(kwargs, self.known)
        if "adapter_names" in kwargs and not self.own_names:
            # It is in forward's signature, by which generate tells what the model doesn't use.
            raise ValueError("adapter_names: is not used by the model beside reft_adapter_names")
        inputs = args[0] if args else kwargs.get("inputs")
        call = {**kwargs, "generation_config": args[1]} if len(args) > 1 else kwargs
        scope = self.reader.open_scope(self.module, inputs, call, ours)
        with self.runtime.generating(scope):
            return self.original(*args, **kwargs)


class ContinuousBatching(_Call):
    """`generate_batch` and `init_continuous_batching`: an adapter for each request, where the transformers at
    hand says which tokens are whose; else the active adapter, if it needs no prompt."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names, lengths, positions, scale = take_ours(kwargs)
        if lengths is not None or positions is not None or scale is not None:
            raise ValueError(
                f"{self.name}: takes adapter_names, but no {LENGTHS}, {POSITIONS} or {SCALES[1]}"
            )
        reason = continuous.why_not()
        if reason is not None:
            if names is not None:
                raise ValueError(
                    f"{self.name}: takes no adapter names, as {reason}; use set_adapter, or generate"
                )
            self.reader.check_packed(self.name)
            return self.original(*args, **kwargs)
        if self.name == "generate_batch":
            inputs = args[0] if args else kwargs.get("inputs", ())
            checked = continuous.check(self.runtime, inputs, names)
            given = [BASE if name is None else name for name in checked] if names is None else names
            with continuous.said.saying(given):
                return self.original(*args, **kwargs)
        if names is not None:
            raise ValueError(
                f"{self.name}: takes no adapter names; its manager's add_request takes adapter_name and its "
                "add_requests adapter_names"
            )
        return continuous.batched(self.runtime, self.original(*args, **kwargs))
