"""Compiles the Triton kernels ahead of time, without a GPU, and tells what ptxas made of them.

A program of its own: python triton_compile.py < variants.json, one line of JSON for each variant. It must
run with TRITON_INTERPRET unset, which the tests' own process has set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from unittest import mock

try:
    from support import triton_more
except ImportError:  # as a program of its own
    import triton_more


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as `launch` compiles it for tensors of these dtypes."""

    #: "forward", "fold", "norm", "layer_norm", "rows", "pool", "pool_parts", "add", "scale" or "scale_sums",
    #: or one of `triton_more.KERNELS`.
    kernel: str
    h: str  # torch's names of dtypes
    pool: str
    arch: int  # compute capability, 90 for 9.0
    d: int = 4096
    aligned: bool = True  # addresses and row strides divisible by 16
    old: bool = False  # as Triton before 3.8 would have it: no product of fewer than 16 terms

    def __str__(self) -> str:
        aligned = "" if self.aligned else "-unaligned"
        old = "-old" if self.old else ""
        return f"{self.kernel}-{self.h}-{self.pool}-sm_{self.arch}-d{self.d}{aligned}{old}"


@contextlib.contextmanager
def _old_triton(old: bool):
    """Refuses what Triton before 3.8 does, and launches as there; or changes nothing."""
    from triton.backends.nvidia import compiler

    from reft_kernels.ops.triton_ops import options

    def least(target):
        return lambda a, b: (1, 1, 16)

    if not old:
        yield
        return
    with mock.patch.object(compiler, "min_dot_size", least), mock.patch.object(options, "LEAST_TERMS", 16):
        yield


def _scale_request(variant: Variant) -> tuple:
    """`request` of the elementwise kernels, whose pool is float32."""
    from reft_kernels.ops.triton_ops import kernels_scale_shift, scale_shift

    of_h = dict.fromkeys(
        ("source", "out", "grad", "hs"), f"*{variant.h.replace('float', 'fp').replace('bfp', 'bf')}"
    )
    of_pool = dict.fromkeys(("scale_less_one", "shift", "dscale", "dshift"), "*fp32")
    tables = dict.fromkeys(("rows", "tiles", "spans", "offsets"), "*i32")
    if variant.kernel == "scale":
        kernel, block, constants = (
            kernels_scale_shift.scale_rows_kernel,
            scale_shift.ROWS_BLOCK,
            {"SHIFTED": True},
        )
    else:
        kernel, block, constants = kernels_scale_shift.scale_sums_kernel, scale_shift.SUMS_BLOCK, {}
    constants |= {"D": variant.d, "BLOCK": block}
    types = of_h | of_pool | tables
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }
    strides = ("source_stride", "out_stride", "grad_stride")
    divisible = [name for name in signature if variant.aligned and (name in (*of_h, *of_pool, *strides))]
    return kernel, signature, constants, divisible, scale_shift.OPTIONS


def request(variant: Variant) -> tuple:
    """What is compiled: (kernel, signature, constants, arguments divisible by 16, options)."""
    if variant.kernel.startswith("scale"):
        return _scale_request(variant)
    if variant.kernel in triton_more.KERNELS:
        return triton_more.request(variant.kernel, variant.h, variant.pool, variant.d, variant.aligned)
    import torch

    from reft_kernels.ops.triton_ops import kernels_backward, kernels_forward, kernels_norm
    from reft_kernels.ops.triton_ops import options as of
    from reft_kernels.ops.triton_ops.blocks import BATCH_SIZES, BATCH_TABLES

    kernel, options_of = {
        "forward": (kernels_forward.intervene_kernel, of.forward_options),
        "fold": (kernels_forward.fold_kernel, of.fold_options),
        "norm": (kernels_norm.intervene_norm_kernel, of.norm_options),
        "layer_norm": (kernels_norm.intervene_norm_kernel, of.norm_options),
        "rows": (kernels_backward.backward_rows_kernel, of.rows_options),
        "pool": (kernels_backward.backward_pool_kernel, of.pool_options),
        "pool_parts": (kernels_backward.backward_pool_kernel, of.pool_options),
        "add": (kernels_backward.backward_add_kernel, of.add_options),
    }[variant.kernel]
    short = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
    types = dict.fromkeys(("h", "addend", "grad", "dh", "hs", "out", "weight", "shift"), short[variant.h])
    types |= dict.fromkeys(("down", "up", "ddown", "dup"), short[variant.pool])
    types |= dict.fromkeys(("bias", "dbias", "p_kept", "v_kept"), "*fp32")
    types |= dict.fromkeys(("kind", *BATCH_TABLES), "*i32")
    flags = ("norm", "need_h", "need_pool")
    types |= dict.fromkeys((*BATCH_SIZES, *flags, "row_stride", "addend_stride", "grad_stride"), "i32")

    types |= dict.fromkeys(("parts_d", "parts_u", "parts_c"), "*fp32")
    if variant.kernel == "pool_parts":
        types |= dict.fromkeys(("ddown", "dup"), "*fp32")
    types["eps"] = "fp32"
    known = {"aligned": variant.aligned} if variant.kernel == "forward" else {}
    options = options_of(getattr(torch, variant.h), getattr(torch, variant.pool), variant.d, **known)
    for_ptx = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    compiler = {name: options.pop(name) for name in for_ptx if name in options}
    if variant.kernel == "norm":  # RMS
        options |= {"shift": None, "CENTRED": False}
    elif variant.kernel == "layer_norm":
        options |= {"CENTRED": True}
    signature = {name: "constexpr" if name in options else types[name] for name in kernel.arg_names}
    free = {*options, *flags, *BATCH_SIZES, *BATCH_TABLES, "eps"}
    divisible = [name for name in kernel.arg_names if variant.aligned and name not in free]
    return kernel, signature, options, divisible, compiler


def compile_variant(variant: Variant) -> dict:
    """Resources (registers, stack and local bytes a thread, shared bytes) and load widths of a variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with _old_triton(variant.old):
        kernel, signature, constants, divisible, options = request(variant)
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", variant.arch, 32),
            options=options,
        )
    # Barriers that the kernel asks for; those that shared memory needs come later.
    beyond = re.split(r"\b(?:ttg|gpu)\.barrier\b", compiled.asm["ttgir"])[1:]
    return {
        "float_sums": float_sums(compiled.asm["ttgir"]),
        "shared": compiled.metadata.shared,
        "stores_beyond_a_barrier": [part.count("tt.store ") for part in beyond],
        **_inspect(compiled.asm["cubin"]),
    }


def float_sums(ttgir: str) -> list[list[int]]:
    """Shapes of what `tl.sum` adds up in float32, in an order that Triton chooses."""
    found = []
    for body, shape in re.findall(r'"tt\.reduce"(.*?)\}\) : \(tensor<([0-9x]+)x\w+', ttgir, re.DOTALL):
        if "arith.addf" in body:
            found.append([int(size) for size in shape.split("x")])
    return found


def _inspect(cubin: bytes) -> dict:
    import triton

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def dump(what: str) -> str:
            return subprocess.run([cuobjdump, what, path], check=True, capture_output=True, text=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage")))
        sass = dump("--dump-sass")
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "local": int(usage["LOCAL"]),
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "atomics": len(re.findall(r"\b(?:ATOMG?|RED)\b", sass)),
        "loads_of_16_bytes": len(re.findall(r"\bLDG(?:STS)?\.E\S*\.128\b", sass)),
        "stores_of_16_bytes": len(re.findall(r"\bSTG\.E\S*\.128\b", sass)),
        "tensor_core_products": len(re.findall(r"\bHMMA\b", sass)),
    }


if __name__ == "__main__":
    for entry in json.load(sys.stdin):
        print(json.dumps(compile_variant(Variant(**entry))), flush=True)
