"""Block sizes and compiler options of every kernel: meta-parameters."""

from __future__ import annotations

import torch
import triton

#: Terms that a product of 32-bit operands must have. Before Triton 3.8 as many as one of 16-bit operands.
LEAST_TERMS = 16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 8


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

    `aligned`: all tensors, and the rows of h, begin at multiples of 16 bytes. It makes no difference to the
    sums.
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


def fold_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int, aligned: bool = True) -> dict:
    """Meta-parameters of `fold_kernel`."""
    return {"D": d, "BLOCK": min(triton.next_power_of_2(d), 2048), "num_warps": 4, "enable_fp_fusion": True}


def norm_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int, aligned: bool = True) -> dict:
    """Meta-parameters of `intervene_norm_kernel`: `intervene_kernel`'s, so that edits have the same bits."""
    options = forward_options(h_dtype, pool_dtype, d, aligned)
    # Rows on their way lie in shared memory, one fewer than stages.
    return options | {"NORM_STAGES": 3 if options["WHOLE"] * h_dtype.itemsize <= 16 * 1024 else 1}


def rows_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int, aligned: bool = True) -> dict:
    """Meta-parameters of `backward_rows_kernel`."""
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


def pool_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int, aligned: bool = True) -> dict:
    """Meta-parameters of `backward_pool_kernel`."""
    common = _common(h_dtype, d)
    again = 32 if h_dtype is not pool_dtype or d <= 64 else 64
    # Rows that can't be read 16 bytes at a time take twice the registers.
    again = 16 if common["FULL"] or d % 16 else again
    block = 32 if common["FULL"] and d % 16 else 64
    return common | {"ROWS": 32, "BLOCK": block, "AGAIN": again, "num_warps": 4 if common["FULL"] else 8}


def add_options(h_dtype: torch.dtype, pool_dtype: torch.dtype, d: int, aligned: bool = True) -> dict:
    """Meta-parameters of `backward_add_kernel`."""
    return {"D": d, "BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}


def pool_splits(n: int, n_pool: int, d: int) -> int:
    """How many programs share the rows of one block of the pool's gradients.

    As many as have 256 rows each, up to 16, while their sums stay within 128 MiB.
    """
    return max(1, min(16, n // 256, 2**24 // (n_pool * d)))
