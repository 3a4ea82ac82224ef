"""What is compiled of the kernels that Triton launches its own way: those of norms, sources and scales."""

from __future__ import annotations

from typing import Any, NamedTuple

SHORT = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}

#: Arguments by type: of h, of the pool, float32, int32.
_OF_H = ("h", "out", "grad", "dh", "hs")
_OF_POOL = ("down", "up", "factors", "ddown", "dup")
_SUMS = ("norms", "dnorms", "source", "v_kept", "p_kept", "kept", "bias", "dbias")
_TABLES = ("rows", "tiles", "spans", "offsets", "kind")


class Asked(NamedTuple):
    """kernel, signature, constants, arguments divisible by 16, compiler options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    compiler: dict[str, Any]


#: What the variants are called.
KERNELS = (
    "row_norms",
    "restore_norms",
    "restore_norms_backward",
    "source_rows",
    "source_rows_backward",
    "source_expand",
    "source_pool",
)


def request(name: str, h: str, pool: str, d: int, aligned: bool) -> Asked:
    import torch

    from reft_kernels.ops.triton_ops import keep_norm, kernels_keep_norm, kernels_source, options, source

    dtypes = getattr(torch, h), getattr(torch, pool)
    if "norms" in name:
        kernel, found = getattr(kernels_keep_norm, f"{name}_kernel"), keep_norm.options(d)
        free = (*kernels_keep_norm.SIZES, *kernels_keep_norm.TABLES)
    else:
        kernel = getattr(kernels_source, f"{name.removesuffix('_backward')}_kernel")
        of = source.pool_options if name == "source_pool" else options.rows_options
        found = of(*dtypes, d) | {"PRODUCTS": False, "BACKWARD": name.endswith("backward")}
        if "BLOCK" not in found:
            found["BLOCK"] = found["UP_BLOCK" if name == "source_expand" else "DOWN_BLOCK"]
        free = (*kernels_source.SIZES, *kernels_source.TABLES)
    constants = {key: value for key, value in found.items() if key in kernel.arg_names}
    types = dict.fromkeys(_OF_H, SHORT[h]) | dict.fromkeys(_OF_POOL, SHORT[pool])
    types |= dict.fromkeys(_SUMS, "*fp32") | dict.fromkeys(_TABLES, "*i32")
    signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in kernel.arg_names}
    divisible = [key for key in signature if aligned and key not in constants and key not in free]
    compiler = {key: found[key] for key in ("num_warps", "enable_fp_fusion") if key in found}
    return Asked(kernel, signature, constants, divisible, compiler)
