"""Checks, block sizes and launches. Nothing here reads a device tensor back to the host."""

from __future__ import annotations

import contextlib
import threading

import torch
import triton
from torch import Tensor

from ..schema import TILE, Norm
from .blocks import INTERPRETING, LOW_RANK
from .kernels_backward import add_kernel, pool_kernel, rows_kernel
from .kernels_forward import intervene_kernel
from .kernels_norm import intervene_norm_kernel

#: Terms that a product of 32-bit operands must have. Before Triton 3.8 as many as one of 16-bit operands.
LEAST_TERMS = 16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 8

_interpreter = threading.Lock()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Meta-parameters come from what is the same in every batch (dtypes and d): a row's sums must not depend
# on the batch. The blocks are the largest that compile without spills for sm_80 to sm_100, and their
# shared memory fits the 99 KiB of consumer GPUs. tests/test_triton_compile.py holds them to that.


def _common(h_dtype: torch.dtype, d: int) -> dict:
    # Rows of h in float32 need products in full float32; AMD's Triton has TF32 on few chips only.
    full = h_dtype is torch.float32 or torch.version.hip is not None
    # FMA: fewer roundings, and without the choice Triton 3.9 warns.
    return {"D": d, "FULL": full, "num_stages": 3, "enable_fp_fusion": True}


def forward_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int, aligned: bool = True) -> dict:
    """Meta-parameters of `intervene_kernel`. docs/triton.md has the reasons.

    `aligned`: rows of h begin at multiples of 16 bytes. It makes no difference to the sums.
    """
    options = _common(h_dtype, d)
    hip = torch.version.hip is not None
    warps = 4 if d <= 1024 or hip else 8
    # Two blocks of 8 warps fit a multiprocessor at 128 registers; float32 and very wide rows need more, and
    # rows that can't be read 16 bytes at a time.
    fits = not options["FULL"] and warps == 8 and d <= 8192 and d % 16 == 0 and aligned
    options.update(num_warps=warps, SLICES=warps, maxnreg=128 if fits else 255)
    wide = not options["FULL"] and h_dtype is pool_dtype and d % 16 == 0
    options.update(BLOCK=warps * (64 if wide else 32), PARTS=LEAST_TERMS // 8)
    options.update(WHOLE=triton.next_power_of_2(d), ALONE=not hip, SHARED=74 * 1024)
    if hip:
        del options["maxnreg"]
        options["SHARED"] = 32 * 1024
    return options


def norm_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int) -> dict:
    """Meta-parameters of `intervene_norm_kernel`: `intervene_kernel`'s, so that edits have the same bits."""
    options = forward_options(h_dtype, pool_dtype, d)
    # Rows on their way lie in shared memory, one fewer than stages.
    return options | {"NORM_STAGES": 3 if options["WHOLE"] * h_dtype.itemsize <= 16 * 1024 else 1}


def rows_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int) -> dict:
    """Meta-parameters of `rows_kernel`."""
    options = _common(h_dtype, d)
    down = 16 if options["FULL"] else 32 if d % 16 else 64
    up = 64 if options["FULL"] or h_dtype is not pool_dtype or d % 16 else 128
    options.update(WHOLE=triton.next_power_of_2(d), DOWN_BLOCK=down, UP_BLOCK=up, STAGES=4)
    # The row form holds d in registers, the products of float32 hold operands of 16 terms.
    options["num_warps"] = 4 if d <= 4096 and not options["FULL"] else 8
    if torch.version.hip is None:
        # Else ptxas spills a few registers for the sake of one more block on a multiprocessor.
        options["maxnreg"] = 255
    return options


def pool_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int) -> dict:
    """Meta-parameters of `pool_kernel`."""
    common = _common(h_dtype, d)
    again = 32 if h_dtype is not pool_dtype or d <= 64 else 64
    # Rows that can't be read 16 bytes at a time take twice the registers.
    again = 16 if common["FULL"] or d % 16 else again
    block = 32 if common["FULL"] and d % 16 else 64
    return common | {"ROWS": 32, "BLOCK": block, "AGAIN": again, "num_warps": 4 if common["FULL"] else 8}


def add_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int) -> dict:
    """Meta-parameters of `add_kernel`."""
    return {"D": d, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}


def pool_splits(n: int, n_pool: int, d: int) -> int:
    """How many programs share the rows of one block of the pool's gradients.

    As many as have 256 rows each, up to 16, while their sums stay within 128 MiB.
    """
    return max(1, min(16, n // 256, 2**24 // (n_pool * d)))


def _row_stride(h: Tensor, name: str) -> int:
    """The one stride between the rows of h.view(-1, d); ValueError where there is none."""
    if h.dim() < 1 or h.shape[-1] < 1:
        raise ValueError(f"{name}: must be [..., d] with d ≥ 1, shape was {list(h.shape)}")
    if h.shape[-1] > 1 and h.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension must be contiguous, strides were {h.stride()}")
    if not h.numel():
        return h.shape[-1]
    outer = [(size, stride) for size, stride in zip(h.shape[:-1], h.stride()[:-1]) if size != 1]
    for (_, stride), (inner_size, inner_stride) in zip(outer, outer[1:]):
        if stride != inner_size * inner_stride:
            raise ValueError(
                f"{name}: its leading dimensions must collapse to rows with one stride; shape "
                f"{list(h.shape)} with strides {h.stride()} does not"
            )
    return outer[-1][1] if outer else h.shape[-1]


def _check(h: Tensor, name: str, pool: tuple[Tensor, ...], plan: tuple[Tensor, ...]) -> None:
    """Refuses what the kernels would misread. Before anything is written."""
    down, up, bias, kind = pool
    rows, tiles, spans = plan[:3]
    d = h.shape[-1] if h.dim() else 0
    if h.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: the triton backend takes {', '.join(map(str, _DTYPES))}, was {h.dtype}"
            + ("; the reference backend computes in float64" if h.dtype is torch.float64 else "")
        )
    if down.dtype is not h.dtype and down.dtype is not torch.float32 or up.dtype is not down.dtype:
        raise ValueError(
            f"down, up: one dtype, {name}'s ({h.dtype}) or torch.float32; were {down.dtype} and {up.dtype}"
        )
    for label, tensor, shape, dtype in (
        ("down", down, (down.shape[0], d), down.dtype),
        ("up", up, (down.shape[0], d), down.dtype),
        ("bias", bias, (down.shape[0],), torch.float32),
        ("kind", kind, (down.shape[0],), torch.int32),
        ("rows", rows, (rows.numel(),), torch.int32),
        ("tiles", tiles, (tiles.shape[0], 3), torch.int32),
        ("spans", spans, (spans.shape[0], 2), torch.int32),
        *(("offsets", tensor, (spans.shape[0] + 1,), torch.int32) for tensor in plan[3:]),
    ):
        if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{label}: must be a contiguous {list(shape)} of {dtype} beside {name} {list(h.shape)}; was "
                f"{list(tensor.shape)} of {tensor.dtype}, strides {tensor.stride()}"
            )
        if tensor.device != h.device:
            raise ValueError(f"{label}: is on {tensor.device}, but {name} is on {h.device}")


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    if INTERPRETING:
        return _interpreter  # which patches triton.language while it runs, for all threads
    # Triton launches on the current device, which need not be the tensors'.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def intervene_(h, down, up, bias, kind, rows, tiles, spans) -> None:
    _check(h, "h", (down, up, bias, kind), (rows, tiles, spans))
    stride = _row_stride(h, "h")
    d, n_tiles = h.shape[-1], tiles.shape[0]
    if n_tiles == 0 or h.numel() == 0 or down.shape[0] == 0:
        return
    with _on(h.device):
        intervene_kernel[(n_tiles,)](
            h, down, up, bias, kind, rows, tiles, spans, h.numel() // d, stride,
            **forward_options(h.dtype, down.dtype, d, aligned=h.data_ptr() % 16 == 0 and stride % 16 == 0),
        )  # fmt: skip


def _check_norm(
    h: Tensor, rows: Tensor, tiles: Tensor, weight: Tensor, shift: Tensor | None, norm: int
) -> None:
    for label, tensor in (("weight", weight), ("shift", shift)):
        if tensor is None:
            continue
        if tensor.shape != h.shape[-1:] or tensor.dtype is not h.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{label}: must be a contiguous [{h.shape[-1]}] of {h.dtype}, as h is; was "
                f"{list(tensor.shape)} of {tensor.dtype}, strides {tensor.stride()}"
            )
        if tensor.device != h.device:
            raise ValueError(f"{label}: is on {tensor.device}, but h is on {h.device}")
    if norm & ~int(Norm.CENTRED | Norm.PLUS_ONE | Norm.ROUND):
        raise ValueError(f"norm: must be a sum of {', '.join(map(repr, Norm))}; was {norm}")
    n_rows, named = h.numel() // h.shape[-1], min(rows.shape[0], TILE * tiles.shape[0])
    if named < n_rows:
        raise ValueError(
            f"rows, tiles: must name each of the {n_rows} rows of h, since all are normed (see "
            f"reft_kernels.plan.cover); there is room for {named} in {rows.shape[0]} rows and "
            f"{tiles.shape[0]} tiles"
        )


def intervene_norm_(h, down, up, bias, kind, rows, tiles, spans, weight, shift, eps, norm) -> Tensor:
    _check(h, "h", (down, up, bias, kind), (rows, tiles, spans))
    stride = _row_stride(h, "h")
    _check_norm(h, rows, tiles, weight, shift, norm)
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
    with _on(h.device):
        intervene_norm_kernel[(tiles.shape[0],)](
            h, out, weight, shift, down, up, bias, kind, rows, tiles, spans, h.numel() // d, stride, eps,
            norm, bool(norm & Norm.CENTRED), **norm_options(h.dtype, down.dtype, d),
        )  # fmt: skip
    return out


def intervene(h, down, up, bias, kind, rows, tiles, spans, offsets) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    intervene_(out, down, up, bias, kind, rows, tiles, spans)
    return out


def _readable(grad: Tensor) -> Tensor:
    """grad, or a contiguous copy where autograd made one without rows (an expanded scalar, say)."""
    try:
        _row_stride(grad, "grad")
    except ValueError:
        return grad.contiguous()
    return grad


def intervene_backward(
    grad, hs, down, up, bias, kind, rows, tiles, spans, offsets, need_h: bool, need_pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(grad, "grad", (down, up, bias, kind), (rows, tiles, spans, offsets))
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

    grad = _readable(grad)
    stride, n_rows = _row_stride(grad, "grad"), grad.numel() // d
    kept = torch.empty((2, n if need_pool else 0, LOW_RANK), dtype=torch.float32, device=grad.device)
    with _on(grad.device):
        rows_kernel[(tiles.shape[0],)](
            grad, dh, hs, down, up, bias, kind, kept[0], kept[1], rows, tiles, spans, n_rows, stride,
            int(need_h), int(need_pool), **rows_options(grad.dtype, down.dtype, d),
        )  # fmt: skip
        if need_pool:
            options, n_segments = pool_options(grad.dtype, down.dtype, d), spans.shape[0]
            splits = pool_splits(n, n_pool, d)
            sums = ddown, dup, dbias
            if splits > 1:
                sums = tuple(bias.new_empty(splits, *t.shape) for t in sums)
            pool_kernel[(triton.cdiv(n_pool, 16), triton.cdiv(d, options["BLOCK"]), splits)](
                grad, hs, down, up, bias, kind, kept[0], kept[1], *sums, rows, spans, offsets,
                n_rows, stride, n_pool, n_segments, **options,
            )  # fmt: skip
            if splits > 1:
                options = add_options(grad.dtype, down.dtype, d)
                add_kernel[(n_pool, triton.cdiv(d, options["BLOCK"]))](
                    *sums, ddown, dup, dbias, spans, n_pool, n_segments, splits, **options
                )
    return dh, ddown, dup, dbias
