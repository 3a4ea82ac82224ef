"""What is attached to a model instance: hooks on sites, and wrappers of forward, generate and its helpers.

All are objects rather than closures, so that a deepcopy or a pickle of the model gets its own.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import edits_input
from .edit import edit
from .state import GenerateScope, Pending, State, cache_length
from .tables import BatchPlan, Place, SiteKey

if TYPE_CHECKING:
    from .reft import Reft

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


class SiteHook:
    """The forward hook (or pre-hook) of one site. Idle, it is one check."""

    def __init__(self, reft: Reft, state: State, key: SiteKey) -> None:
        self.reft, self.state, self.key = reft, state, key

    def _apply(self, h: Tensor, clone: bool, training: bool) -> Tensor:
        plan = self.state.plan
        assert plan is not None
        site = plan.sites.get(self.key)
        if site is None:
            return h
        place = site.place
        if h.dtype is not place.dtype or h.device != place.device:
            site = self.reft._moved(self.key, Place(h.device, h.dtype), plan)
        if h.numel() != plan.tokens * h.shape[-1]:
            raise RuntimeError(
                f"{self.key.site} of layer {self.key.layer}: hidden states of shape {list(h.shape)} "
                f"reached a hook planned for {plan.tokens} tokens; was a block called without its model?"
            )
        return edit(h.clone() if clone else h, self.key, site, plan, training)

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.state.plan is None:
            return None
        h = output[0] if isinstance(output, tuple) else output
        edited = self._apply(h, False, module.training)
        if edited is h:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited


class InputHook(SiteHook):
    """The same for a site that is a module's input (a pre-hook with keyword arguments)."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:  # type: ignore[override]
        if self.state.plan is None:
            return None
        name = next(iter(kwargs)) if not args else None
        if name is not None and "hidden_states" in kwargs:
            name = "hidden_states"
        h = args[0] if name is None else kwargs[name]
        # What enters the first block may be the caller's own inputs_embeds.
        clone = self.key.site == "block_input" and self.key.layer == 0
        edited = self._apply(h, clone, module.training)
        if edited is h:
            return None
        if name is None:
            return (edited, *args[1:]), kwargs
        return args, {**kwargs, name: edited}


def attach(reft: Reft, state: State, key: SiteKey, module: nn.Module) -> Any:
    """Registers the hook of a site; returns its handle."""
    if edits_input(key.site):
        return module.register_forward_pre_hook(InputHook(reft, state, key), with_kwargs=True)
    return module.register_forward_hook(SiteHook(reft, state, key))


class StackHook:
    """Pre-hook of the stack of blocks: makes the plan where the model's forward was passed by."""

    def __init__(self, reft: Reft, state: State, stack: nn.Module) -> None:
        self.reft, self.state = reft, state
        self.parameters = _parameters_of(stack.forward)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.state.depth or (self.state.prepared and torch.compiler.is_compiling()):
            return None
        return self._plan(module, args, kwargs)

    @torch.compiler.disable
    def _plan(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        changed = any(name in kwargs for name in (*NAMES, LENGTHS))
        if changed:
            kwargs = dict(kwargs)
        names, lengths = take_names(kwargs), kwargs.pop(LENGTHS, None)
        call = {**dict(zip(self.parameters, args)), **kwargs} if args else kwargs
        self.state.plan = self.reft._plan_forward(call, names, lengths)
        if self.state.plan is not None:
            _Once(self.state).attach(module)
        return (args, kwargs) if changed else None


class _Once:
    """Forgets the plan when the stack's forward ends, however it ends, and goes."""

    def __init__(self, state: State) -> None:
        self.state = state

    def attach(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(self, always_call=True)

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.handle.remove()
        self.state.plan = None


def _parameters_of(function: Any) -> tuple[str, ...]:
    """Names of a bound method's parameters, in order."""
    return tuple(inspect.signature(function).parameters)


class _Wrapper:
    """Stands for a method on the instance; `original` is what was there."""

    def __init__(self, reft: Reft, state: State, original: Any) -> None:
        self.reft, self.state, self.original = reft, state, original
        self.parameters = _parameters_of(original)
        self.__name__, self.__doc__ = original.__name__, original.__doc__

    @property
    def __wrapped__(self) -> Any:  # inspect.signature looks here
        return self.original


class Forward(_Wrapper):
    """The model's forward: takes our keyword arguments, makes the plan, holds the lock."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.prepared and torch.compiler.is_compiling():
            return self.original(*args, **kwargs)  # generate's compiled decode step: the plan is made
        return self._run(args, kwargs)

    # Under torch.compile this frame runs as plain Python, and the model's own forward below it is compiled.
    @torch.compiler.disable(recursive=False)
    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        state = self.state
        with state.lock:
            before = state.plan
            state.depth += 1
            state.prepared = False
            try:
                state.plan = self._plan(args, kwargs)
                return self.original(*args, **kwargs)
            finally:
                state.depth -= 1
                state.plan = before if state.depth else None

    @torch.compiler.disable
    def _plan(self, args: tuple, kwargs: dict[str, Any]) -> BatchPlan | None:
        names, lengths = take_names(kwargs), kwargs.pop(LENGTHS, None)
        call = {**dict(zip(self.parameters, args)), **kwargs} if args else kwargs
        scope = self.state.scope
        if scope is not None and names is None:
            if scope.selection is None:
                return None
            pending, scope.pending = scope.pending, None
            if pending is not None and pending.cache is call.get("past_key_values"):
                return pending.plan
        return self.reft._plan_forward(call, names, lengths)


class PrepareInputs(_Wrapper):
    """`prepare_inputs_for_generation`: notes which columns the next forward of generate covers.

    The plan is made here rather than in forward, because a compiled decode step makes none.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.original(*args, **kwargs)
        scope = self.state.scope
        if scope is None:
            return inputs
        cache = inputs.get("past_key_values")
        plan = None if scope.selection is None else self._plan(scope, inputs, cache)
        if getattr(cache, "is_compileable", False):
            # The next step may be compiled code, which takes no lock and makes no plan of its own: both are
            # had here, and the lock is kept until this generate ends.
            scope.hold(self.state.lock)
            self.state.plan, self.state.prepared = plan, True
        scope.pending = Pending(cache, plan)
        return inputs

    def _plan(self, scope: GenerateScope, inputs: dict[str, Any], cache: Any) -> BatchPlan | None:
        tokens = inputs.get("inputs_embeds")
        if tokens is None:
            tokens = inputs["input_ids"]
        batch, length = tokens.shape[:2]
        start = cache_length(cache, inputs.get("cache_position"))
        if start is None:
            start = scope.seen
        scope.seen = start + length
        return self.reft._plan_generate(scope, start, length, batch)


class Generate(_Wrapper):
    """`generate` with `adapter_names` (or `reft_adapter_names`) and `prompt_lengths`, one a prompt."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names, lengths = take_names(kwargs), kwargs.pop(LENGTHS, None)
        inputs = args[0] if args else kwargs.get("inputs")
        call = {**kwargs, "generation_config": args[1]} if len(args) > 1 else kwargs
        scope = self.reft._open_scope(inputs, call, names, lengths)
        with self.state.generating(scope):
            return self.original(*args, **kwargs)


class Recompute:
    """A block's gradient-checkpointing function that runs the block again under the plan of its forward."""

    def __init__(self, state: State, original: Any) -> None:
        self.state, self.original = state, original

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.state.plan
        without_grad: list[bool] = []  # of the first run: true for the reentrant kind

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            again = bool(without_grad)
            without_grad.append(not torch.is_grad_enabled())
            with self.state.using(plan):
                if plan is not None:
                    plan.recomputing = again and without_grad[0]
                try:
                    return function(*inner, **inner_kwargs)
                finally:
                    if plan is not None:
                        plan.recomputing = False

        return self.original(run, *args, **kwargs)
