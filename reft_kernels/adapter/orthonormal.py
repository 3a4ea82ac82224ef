"""Orthonormal rows as a differentiable map, without a d×d buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthonormal_rows(x: Tensor) -> Tensor:
    """x with its rows made orthonormal: L⁻¹ x, where x xᵀ = L Lᵀ (Cholesky QR).

    Args:
        x: [..., r, d], r ≤ d, of full row rank. Otherwise the CPU raises torch.linalg.LinAlgError; on an
            accelerator, where to look would be to wait for it, all of the result is NaN.

    Returns:
        Like x, in float32 at least, contiguous. Rows that were orthonormal stay as they were up to rounding.

    The Gram matrix squares the condition number, so the map is computed in float64 (float32 where a device
    has none). Autograd differentiates it; the triangular factor has no singular gradient where singular
    values coincide, which the polar factor through an eigendecomposition has.
    """
    out = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    lower = _lower(wide @ wide.mT, checked=wide.device.type == "cpu")
    # The solver leaves columns contiguous; the kernels read rows.
    return torch.linalg.solve_triangular(lower, wide, upper=False).to(out).contiguous()


def only_rows(x: Tensor, rows: Sequence[int] | None) -> Tensor:
    """x [..., r, d], of which only these rows get a gradient; None for all."""
    if rows is None or not x.requires_grad:
        return x
    mine = torch.zeros(x.shape[-2], 1, dtype=torch.bool)
    mine[list(rows)] = True
    return torch.where(mine.to(x.device), x, x.detach())


def _lower(gram: Tensor, checked: bool) -> Tensor:
    """The Cholesky factor of gram [..., r, r]. Where there is none: an error, or (checked: False) NaN."""
    lower, info = torch.linalg.cholesky_ex(gram, check_errors=checked)
    # What the solver leaves is finite up to the row that it failed at, and could be trained with unnoticed.
    return lower if checked else lower.masked_fill((info != 0)[..., None, None], torch.nan)


def orthonormality_error(x: Tensor) -> float:
    """The largest element of |x xᵀ − I|, for x [r, d]."""
    wide = x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)
    gram = wide @ wide.mT
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max().item()
