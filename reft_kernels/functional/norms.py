"""Edited rows that keep the norm they had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..plan import Plan, one_segment
from .checks import check_dtype, check_in_place, check_rows_of, explained


def keep_norm(edited: Tensor, h: Tensor, rows: Tensor | Sequence[int] | None = None) -> Tensor:
    """Scales the rows of `edited` to the norms that h has there: edited · ‖h‖ / ‖edited‖.

    The `normalize` of RepE (Zou et al. 2023, arXiv 2310.01405), repeng and EasySteer, behind an edit of any
    kind. Norms are taken in float32 (float64 in float64), of h and of the edited row as it was rounded.

    >>> h, v = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([2.0, -4.0])
    >>> keep_norm(h + v, h, rows=[1]).tolist()  # (5, 0) has the norm of (3, 4)
    [[5.0, 0.0], [5.0, 0.0]]

    Args:
        edited: [..., d].
        h: what `edited` was made of, in its shape and dtype.
        rows: flat indices into h.reshape(-1, d), each at most once; None for all rows. Checked as those of
            `loreft`.

    Returns:
        A new tensor like `edited`, differentiable in `edited` and h. Rows that are not named keep their bits,
        and so do rows whose norm is that of h already. A row of zeros stays one, since it has no direction,
        and gives no gradient.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; rows out of range or named twice.
    """
    check_dtype(h)
    if edited.shape != h.shape or edited.dtype is not h.dtype or edited.device != h.device:
        raise ValueError(
            f"edited: must be {list(h.shape)} of {h.dtype} on {h.device}, as h is; was "
            f"{list(edited.shape)} of {edited.dtype} on {edited.device}"
        )
    plan = one_segment(rows, check_rows_of(h, rows), 1, h.device)[:-1]
    backend = ops.current_backend(h.device)
    try:
        return ops.RESTORE_NORMS[backend](edited, ops.ROW_NORMS[backend](h, *plan), *plan)
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None


def row_norms(h: Tensor, plan: Plan) -> Tensor:
    """The norms of the rows that a plan edits, for `restore_norms_` behind the edits.

    >>> import reft_kernels as rk
    >>> h, plan = torch.tensor([[1.0, 1.0], [3.0, 4.0]]), rk.make_plan([(rk.Span(0, 1), [1])])
    >>> norms = row_norms(h, plan)
    >>> norms.tolist(), restore_norms_(h.mul_(2), norms, plan).tolist()
    ([5.0], [[2.0, 2.0], [3.0, 4.0]])

    Args:
        h: [..., d], as `intervene_` takes it.
        plan: from `reft_kernels.make_plan`. Rows of segments whose span has rank 0 have no norm here, and
            keep none: so a table of spans says which adapters of a batch do.

    Returns:
        [n], in the order of the plan's rows: float32, or float64 where h is. 0 where there is none.

    Raises:
        ValueError: h does not fit the plan.
    """
    _check_plan(h, plan)
    try:
        return ops.ROW_NORMS[ops.current_backend(h.device)](h, *plan[:-1])
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None


def restore_norms_(h: Tensor, norms: Tensor, plan: Plan) -> Tensor:
    """Scales the rows that a plan edited back to their norms, in place. For inference.

    >>> import reft_kernels as rk
    >>> h, plan = torch.tensor([[3.0, 4.0]]), rk.make_plan([(rk.Span(0, 1), [0])])
    >>> restore_norms_(h, torch.tensor([10.0]), plan).tolist()
    [[6.0, 8.0]]

    Args:
        h: [..., d], edited since `row_norms` read it. It is returned.
        norms: what `row_norms` gave.
        plan: the same.

    Raises:
        ValueError: h or norms don't fit the plan, h's rows don't lie in memory as `intervene_` needs them, or
            autograd would need h (use `keep_norm` there).
    """
    _check_plan(h, plan)
    check_in_place(h)
    if torch.is_grad_enabled() and (h.requires_grad or norms.requires_grad):
        raise ValueError(
            "h: requires a gradient, which an edit in place would lose; use keep_norm, or no_grad"
        )
    try:
        ops.RESTORE_NORMS_[ops.current_backend(h.device)](h, norms, *plan[:-1])
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None
    return h


def _check_plan(h: Tensor, plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise ValueError(f"plan: must be a Plan, was a {type(plan).__name__}")
    check_dtype(h)
    if h.dim() < 1 or h.shape[-1] < 1:
        raise ValueError(f"h: must be [..., d] with d ≥ 1, shape was {list(h.shape)}")
    if h.device != plan.rows.device:
        raise ValueError(f"plan: is on {plan.rows.device}, but h is on {h.device}")
