"""The low-rank edit with a source for each row: h[rows] += Uᵀ φ(D h[rows] + c + source).

In `ops.schema` all rows of a segment read one c. Here each has an addend of its own that comes with the call:
interchange (DII: D = −R, U = R, source = R · states of another run; Geiger et al. 2023, arXiv 2303.02536),
Boundless DAS, ShadowPEFT. There are three members, each with an overload for every backend::

    intervene_source_          in place, inference
    intervene_source           out of place, differentiable
    intervene_source_backward  gradients of `intervene_source`

They take what `intervene_` and `intervene` take, under the same rules, and after h (or hs) a tensor more:

========  =============  ========================================================================
source    [n, s]         row i is that of plan row i, and its column j belongs to pool row first + j
                         of the row's span, whether that has a D or not; bias's dtype, contiguous; s is
                         at least the rank of every segment. What is beyond the rank, of padding and of
                         segments that edit nothing is not read. (On an accelerator, where the plan is not
                         read back, pool rows beyond s edit nothing.)
========  =============  ========================================================================

The sum is (D h + source) + c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import Plan, PoolRows, declared
from .autograd import selected
from .schema import BACKENDS, NAMESPACE, _library, overload

_TABLES = f"{declared(PoolRows)}, {declared(Plan)}"

_SCHEMAS = {
    "intervene_source_": f"(Tensor(a!) h, Tensor source, {_TABLES}) -> ()",
    "intervene_source": f"(Tensor h, Tensor source, {_TABLES}, Tensor offsets) -> Tensor",
    # As intervene_backward, and dsource [n, s]: 0 where the source is not read.
    "intervene_source_backward": (
        f"(Tensor grad, Tensor hs, Tensor source, {_TABLES}, Tensor offsets, bool need_h, bool need_pool)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

for _name, _schema in _SCHEMAS.items():
    for _backend in BACKENDS:
        _library.define(f"{_name}.{_backend}{_schema}")

INTERVENE_SOURCE_ = {backend: overload("intervene_source_", backend) for backend in BACKENDS}
INTERVENE_SOURCE = {backend: overload("intervene_source", backend) for backend in BACKENDS}
INTERVENE_SOURCE_BACKWARD = {backend: overload("intervene_source_backward", backend) for backend in BACKENDS}

#: Where a plan's rows stand among the source and the tensors of pool and plan.
_ROWS = 1 + len(PoolRows._fields)


def _flat(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which takes a `PoolRows` and a `Plan`, as torch calls the op: with their tensors."""
    first = 3 if name == "intervene_source_backward" else 2
    middle = first + len(PoolRows._fields)
    end = middle + len(Plan._fields) - (name == "intervene_source_")

    def flattened(*arguments: Any) -> Any:
        pool, plan = PoolRows(*arguments[first:middle]), Plan(*arguments[middle:end])
        return function(*arguments[:first], pool, plan, *arguments[end:])

    return flattened


def implement(backend: str, key: str, functions: dict[str, Callable[..., Any]]) -> None:
    """Adds a backend in Python: functions by the ops' names, which take `PoolRows` and `Plan`."""
    for name, function in functions.items():
        _library.impl(f"{name}.{backend}", _flat(name, function), key)


def _fake_in_place(h: Tensor, *_: Any) -> None:
    return None


def _fake(h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor, hs: Tensor, source: Tensor, pool: PoolRows, plan: Plan, need_h: bool, need_pool: bool
) -> tuple[Tensor, ...]:
    dh = torch.empty_like(grad, memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    of_pool = [torch.empty_like(t) if need_pool else t.new_empty(0) for t in pool[:3]]
    return (dh, *of_pool, torch.empty_like(source))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    h, *tables = inputs
    ctx.save_for_backward(selected(h, tables[_ROWS]), *tables)


def _register(backend: str) -> None:
    backward_op = INTERVENE_SOURCE_BACKWARD[backend]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        dh, *of_pool, dsource = backward_op(grad, *ctx.saved_tensors, need[0], any(need[2:5]))
        found = (dh, dsource, *of_pool)
        return (*(it if wanted else None for it, wanted in zip(found, need)), *(None,) * (len(need) - 5))

    torch.library.register_autograd(
        f"{NAMESPACE}::intervene_source.{backend}", backward, setup_context=_save, lib=_library
    )
    for name, fake in (
        ("intervene_source_", _fake_in_place),
        ("intervene_source", _fake),
        ("intervene_source_backward", _flat("intervene_source_backward", _fake_backward)),
    ):
        torch.library.register_fake(f"{NAMESPACE}::{name}.{backend}", fake, lib=_library)


for _backend in BACKENDS:
    _register(_backend)
