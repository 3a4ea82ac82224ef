"""The ops: checks, launches, what lies between. Nothing here reads a device tensor back to the host."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..schema import Norm, check_addend
from . import options
from .blocks import LOW_RANK
from .checks import check, check_norm, readable, row_stride
from .kernels_backward import backward_add_kernel, backward_pool_kernel, backward_rows_kernel
from .kernels_forward import fold_kernel, intervene_kernel
from .kernels_norm import intervene_norm_kernel
from .launcher import Launcher, on

_CENTRED = int(Norm.CENTRED)


_edit = Launcher(intervene_kernel, options.forward_options)
_fold = Launcher(fold_kernel, options.fold_options)
_edit_and_norm = Launcher(intervene_norm_kernel, options.norm_options)
_rows = Launcher(backward_rows_kernel, options.rows_options)
_pool = Launcher(backward_pool_kernel, options.pool_options)
_add = Launcher(backward_add_kernel, options.add_options)


def intervene_(h, down, up, bias, kind, rows, tiles, spans) -> None:
    check(h, "h", down, up, bias, kind, rows, tiles, spans)
    stride = row_stride(h, "h")
    d, n_tiles = h.shape[-1], tiles.shape[0]
    if n_tiles == 0 or h.numel() == 0 or down.shape[0] == 0:
        return
    with on(h.device):
        _edit(
            (n_tiles, 1, 1), (h.dtype, down.dtype), d,
            h, down, up, bias, kind, rows, tiles, spans, h.numel() // d, stride,
        )  # fmt: skip


def intervene_sum_(h, addend, down, up, bias, kind, rows, tiles, spans) -> None:
    check(h, "h", down, up, bias, kind, rows, tiles, spans)
    check_addend(h, addend)
    stride, other = row_stride(h, "h"), row_stride(addend, "addend")
    d, n_tiles = h.shape[-1], tiles.shape[0]
    if n_tiles == 0 or h.numel() == 0 or down.shape[0] == 0:
        return
    with on(h.device):
        _fold(
            (n_tiles, 1, 1), (h.dtype, down.dtype), d,
            h, addend, rows, tiles, spans, h.numel() // d, stride, other,
        )  # fmt: skip
    intervene_(h, down, up, bias, kind, rows, tiles, spans)


def intervene_norm_(h, down, up, bias, kind, rows, tiles, spans, weight, shift, eps, norm) -> Tensor:
    check(h, "h", down, up, bias, kind, rows, tiles, spans)
    stride = row_stride(h, "h")
    check_norm(h, rows, tiles, weight, shift, norm)
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    d = h.shape[-1]
    if h.numel() == 0:
        return out
    if h.data_ptr() % 16 or (stride % 16 == 0) != (d % 16 == 0):
        # Triton compiles for what addresses are divisible by, and so may sum a row in another order.
        copy = h.clone(memory_format=torch.contiguous_format)
        out = intervene_norm_(copy, down, up, bias, kind, rows, tiles, spans, weight, shift, eps, norm)
        h.copy_(copy)
        return out
    with on(h.device):
        _edit_and_norm(
            (tiles.shape[0], 1, 1), (h.dtype, down.dtype), d,
            h, out, weight, shift, down, up, bias, kind, rows, tiles, spans, h.numel() // d, stride,
            eps, norm, CENTRED=bool(norm & _CENTRED),
        )  # fmt: skip
    return out


def intervene(h, down, up, bias, kind, rows, tiles, spans, offsets) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    intervene_(out, down, up, bias, kind, rows, tiles, spans)
    return out


def intervene_backward(
    grad, hs, down, up, bias, kind, rows, tiles, spans, offsets, need_h: bool, need_pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(grad, "grad", down, up, bias, kind, rows, tiles, spans, offsets)
    d, n, n_pool = grad.shape[-1], rows.shape[0], down.shape[0]
    if hs.shape != (n, d) or hs.dtype is not grad.dtype or not hs.is_contiguous():
        raise ValueError(
            f"hs: must be a contiguous [{n}, {d}] of {grad.dtype}, was {list(hs.shape)} of {hs.dtype}, "
            f"strides {hs.stride()}"
        )
    dh = grad.clone(memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    if need_pool:
        ddown, dup, dbias = torch.empty_like(down), torch.empty_like(up), torch.empty_like(bias)
    else:
        ddown, dup, dbias = down.new_empty(0), up.new_empty(0), bias.new_empty(0)
    if n_pool == 0 or not (need_h or need_pool):
        return dh, ddown, dup, dbias
    if tiles.shape[0] == 0 or grad.numel() == 0:
        if need_pool:
            ddown.zero_(), dup.zero_(), dbias.zero_()
        return dh, ddown, dup, dbias

    grad = readable(grad)
    stride, n_rows, dtypes = row_stride(grad, "grad"), grad.numel() // d, (grad.dtype, down.dtype)
    kept = torch.empty((2, n if need_pool else 0, LOW_RANK), dtype=torch.float32, device=grad.device)
    with on(grad.device):
        _rows(
            (tiles.shape[0], 1, 1), dtypes, d,
            grad, dh, hs, down, up, bias, kind, kept[0], kept[1], rows, tiles, spans, n_rows, stride,
            int(need_h), int(need_pool),
        )  # fmt: skip
        if need_pool:
            blocks, n_segments = options.pool_options(*dtypes, d)["BLOCK"], spans.shape[0]
            splits = options.pool_splits(n, n_pool, d)
            sums = ddown, dup, dbias
            if splits > 1:
                sums = tuple(bias.new_empty(splits, *t.shape) for t in sums)
            _pool(
                (triton.cdiv(n_pool, 16), triton.cdiv(d, blocks), splits), dtypes, d,
                grad, hs, down, up, bias, kind, kept[0], kept[1], *sums, rows, spans, offsets,
                n_rows, stride, n_pool, n_segments, in_float32=splits > 1,
            )  # fmt: skip
            if splits > 1:
                columns = options.add_options(*dtypes, d)["BLOCK"]
                _add(
                    (n_pool, triton.cdiv(d, columns), 1), dtypes, d,
                    *sums, ddown, dup, dbias, spans, n_pool, n_segments, splits,
                )  # fmt: skip
    return dh, ddown, dup, dbias
