"""Many adapters, by a pool and a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import check_norm
from ..plan import Plan, check_pool
from ..pool import Pool
from ..scale_pool import ScalePool
from .checks import check_dtype, check_in_place, explained


def _check(h: Tensor, pool: Pool, plan: Plan) -> None:
    if not isinstance(pool, Pool):
        raise ValueError(f"pool: must be a Pool, was a {type(pool).__name__}")
    if not isinstance(plan, Plan):
        raise ValueError(f"plan: must be a Plan, was a {type(plan).__name__}")
    if not torch.compiler.is_compiling():  # there it would be a constant, or a reason to compile anew
        check_pool(plan.spans, pool)
    check_dtype(h)
    if h.dim() < 1 or h.shape[-1] != pool.width:
        raise ValueError(
            f"h: last dimension must be the pool's width {pool.width}, shape was {list(h.shape)}"
        )
    if h.device != pool.rows[0].device or h.device != plan.rows.device:
        raise ValueError(
            "h, pool and plan must be on one device; they are on "
            f"{h.device}, {pool.device} and {plan.rows.device}"
        )
    if pool.dtype is not h.dtype and pool.dtype is not torch.float32:
        raise ValueError(f"pool: its dtype must be h's ({h.dtype}) or torch.float32, was {pool.dtype}")


def _check_source(pool: Pool) -> None:
    if isinstance(pool, ScalePool):
        raise ValueError("source: a ScalePool takes none; s ⊙ h + v has no c")


def intervene_(h: Tensor, pool: Pool, plan: Plan, source: Tensor | None = None) -> Tensor:
    """Edits the rows of h that the plan names, in place: h ← h + Uᵀ φ(D h + c). For inference.

    >>> import reft_kernels as rk
    >>> pool = rk.Pool(width=2)  # one row that adds (1, 2): no D, φ(c) = 1
    >>> kind = torch.tensor([rk.ops.NO_PRODUCT], dtype=torch.int32)
    >>> span = pool.add(rk.Fold(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.ones(1), kind))
    >>> intervene_(torch.zeros(3, 2), pool, rk.make_plan([(span, [1])])).tolist()
    [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]

    Args:
        h: [..., d], float32, bfloat16 or float16 (float64 on the reference backend), last dimension
            contiguous. It is returned.
        pool: folded adapters, on h's device, in h's dtype or float32; of a `ScalePool` the rows become
            s ⊙ h + v.
        plan: from `reft_kernels.make_plan`.
        source: [n, s] in the dtype of the pool's c, added to D h + c: row i for the plan's i-th row, column j
            for the j-th pool row of its span; s is at least the largest rank. None adds nothing.

    Raises:
        ValueError: h does not fit the pool or plan, its rows don't lie in memory as said above, or autograd
            would need h (use `intervene` there); the plan is of another pool, or of a span that was removed
            since. On an accelerator the plan is not read back, and a row that h lacks is skipped.
    """
    _check(h, pool, plan)
    check_in_place(h)
    if torch.is_grad_enabled() and h.requires_grad:
        raise ValueError(
            "h: requires a gradient, which an in-place edit would lose; use intervene, or no_grad"
        )
    backend = ops.current_backend(h.device)
    try:
        if source is not None:
            _check_source(pool)
            ops.INTERVENE_SOURCE_[backend](h, source, *pool.rows, *plan[:-1])
            return h
        table = ops.SCALE_SHIFT_ if isinstance(pool, ScalePool) else ops.INTERVENE_
        table[backend](h, *pool.rows, *plan[:-1])
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None
    return h


def intervene(h: Tensor, pool: Pool, plan: Plan, source: Tensor | None = None) -> Tensor:
    """`intervene_` out of place, differentiable in h and source (a pool's own tensors are constants).

    >>> import reft_kernels as rk
    >>> pool, h = rk.Pool(width=2), torch.ones(3, 2, requires_grad=True)
    >>> one, kind = torch.tensor([[1.0, 0.0]]), torch.zeros(1, dtype=torch.int32)
    >>> span = pool.add(rk.Fold(-one, one, torch.zeros(1), kind))
    >>> out = intervene(h, pool, rk.make_plan([(span, [1])]))
    >>> out.tolist()
    [[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    >>> torch.autograd.grad(out.sum(), h)[0].tolist()
    [[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]

    Shapes and errors as `intervene_`. Returns a new contiguous tensor of h's shape and dtype.
    """
    _check(h, pool, plan)
    backend = ops.current_backend(h.device)
    try:
        if source is not None:
            _check_source(pool)
            return ops.INTERVENE_SOURCE[backend](h, source, *pool.rows, *plan)
        table = ops.SCALE_SHIFT if isinstance(pool, ScalePool) else ops.INTERVENE
        return table[backend](h, *pool.rows, *plan)
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None


def intervene_norm_(
    h: Tensor,
    pool: Pool,
    plan: Plan,
    weight: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    norm: int = ops.Norm.RMS,
) -> Tensor:
    """`intervene_`, and the norm of every row of the edited h, as a new tensor. For inference.

    >>> import reft_kernels as rk
    >>> h, plan = torch.tensor([[3.0, 4.0]]), rk.make_plan([], total_rows=1, cover=True)  # nothing is edited
    >>> intervene_norm_(h, rk.Pool(width=2), plan, torch.ones(2), eps=0.0).mul(12.5**0.5).round().tolist()
    [[3.0, 4.0]]

    The edited rows have the bits that `intervene_` gives them, and the norm reads them as they were
    written, in h's dtype; so it is the edit followed by the model's norm, in one pass over h. A row's
    norm depends, to the bit, on that row alone.

    Args:
        h, pool: as `intervene_` takes them. h is edited in place.
        plan: one that names every row of h, from `reft_kernels.make_plan` with total_rows and cover=True.
        weight: [d], contiguous, in h's dtype and on its device.
        shift: like weight; added at the end.
        eps: added to the mean square (or variance) before its root is taken.
        norm: a sum of `ops.Norm`. Llama's RMSNorm is RMS + ROUND (in float32 the two are one), Gemma's
            RMS + PLUS_ONE, torch.nn.LayerNorm CENTRED.

    Returns:
        The norm, a contiguous tensor of h's shape and dtype.

    Raises:
        ValueError: what `intervene_` raises; a weight, shift, eps or norm that does not fit; a plan with
            fewer rows than h; a row of h in no tile, or in two (on a CPU, by the native backend; on an
            accelerator the plan is not read back, and what is returned for a row that it lacks is
            undefined); or autograd would need h, weight or shift.
    """
    if isinstance(pool, ScalePool):
        raise ValueError("pool: intervene_norm_ takes no ScalePool; use intervene_ and the norm by itself")
    _check(h, pool, plan)
    check_in_place(h)
    check_norm(h, weight, shift, eps, norm)
    rows = h.numel() // h.shape[-1] if h.shape[-1] else 0
    if plan.rows.shape[0] < rows:
        raise ValueError(
            f"plan: must name every row of h, has {plan.rows.shape[0]} of {rows}; "
            "make_plan takes total_rows and cover=True"
        )
    if torch.is_grad_enabled():
        for name, tensor in (("h", h), ("weight", weight), ("shift", shift)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name}: requires a gradient, and intervene_norm_ has none; use intervene and the "
                    "norm by itself, or no_grad"
                )
    op = ops.INTERVENE_NORM_[ops.current_backend(h.device)]
    try:
        return op(h, *pool.rows, *plan[:-1], weight, shift, float(eps), int(norm))
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None
