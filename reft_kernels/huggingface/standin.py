"""An object that stands for a method of one module instance, in the instance's `__dict__`.

Not a hook: a forward hook that does nothing costs a module's call (timed by itself) about 1 µs when all is in
the caches and 14 when a model's weights have just streamed through them; such a stand-in 0.2 and 2.
An object rather than a closure, so that a deepcopy or a pickle of the model gets its own.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import nn

from ..ops import launch


class StandIn:
    """Stands for the method `name` of `module`; `original` is the method below.

    own: what the instance had in its place before (another wrapper), or None.
    """

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        self.module, self.name = module, name
        self.own = module.__dict__.get(name)
        self.original = getattr(module, name)
        self.__name__, self.__doc__ = name, self.original.__doc__

    @property
    def __wrapped__(self) -> Any:  # inspect.signature looks here
        return self.original

    def parameters(self) -> tuple[str, ...]:
        """Names of the method's parameters, in order."""
        return tuple(inspect.signature(self.original).parameters)

    def attach(self) -> None:
        self.module.__dict__[self.name] = self

    def detach(self) -> None:
        """Gives the instance back what it had. Under another's wrapper it stays, and only passes calls on."""
        above = None
        top = self.module.__dict__.get(self.name)
        while isinstance(top, StandIn) and top is not self:
            above, top = top, top.own
        if top is not self:
            return
        if above is not None:
            above.own, above.original = self.own, self.original
        elif self.own is None:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.own

    def reattach(self) -> bool:
        """Takes its place again if it was thrown out; returns whether it was.

        Who takes a wrapper of theirs off by setting the class's own method on the instance (as accelerate
        does) takes off with it what was put on since.
        """
        top = self.module.__dict__.get(self.name)
        if top is not None and getattr(top, "__func__", None) is not getattr(type(self.module), self.name):
            return False
        self.own, self.original = top, getattr(self.module, self.name)
        self.attach()
        return True

    def __reduce__(self) -> Any:
        # By the class in Python: who reads a pickle may have no other.
        return launch.blank, (launch.plain(type(self)),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.own is None:
            # A bound method is pickled as "the attribute of that name", which is this object.
            del state["original"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.own is None:
            self.original = types.MethodType(getattr(type(self.module), self.name), self.module)
