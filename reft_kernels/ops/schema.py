"""The op schemas: what every backend implements, and the contract between plan, pool and kernel.

One op family, five members, each with an overload for every backend::

    intervene_          h[rows] += Uᵀ φ(D h[rows] + c)        in place, inference
    intervene_sum_      the same where the hidden states are the sum of two tensors
    intervene_norm_     the same, and returns the norm that follows of every row, in one pass over h
    intervene           out of place, differentiable
    intervene_backward  gradients of `intervene`

The formula is the one form that all low-rank methods fold to (LoReFT: D = W − R, U = R, c = b;
Wu et al. 2024, arXiv 2404.03592). Arguments shared by all:

=========  =================  =============================================================
argument   shape, dtype       meaning
=========  =================  =============================================================
h          [..., d]           hidden states; d contiguous, leading dimensions collapsible to
                              rows with one stride; float64, float32, bfloat16 or float16
down       [P, d]             the pool's D rows; h's dtype or float32, contiguous
up         [P, d]             the pool's U rows; the same dtype as `down`
bias       [P] float32        the pool's c (float64 in a float64 pool)
kind       [P] int32          per pool row: activation code (low byte, see `Act`), and
                              `NO_PRODUCT` where the row has no D (v = φ(c); D is not read,
                              so 0·Inf can't arise)
rows       [n] int32          flat row indices into h.view(-1, d), sorted by segment; a
                              negative entry is padding and is skipped
tiles      [n_tiles, 3] int32 (segment, start, count): rows[start : start+count] belong to
                              `segment`; count ≤ `TILE`; a tile never crosses a segment;
                              count 0 is padding, and segment −1 edits nothing
spans      [S, 2] int32       (first pool row, rank) of each segment at this layer; rank 0
                              means that the segment has nothing to do here
offsets    [S + 1] int32      rows[offsets[s] : offsets[s+1]] is segment s (backward only)
=========  =================  =============================================================

Rules for every backend: each row of h appears at most once among the segments with rank > 0;
sums are float32 or wider; a row's result depends, to the bit, on that row and its pool range only
(not on the tile it shares, nor on the order of rows), NaN and Inf in the row included, where the pool
range is finite; rows that no tile names are not written; pool rows outside the named spans are never read.

`intervene_sum_` is for engines that add a block's output to the residual stream only in the norm that
follows. It takes `addend`, a tensor of h's shape and dtype. In rows that a segment with rank > 0 names, h
becomes the edited sum, where the sum is rounded to h's dtype before the edit, and `addend` becomes 0. Other
rows of both keep their bits.

The elementwise edits h ← s ⊙ h + v have ops of their own, under the same rules: `ops.scale_shift`.

`intervene_norm_` takes a plan that names every row of h exactly once (`reft_kernels.plan.cover` makes
one). Beside it:

=========  =================  =============================================================
weight     [d], h's dtype     the norm's weight
shift      [d] or None        the norm's bias; h's dtype, contiguous
eps        float              added to the mean square (or variance)
norm       int                which norm, a sum of `Norm`
=========  =================  =============================================================

It returns a new contiguous tensor like h: the norm of each row as it was written (so of the edited row
rounded to h's dtype). The edited rows have the bits that `intervene_` gives them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch

from .arguments import Plan, PoolRows, declared

NAMESPACE = "reft_kernels"
BACKENDS = ("native", "triton", "reference")

#: Largest number of rows in one tile of a plan.
TILE = 16

#: Flag in `kind`: this pool row has no D; its v is φ(c).
NO_PRODUCT = 0x100

#: Mask of the activation code in `kind`.
ACT_MASK = 0xFF


class Act(enum.IntEnum):
    """Activation codes of `kind`. The definitions are torch's; GELU_TANH is the tanh approximation."""

    NONE = 0
    RELU = 1
    GELU = 2
    GELU_TANH = 3
    SILU = 4
    SIGMOID = 5
    TANH = 6
    QUICK_GELU = 7  # x · sigmoid(1.702 x)
    LEAKY_RELU = 8  # slope 0.01
    STEP = 9  # 1 if x > 0, else 0: for NaN, too, as the comparison is false; its slope is 0 everywhere


class Norm(enum.IntFlag):
    """How `intervene_norm_` makes y from a row x, in float32 or wider, with y rounded to h's dtype once.

    RMS (Zhang and Sennrich 2019, arXiv 1910.07467): y = x / sqrt(mean(x²) + eps) · weight.
    """

    RMS = 0
    CENTRED = 1  # LayerNorm (Ba et al. 2016, arXiv 1607.06450): x − mean(x) takes x's place; shift is added
    PLUS_ONE = 2  # the weight is 1 + weight, as Gemma has it
    ROUND = 4  # x / sqrt(…) is rounded to h's dtype before it meets the weight, as Llama has it


_TABLES = f"{declared(PoolRows)}, {declared(Plan)}"

_SCHEMAS = {
    "intervene_": f"(Tensor(a!) h, {_TABLES}) -> ()",
    "intervene_sum_": f"(Tensor(a!) h, Tensor(b!) addend, {_TABLES}) -> ()",
    "intervene_norm_": (
        f"(Tensor(a!) h, {_TABLES}, Tensor weight, Tensor? shift, float eps, int norm) -> Tensor"
    ),
    "intervene": f"(Tensor h, {_TABLES}, Tensor offsets) -> Tensor",
    # grad like h; hs [n, d]: the rows of h before the edit, in the order of `rows` (rows < 0: anything).
    # Returns (dh like grad, ddown [P, d], dup [P, d], dbias [P]); what is not needed comes back with
    # no elements. Pool rows that no row used get zeros.
    "intervene_backward": (
        f"(Tensor grad, Tensor hs, {_TABLES}, Tensor offsets, bool need_h, bool need_pool)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in _SCHEMAS.items():
    for _backend in BACKENDS:
        _library.define(f"{_name}.{_backend}{_schema}")


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """The op `name` of one backend, for example overload("intervene_", "native")."""
    return getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)


INTERVENE_ = {backend: overload("intervene_", backend) for backend in BACKENDS}
INTERVENE_SUM_ = {backend: overload("intervene_sum_", backend) for backend in BACKENDS}
INTERVENE_NORM_ = {backend: overload("intervene_norm_", backend) for backend in BACKENDS}
INTERVENE = {backend: overload("intervene", backend) for backend in BACKENDS}
INTERVENE_BACKWARD = {backend: overload("intervene_backward", backend) for backend in BACKENDS}


def flat(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which takes a `PoolRows` and a `Plan`, as torch calls the op `name`: with their tensors.

    What the op takes before and after them is handed on as it is.
    """
    first = 2 if name in ("intervene_backward", "intervene_sum_") else 1
    middle = first + len(PoolRows._fields)
    offsets = name in ("intervene", "intervene_backward")
    end = middle + len(Plan._fields) - (not offsets)
    missing = () if offsets else (None,)
    make = tuple.__new__  # what a NamedTuple's own does, in a third of the time

    def flattened(*arguments: Any) -> Any:
        pool = make(PoolRows, arguments[first:middle])
        plan = make(Plan, arguments[middle:end] + missing)
        return function(*arguments[:first], pool, plan, *arguments[end:])

    def edit(*arguments: Any) -> None:
        function(arguments[0], make(PoolRows, arguments[1:middle]), make(Plan, arguments[middle:] + missing))

    return edit if name == "intervene_" else flattened


def implement(backend: str, key: str, functions: dict[str, Callable[..., Any]]) -> None:
    """Adds a backend in Python: functions by the ops' names, which take `PoolRows` and `Plan`.

    key: torch's name of what they are for, as "CUDA".
    """
    for name, function in functions.items():
        _library.impl(f"{name}.{backend}", flat(name, function), key)


def _fake_intervene_(h, *_) -> None:
    return None


def _fake_intervene(h, *_):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _fake_backward(grad, hs, pool: PoolRows, plan: Plan, need_h, need_pool):
    dh = torch.empty_like(grad, memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    down, up, bias = (torch.empty_like(t) if need_pool else t.new_empty(0) for t in pool[:3])
    return dh, down, up, bias


_FAKES = {
    "intervene_": _fake_intervene_,
    "intervene_sum_": _fake_intervene_,
    "intervene_norm_": _fake_intervene,
    "intervene": _fake_intervene,
    "intervene_backward": flat("intervene_backward", _fake_backward),
}
for _backend in BACKENDS:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"{NAMESPACE}::{_name}.{_backend}", _fake, lib=_library)
