"""Gradient checkpointing: a block is run again under the plan that its forward had."""

from __future__ import annotations

from typing import Any

import torch

from .runtime import Runtime


class Recompute:
    """A block's gradient-checkpointing function that runs the block again under the plan of its forward."""

    def __init__(self, runtime: Runtime, original: Any) -> None:
        self.runtime, self.original = runtime, original

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.runtime.plan
        if plan is not None and plan.folds and getattr(self.original, "keywords", {}).get("use_reentrant"):
            args = _wanting_grad(args)
        without_grad: list[bool] = []  # of the first run: true for the reentrant kind

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            again = bool(without_grad)
            without_grad.append(not torch.is_grad_enabled())
            with self.runtime.using(plan):
                if plan is not None:
                    plan.recomputing = again and without_grad[0]
                try:
                    return function(*inner, **inner_kwargs)
                finally:
                    if plan is not None:
                        plan.recomputing = False

        return self.original(run, *args, **kwargs)


def _wanting_grad(args: tuple) -> tuple:
    """Reentrant checkpointing cuts off a block of which no input wants a gradient, as in a frozen model: the
    hidden states then do."""
    if any(isinstance(one, torch.Tensor) and one.requires_grad for one in args):
        return args
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return args
    return (args[0].detach().requires_grad_(), *args[1:])


def keep_plans(runtime: Runtime) -> None:
    """Wraps what gradient checkpointing calls, again after every time that it was enabled."""
    for block in runtime.blocks.layers:
        function = block.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, Recompute):
            block.__dict__["_gradient_checkpointing_func"] = Recompute(runtime, function)


def forget_plans(runtime: Runtime) -> None:
    """Undoes `keep_plans`."""
    for block in runtime.blocks.layers:
        function = block.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, Recompute):
            block.__dict__["_gradient_checkpointing_func"] = function.original
