"""Prints the table of docs/triton.md, "Registers and shared memory": python tests/support/triton_table.py

Compiles for each entry, with the Triton that is installed and without a GPU: some minutes of one core.
"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.triton_compile import Variant, compile_variant  # noqa: E402

ARCHS = (80, 90, 100)
KERNELS = {
    "intervene_kernel": "forward",
    "intervene_norm_kernel": "norm",
    "backward_rows_kernel": "rows",
    "backward_pool_kernel": "pool",
    "fold_kernel": "fold",
    "scale_rows_kernel": "scale",
    "scale_sums_kernel": "scale_sums",
}
DTYPES = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
#: Kernels that know h's dtype alone: the elementwise pool is float32, and a sum has none.
SMALL = ("fold", "scale", "scale_sums")
SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def entry(kernel: str, h: str, pool: str, arch: int) -> str:
    """Registers a thread and KiB of shared memory a program; what is spilled too, where something is."""
    made = compile_variant(Variant(kernel, h, pool, arch))
    spilled = f", {made['stack']} bytes spilled" if made["stack"] else ""
    return f"{made['registers']}, {round(made['shared'] / 1024)}{spilled}"


def main() -> None:
    print("| kernel | h, pool | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |")
    print("|---|---|---|---|---|")
    for name, kernel in KERNELS.items():
        for row, (h, pool) in enumerate(DTYPES):
            if kernel in SMALL and row == 1:
                continue
            cells = [entry(kernel, h, pool, arch) for arch in ARCHS]
            label = "" if row else f"`{name}`"
            pool = "float32" if kernel.startswith("scale") else pool
            print(f"| {label} | {SHORT[h]}, {SHORT[pool]} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
