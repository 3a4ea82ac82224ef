"""The ops that keep norms: checks and launches, through Triton's own way each time."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..arguments import Plan
from ..checks import check_norms
from ..schema import TILE
from .checks import readable, row_stride
from .kernels_keep_norm import restore_norms_backward_kernel, restore_norms_kernel, row_norms_kernel
from .launcher import on


def options(d: int) -> dict[str, Any]:
    """Meta-parameters of all of these kernels."""
    whole = triton.next_power_of_2(d)
    # No fusing: the kernels' docstring says why.
    return {"D": d, "WHOLE": whole, "num_warps": min(16, max(4, whole // 1024)), "enable_fp_fusion": False}


def _launch(kernel: Any, h: Tensor, name: str, tensors: tuple[Tensor, ...], plan: Plan) -> None:
    """One program for each place of each tile. h, name: whose rows the plan names, and what it is called."""
    d, stride, n_tiles = h.shape[-1], row_stride(h, name), plan.tiles.shape[0]
    if n_tiles == 0 or h.numel() == 0:
        return
    with on(h.device):
        kernel[n_tiles, TILE](*tensors, *plan[:-1], h.numel() // d, stride, **options(d))


def row_norms(h: Tensor, plan: Plan) -> Tensor:
    norms = torch.zeros(plan.rows.shape, dtype=torch.float32, device=h.device)
    check_norms(h, norms, plan, "triton")
    h = readable(h)
    _launch(row_norms_kernel, h, "h", (h, norms), plan)
    return norms


def restore_norms_(h: Tensor, norms: Tensor, plan: Plan) -> None:
    check_norms(h, norms, plan, "triton")
    _launch(restore_norms_kernel, h, "h", (h, norms), plan)


def restore_norms(h: Tensor, norms: Tensor, plan: Plan) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    restore_norms_(out, norms, plan)
    return out


def restore_norms_backward(grad: Tensor, hs: Tensor, norms: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    check_norms(grad, norms, plan, "triton", "grad")
    d, n = grad.shape[-1], plan.rows.shape[0]
    if hs.shape != (n, d) or hs.dtype is not grad.dtype or not hs.is_contiguous():
        raise ValueError(
            f"hs: must be a contiguous [{n}, {d}] of {grad.dtype}, was {list(hs.shape)} of {hs.dtype}, "
            f"strides {hs.stride()}"
        )
    dh, dnorms = grad.clone(memory_format=torch.contiguous_format), torch.zeros_like(norms)
    grad = readable(grad)
    _launch(restore_norms_backward_kernel, grad, "grad", (grad, dh, hs, norms, dnorms), plan)
    return dh, dnorms
