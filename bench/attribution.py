"""Attributed time: what a forward spent inside a package's hooks and wrappers, and in calling them at all.

A difference of totals drowns a small overhead in the noise of the model. The parts can be timed by
themselves: every hook of the package is wrapped in a stopwatch, and so is every method that it put on the
model instance, less the time of the original method inside. A hook that does nothing still costs a call of
torch's; that is measured on a module of its own and added for every hook that ran.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .timer import Candidate, CpuClock, interleave

#: The dicts of hooks on a module that run in a forward.
HOOK_DICTS = ("_forward_pre_hooks", "_forward_hooks")

_CALL_ROUNDS = 15


def _package_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    if inspect.ismethod(hook):
        hook = hook.__func__
    return (getattr(hook, "__module__", None) if inspect.isfunction(hook) else type(hook).__module__) or ""


def _is_of(thing: Any, packages: tuple[str, ...]) -> bool:
    name = _package_of(thing)
    return any(name == package or name.startswith(package + ".") for package in packages)


class Ledger:
    """Adds up spans of time. On a GPU the spans lie between events of the stream, read when it is over."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.calls = dict.fromkeys(HOOK_DICTS, 0)
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start: Any, end: Any) -> None:
        if self.cuda:
            self._events.append((start, end))
        else:
            self._seconds += end - start

    def credit(self, start: Any, end: Any) -> None:
        """Takes off what the model would have spent itself."""
        self.add(end, start)

    def reset(self) -> None:
        self.calls = dict.fromkeys(HOOK_DICTS, 0)
        self._seconds = 0.0
        self._events.clear()

    def seconds(self, call_costs: dict[str, float]) -> float:
        """All spans, and the cost of calling the hooks that ran."""
        if self.cuda:
            torch.cuda.synchronize()
        spans = sum(start.elapsed_time(end) * 1e-3 for start, end in self._events)
        return self._seconds + spans + sum(call_costs[kind] * count for kind, count in self.calls.items())


def _timed_hook(hook: Callable[..., Any], ledger: Ledger, kind: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = ledger.mark()
        result = hook(*args, **kwargs)
        ledger.add(start, ledger.mark())
        ledger.calls[kind] += 1
        return result

    return timed


def _timed_wrapper(wrapper: Any, ledger: Ledger) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(wrapper with a stopwatch, its original that stops the watch while it runs)."""
    started: list[Any] = []
    called: list[bool] = []
    original = wrapper.original

    @functools.wraps(original)
    def inner(*args: Any, **kwargs: Any) -> Any:
        ledger.add(started.pop(), ledger.mark())
        called[-1] = True
        try:
            return original(*args, **kwargs)
        finally:
            started.append(ledger.mark())

    @functools.wraps(wrapper)
    def outer(*args: Any, **kwargs: Any) -> Any:
        called.append(False)
        started.append(ledger.mark())
        result = wrapper(*args, **kwargs)
        ledger.add(started.pop(), ledger.mark())
        if not called.pop():
            start = ledger.mark()
            original(*args, **kwargs)
            ledger.credit(start, ledger.mark())
        return result

    return outer, inner


@contextlib.contextmanager
def attributing(model: nn.Module, packages: tuple[str, ...]) -> Iterator[Ledger]:
    """Inside the block, what the packages do in the model's forwards is added up in the ledger.

    Args:
        packages: hooks and wrappers that were defined in one of these packages count as its cost.
    """
    ledger = Ledger(next(model.parameters()).device.type == "cuda")
    changed: list[tuple[dict, Any, Any]] = []
    wrappers: list[tuple[Any, Any]] = []
    for module in model.modules():
        for kind in HOOK_DICTS:
            hooks = getattr(module, kind)
            for key, hook in hooks.items():
                if _is_of(hook, packages):
                    changed.append((hooks, key, hook))
                    hooks[key] = _timed_hook(hook, ledger, kind)
        for name, value in list(vars(module).items()):
            if callable(value) and hasattr(value, "original") and _is_of(value, packages):
                wrappers.append((value, value.original))
                changed.append((vars(module), name, value))
                vars(module)[name], value.original = _timed_wrapper(value, ledger)
    try:
        yield ledger
    finally:
        for owner, key, value in changed:
            owner[key] = value
        for wrapper, original in wrappers:
            wrapper.original = original


def _no_pre_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
    return None


def _no_hook(module: nn.Module, args: Any, output: Any) -> None:
    return None


@functools.lru_cache(maxsize=1)
def call_costs() -> dict[str, float]:
    """Seconds that one hook of each kind adds to the call of a module although it does nothing."""
    plain, pre, post = nn.Identity(), nn.Identity(), nn.Identity()
    pre.register_forward_pre_hook(_no_pre_hook, with_kwargs=True)
    post.register_forward_hook(_no_hook)
    candidates = [
        Candidate(name, [functools.partial(module, 0)])
        for name, module in (("plain", plain), ("_forward_pre_hooks", pre), ("_forward_hooks", post))
    ]
    samples = interleave(candidates, CpuClock(span=1e-3), _CALL_ROUNDS)
    middle = {name: sorted(taken)[len(taken) // 2] for name, taken in samples.items()}
    return {kind: max(0.0, middle[kind] - middle["plain"]) for kind in HOOK_DICTS}
