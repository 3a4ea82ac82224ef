"""Compiles each form of an edit by itself, without a GPU, and tells how it sums and loads.

A program of its own, without TRITON_INTERPRET: python triton_forms.py < forms.json, one line of JSON for
each form.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reft_kernels.ops.triton_ops import kernels_forward, options
from reft_kernels.ops.triton_ops.blocks import BATCH_TABLES, least_height
from support.triton_compile import float_sums

D = 4096
_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclasses.dataclass(frozen=True)
class Form:
    h: str  # torch's names of dtypes
    pool: str
    rank: int  # the highest that takes this form
    alone: bool

    def __str__(self) -> str:
        return f"{self.h}-{self.pool}-rank{self.rank}-{'alone' if self.alone else 'tile'}"


@triton.jit
def form_kernel(
    h, down, up, bias, kind, rows, tiles, spans, n_rows, row_stride,
    D: tl.constexpr, HEIGHT: tl.constexpr, RANK: tl.constexpr, CHUNKS: tl.constexpr, DOWN_BLOCK: tl.constexpr,
    UP_BLOCK: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr, SHARED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    segment, start, count = kernels_forward.tile_entry(tiles, tl.program_id(0))
    first = tl.load(spans + 2 * segment).to(tl.int64)
    rank = tl.load(spans + 2 * segment + 1)
    kernels_forward._edit_by_products(
        h, down, up, bias, kind, rows, start, count, first, rank, n_rows, row_stride,
        D=D, HEIGHT=HEIGHT, RANK=RANK, CHUNKS=CHUNKS, DOWN_BLOCK=DOWN_BLOCK, UP_BLOCK=UP_BLOCK,
        PARTS=PARTS, SLICES=SLICES, SHARED=SHARED, FULL=FULL,
    )  # fmt: skip


def _constants(form: Form) -> tuple[dict, dict]:
    """(constexprs, compiler options), as `edit_tile` chooses them."""
    h_dtype = getattr(torch, form.h)
    chosen = options.forward_options(h_dtype, getattr(torch, form.pool), D)
    block, slices = chosen["BLOCK"], chosen["SLICES"]
    down_block = block if form.rank == 8 else block // 2
    least = least_height.__wrapped__ if hasattr(least_height, "__wrapped__") else least_height
    constants = {name: chosen[name] for name in ("D", "SLICES", "SHARED", "FULL")} | {
        "HEIGHT": int(least(down_block, h_dtype.itemsize, 32 * slices)) if form.alone else 16,
        "RANK": min(form.rank, 16),
        "CHUNKS": 16 if form.rank > 16 else 1,
        "DOWN_BLOCK": down_block,
        "UP_BLOCK": down_block if form.alone or form.rank == 8 else down_block // 2,
        "PARTS": chosen["PARTS"] if form.rank == 8 else 1,
    }
    compiler = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    return constants, {name: chosen[name] for name in compiler}


def _terms(ttgir: str) -> list[list]:
    """Of each product, in order: its terms and its precision."""
    found = []
    for line in ttgir.splitlines():
        product = re.search(r"= (?:tt\.dot|ttng\.\w*dot) .*? : tensor<([0-9x]+)x\w+", line)
        if product:
            precision = re.search(r"inputPrecision = (\w+)", line)
            found.append([int(product[1].split("x")[-1]), precision[1] if precision else ""])
    return found


def loops(ptx: str) -> list[dict[str, int]]:
    """What the innermost loops that multiply do, in order."""
    lines = [line.strip() for line in ptx.splitlines()]
    at = {found[1]: n for n, line in enumerate(lines) if (found := re.match(r"(\$L__BB\w+):", line))}
    spans = []
    for end, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)", line)
        if jump and at[jump[1]] < end:
            spans.append((at[jump[1]], end))
    counted = {
        "async_16_bytes": r"cp\.async\.c\w\.\S+ .*, 0x10",
        "async": r"cp\.async\.c\w\.",
        "waited_for": r"\bld\.global",
        "barriers": r"\bbar(?:rier)?\.sync",
        "products": r"mma\.sync|\bfma\.rn",
    }
    found = []
    for begin, end in sorted(spans):
        if any(begin <= b and e < end for b, e in spans):
            continue
        of = {name: sum(bool(re.search(p, x)) for x in lines[begin:end]) for name, p in counted.items()}
        if of["products"] and of["async"] + of["waited_for"]:
            found.append(of)
    return found


def compile_form(form: Form) -> dict:
    constants, compiler = _constants(form)
    types = {"h": _TYPES[form.h], "down": _TYPES[form.pool], "up": _TYPES[form.pool], "bias": "*fp32"}
    types |= dict.fromkeys(("kind", *BATCH_TABLES), "*i32") | dict.fromkeys(("n_rows", "row_stride"), "i32")
    names = form_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = ("h", "down", "up", "bias", "kind", "row_stride")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(fn=form_kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options=compiler,
    )
    ttgir = compiled.asm["ttgir"]
    return {"sums": float_sums(ttgir), "terms": _terms(ttgir), "loops": loops(compiled.asm["ptx"])}


if __name__ == "__main__":
    for entry in json.load(sys.stdin):
        print(json.dumps(compile_form(Form(**entry))), flush=True)
