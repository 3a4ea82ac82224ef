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
from .families import define, fake, fake_in_place, flattened, overloads, trace_as
from .schema import BACKENDS, NAMESPACE, _library

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

define(_SCHEMAS)

INTERVENE_SOURCE_ = overloads("intervene_source_")
INTERVENE_SOURCE = overloads("intervene_source")
INTERVENE_SOURCE_BACKWARD = overloads("intervene_source_backward")

#: Where a plan's rows stand among the source and the tensors of pool and plan.
_ROWS = 1 + len(PoolRows._fields)


def _flat(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    before = 3 if name == "intervene_source_backward" else 2
    return flattened(function, before, PoolRows, in_place=name == "intervene_source_")


def implement(backend: str, key: str, functions: dict[str, Callable[..., Any]]) -> None:
    """Adds a backend in Python: functions by the ops' names, which take `PoolRows` and `Plan`."""
    for name, function in functions.items():
        _library.impl(f"{name}.{backend}", _flat(name, function), key)


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
    backward_fake = _flat("intervene_source_backward", _fake_backward)
    trace_as(
        backend,
        {
            "intervene_source_": fake_in_place,
            "intervene_source": fake,
            "intervene_source_backward": backward_fake,
        },
    )


for _backend in BACKENDS:
    _register(_backend)
