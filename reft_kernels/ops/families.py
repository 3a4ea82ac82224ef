"""What the op families beside `ops.schema`'s own share: how one is defined, called and traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .arguments import Plan
from .schema import BACKENDS, NAMESPACE, _library, overload


def define(schemas: Mapping[str, str]) -> None:
    """Ops by name, each with an overload for every backend. The text is what stands behind the name."""
    for name, schema in schemas.items():
        for backend in BACKENDS:
            _library.define(f"{name}.{backend}{schema}")


def overloads(name: str) -> dict[str, Any]:
    """An op of each backend."""
    return {backend: overload(name, backend) for backend in BACKENDS}


def flattened(
    function: Callable[..., Any], before: int, pool: type[Any] | None = None, *, in_place: bool = False
) -> Callable[..., Any]:
    """`function`, which takes a pool's rows and a `Plan`, as torch calls the op: with their tensors.

    before: arguments before them. pool: the type of the rows; None for an op that takes none. in_place: of
    those that take no `offsets`.
    """
    middle = before + (len(pool._fields) if pool is not None else 0)
    end = middle + len(Plan._fields) - in_place

    def flat(*arguments: Any) -> Any:
        rows = () if pool is None else (pool(*arguments[before:middle]),)
        return function(*arguments[:before], *rows, Plan(*arguments[middle:end]), *arguments[end:])

    return flat


def fake_in_place(h: Tensor, *_: Any) -> None:
    """What a tracer is told of an op that edits h."""
    return None


def fake(h: Tensor, *_: Any) -> Tensor:
    """What a tracer is told of an op that returns an h."""
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def trace_as(backend: str, fakes: Mapping[str, Callable[..., Any]]) -> None:
    """Tells tracers what a backend's ops, by name, return."""
    for name, one in fakes.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}", one, lib=_library)
