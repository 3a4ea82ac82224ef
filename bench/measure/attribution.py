"""Attributed time: what a forward spent inside a package's hooks and wrappers, and in calling them at all.

A difference of totals drowns a small overhead in the noise of the model. The parts can be timed by
themselves: every hook of the package is wrapped in a stopwatch, and so is every method that it put on an
instance in the model, less the time of the original method inside. The same stopwatches run on the bare
model around nothing, and what they show there is taken off: looking at the clock costs several µs a time
when a model's weights have just pushed the code out of the caches. A hook that does nothing still costs a
call of torch's; that is measured on a module of its own, where everything is in the caches, and added for
every hook that ran.

What a package saves can't be told this way: code that no longer runs leaves the caches cold for what comes
next. So nothing is attributed to a patch that runs something in place of the model's own parts.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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

    def reset(self) -> None:
        self.calls = dict.fromkeys(HOOK_DICTS, 0)
        self._seconds = 0.0
        self._events.clear()

    def seconds(self, call_costs: dict[str, float]) -> float:
        """All spans, and the cost of calling the hooks that ran."""
        if self.cuda:
            torch.cuda.synchronize()
        spans = sum(start.elapsed_time(end) * 1e-3 for start, end in self._events)
        return (
            self._seconds
            + spans
            + sum(call_costs.get(kind, 0.0) * count for kind, count in self.calls.items())
        )


def _timed_hook(hook: Callable[..., Any], ledger: Ledger, kind: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = ledger.mark()
        result = hook(*args, **kwargs)
        ledger.add(start, ledger.mark())
        ledger.calls[kind] += 1
        return result

    return timed


def _watched(method: Callable[..., Any], started: list[Any], ledger: Ledger) -> Callable[..., Any]:
    """The method with a stopwatch. started: the watch; empty while it is stopped."""

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        started.append(ledger.mark())
        result = method(*args, **kwargs)
        ledger.add(started.pop(), ledger.mark())
        return result

    return watched


def _stopping(original: Callable[..., Any], started: list[Any], ledger: Ledger) -> Callable[..., Any]:
    """A method that stops the watch while it runs."""

    @functools.wraps(original)
    def stopping(*args: Any, **kwargs: Any) -> Any:
        ledger.add(started.pop(), ledger.mark())
        try:
            return original(*args, **kwargs)
        finally:
            started.append(ledger.mark())

    return stopping


class Found(NamedTuple):
    """A hook or wrapper of the packages. where: the module's path; key: of the hook, or the method's name."""

    where: str
    kind: str
    key: Any
    thing: Any


WRAPPER = "wrapper"


def find(model: nn.Module, packages: tuple[str, ...]) -> list[Found]:
    """The hooks and wrappers on a model that were defined in one of these packages."""
    found: list[Found] = []
    for where, module in model.named_modules():
        for kind in HOOK_DICTS:
            for key, hook in getattr(module, kind).items():
                if _is_of(hook, packages):
                    found.append(Found(where, kind, key, hook))
        for name, value in vars(module).items():
            if callable(value) and hasattr(value, "original") and _is_of(value, packages):
                found.append(Found(where, WRAPPER, name, value))
    return found


@contextlib.contextmanager
def attributing(model: nn.Module, packages: tuple[str, ...]) -> Iterator[Ledger]:
    """Inside the block, what the packages do in the model's forwards is added up in the ledger."""
    ledger = Ledger(next(model.parameters()).device.type == "cuda")
    found = find(model, packages)
    originals = [getattr(one.thing, "original", None) for one in found]
    for (where, kind, key, thing), original in zip(found, originals):
        module = model.get_submodule(where)
        if original is None:
            getattr(module, kind)[key] = _timed_hook(thing, ledger, kind)
        else:
            started: list[Any] = []
            thing.original = _stopping(original, started, ledger)
            vars(module)[key] = _watched(thing, started, ledger)
    try:
        yield ledger
    finally:
        for (where, kind, key, thing), original in zip(found, originals):
            module = model.get_submodule(where)
            if original is None:
                getattr(module, kind)[key] = thing
            else:
                vars(module)[key], thing.original = thing, original


@contextlib.contextmanager
def mirroring(bare: nn.Module, model: nn.Module, packages: tuple[str, ...]) -> Iterator[Ledger]:
    """Inside the block, stopwatches run on the bare model where `attributing` has them on the model.

    Enter it first: it looks for what `attributing` wraps. bare: a twin of the model, as it was loaded.
    """
    ledger = Ledger(next(bare.parameters()).device.type == "cuda")
    there = dict(bare.named_modules())
    changed: list[tuple[dict, Any, Any]] = []
    for where, kind, key, _ in find(model, packages):
        if where not in there:
            continue  # a module of the package's own
        module = there[where]
        if kind == WRAPPER:
            started: list[Any] = []
            method = _stopping(getattr(module, key), started, ledger)
            changed.append((vars(module), key, vars(module).get(key)))
            vars(module)[key] = _watched(method, started, ledger)
        else:
            hook = _no_pre_hook if kind == "_forward_pre_hooks" else _no_hook
            hooks = getattr(module, kind)
            changed.append((hooks, hook, None))
            hooks[hook] = _timed_hook(hook, ledger, kind)
    try:
        yield ledger
    finally:
        for owner, key, before in changed:
            if before is None:
                del owner[key]
            else:
                owner[key] = before


def _no_pre_hook(module: nn.Module, args: Any, kwargs: Any = None) -> None:
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
