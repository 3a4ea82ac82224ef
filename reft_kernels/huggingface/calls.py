"""What stands for the methods of a model by which it is called: forward, generate and its helpers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..batch import BatchPlan
from .checkpointing import keep_plans
from .reading import CallReader
from .runtime import GenerateScope, Pending, cache_length
from .standin import StandIn

#: Keyword arguments of ours that the wrappers take out of a call.
NAMES = ("reft_adapter_names", "adapter_names")
LENGTHS = "prompt_lengths"


def take_names(kwargs: dict[str, Any]) -> Any:
    """Takes the adapter names out of a call's keyword arguments; None where the call named none.

    `reft_adapter_names` wins; `adapter_names` is then left to PEFT.
    """
    if "reft_adapter_names" in kwargs:
        return kwargs.pop("reft_adapter_names")
    return kwargs.pop("adapter_names", None)


class _Call(StandIn):
    """Stands for a method of the model."""

    def __init__(self, module: nn.Module, name: str, reader: CallReader) -> None:
        super().__init__(module, name)
        self.reader, self.runtime = reader, reader.runtime
        self.names = self.parameters()

    @torch.compiler.disable
    def _plan(self, args: tuple, kwargs: dict[str, Any]) -> BatchPlan | None:
        """The plan of this forward; takes our own arguments out of kwargs."""
        names, lengths = take_names(kwargs), kwargs.pop(LENGTHS, None)
        call = {**dict(zip(self.names, args)), **kwargs} if args else kwargs
        scope = self.runtime.scope
        if scope is not None and names is None:
            pending, scope.pending = scope.pending, None
            if pending is not None and pending.cache is call.get("past_key_values"):
                return pending.plan
        if torch.is_grad_enabled():
            keep_plans(self.runtime)
        return self.reader.forward(call, names, lengths)

    # Under torch.compile this frame runs as plain Python, and the model's own forward below it is compiled.
    @torch.compiler.disable(recursive=False)
    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        runtime = self.runtime
        with runtime.lock:
            before = runtime.plan
            runtime.depth += 1
            runtime.prepared = False
            try:
                runtime.plan = self._plan(args, kwargs)
                result = self.original(*args, **kwargs)
                runtime.fused.abandon()
                return result
            finally:
                runtime.depth -= 1
                runtime.plan = before if runtime.depth else None
                runtime.fused.forget()


class Forward(_Call):
    """The model's forward: takes our keyword arguments, makes the plan, holds the lock."""

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
        plan = self._plan_of(scope, inputs, cache)
        if getattr(cache, "is_compileable", False):
            # The next step may be compiled code, which takes no lock and makes no plan of its own: both are
            # had here, and the lock is kept until this generate ends.
            scope.keep_lock(self.runtime.lock)
            self.runtime.plan, self.runtime.prepared = plan, True
        scope.pending = Pending(cache, plan)
        return inputs

    def _plan_of(self, scope: GenerateScope, inputs: dict[str, Any], cache: Any) -> BatchPlan | None:
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
        return self.reader.generate(scope, start, length, batch)


class Generate(_Call):
    """`generate` with `adapter_names` (or `reft_adapter_names`) and `prompt_lengths`, one a prompt."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names, lengths = take_names(kwargs), kwargs.pop(LENGTHS, None)
        inputs = args[0] if args else kwargs.get("inputs")
        call = {**kwargs, "generation_config": args[1]} if len(args) > 1 else kwargs
        scope = self.reader.open_scope(self.module, inputs, call, names, lengths)
        with self.runtime.generating(scope):
            return self.original(*args, **kwargs)


class ContinuousBatching(_Call):
    """`generate_batch` and what it is made of: requests share a row, where prompts can't be told apart."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if take_names(kwargs) is not None or LENGTHS in kwargs:
            raise ValueError(
                f"{self.name}: takes no adapter names or prompt lengths; use set_adapter, or generate"
            )
        self.reader.check_packed(self.name)
        return self.original(*args, **kwargs)
