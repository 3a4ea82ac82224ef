"""Every Triton kernel, compiled for sm_80 to sm_100 without a GPU: no spills, wide loads, no atomics."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
from support import triton_more
from support.triton_compile import Variant, request

triton = pytest.importorskip("triton")

SUPPORT = pathlib.Path(__file__).parent / "support"
ROOT = pathlib.Path(__file__).parents[1]

KERNELS = ("forward", "norm", "layer_norm", "rows", "pool", "pool_parts", "add")
ARCHS = (80, 90, 100)
DTYPES = (
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "float32"),
    ("bfloat16", "float32"),
    ("float16", "float32"),
)

#: The least that a block may have on a GPU of compute capability 8.0 or more (8.6 and 8.9).
SHARED = 99 * 1024

#: Whether this Triton takes the form for old ones.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)

#: Between the Tritons that the blocks were chosen with, `backward_pool_kernel` spills a few registers.
BETWEEN = (3, 7) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)

QUICK = [
    *(
        Variant(kernel, "bfloat16", "bfloat16", arch)
        for kernel in ("forward", "rows", "pool")
        for arch in ARCHS
    ),
    *(Variant(kernel, *dtypes, 90) for kernel in ("forward", "rows", "pool") for dtypes in DTYPES[2:4]),
    Variant("pool_parts", "bfloat16", "bfloat16", 90),
    Variant("add", "bfloat16", "bfloat16", 90),
    Variant("norm", "bfloat16", "bfloat16", 90),
    Variant("layer_norm", "bfloat16", "bfloat16", 80, 8192),
    *(Variant("forward", *dtypes, 90, old=True) for dtypes in (DTYPES[0], *DTYPES[2:4])),
    *(Variant(kernel, *DTYPES[2], 90, old=True) for kernel in ("rows", "pool")),
]


def _all() -> list[Variant]:
    """What launch code can ask for: dtypes, 4 and 8 warps, odd d and odd addresses."""
    shapes = [(4096, True), (8192, True), (64, True), (4100, False), (33, False)]
    made = [
        Variant(kernel, *dtypes, arch, d, aligned)
        for kernel, dtypes, arch in itertools.product(KERNELS, DTYPES, ARCHS)
        for d, aligned in (shapes if arch == 90 else shapes[:1])
    ]
    made += [Variant("forward", *dtypes, 90, aligned=False) for dtypes in DTYPES]
    others = [variant for variant in made if variant.arch == 90 and variant.kernel in ("rows", "pool")]
    forward = [variant for variant in made if variant.kernel in ("forward", "norm")]
    return made + [dataclasses.replace(variant, old=True) for variant in forward + others]


SLOW = [variant for variant in _all() if variant not in QUICK]


def _environment() -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return environment


def _compiled(variants: list[Variant]) -> dict[Variant, dict]:
    """Results of all variants, by two processes."""
    results = {}
    workers = []
    for part in (variants[::2], variants[1::2]):
        worker = subprocess.Popen(
            [sys.executable, str(SUPPORT / "triton_compile.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        worker.stdin.write(json.dumps([dataclasses.asdict(variant) for variant in part]))
        worker.stdin.close()
        workers.append((part, worker))
    for part, worker in workers:
        lines = worker.stdout.read().splitlines()
        errors = worker.stderr.read()
        assert worker.wait() == 0, errors
        assert "FP_FUSION" not in errors, errors  # whether products and sums are fused was left open
        results |= {variant: json.loads(line) for variant, line in zip(part, lines, strict=True)}
    return results


@pytest.fixture(scope="module")
def quick() -> dict[Variant, dict]:
    return _compiled(QUICK)


@pytest.fixture(scope="module")
def slow() -> dict[Variant, dict]:
    return _compiled(SLOW)


def _check(variant: Variant, made: dict) -> None:
    if BETWEEN and "pool" in variant.kernel:
        assert made["stack"] <= 16, made
    else:
        assert made["local"] == made["stack"] == made["local_accesses"] == 0, made
    # The form for old Tritons is launched by old ones alone, which let its two loops share their memory.
    assert made["shared"] <= SHARED or (variant.old and not OLD), made
    assert made["atomics"] == 0, made
    # Triton's own order of summation, only where there is one form: whole rows, and p of a block of the pool.
    assert all(len(shape) == 1 or "pool" in variant.kernel for shape in made["float_sums"]), made
    # What the norm reads must have been written: its one store is the only one beyond the barrier.
    assert made["stores_beyond_a_barrier"] == ([1] if "norm" in variant.kernel else []), made
    assert made["tensor_core_products"] > 0 or variant.h == "float32" or variant.kernel == "add", made
    # With 8 warps, blocks of float32 are too small.
    if variant.aligned and (variant.h != "float32" or variant.d <= 4096):
        assert made["loads_of_16_bytes"] > 0, made
    if variant.aligned and "pool" not in variant.kernel and variant.kernel != "add":
        assert made["stores_of_16_bytes"] > 0, made


@pytest.mark.parametrize("variant", QUICK, ids=str)
def test_compiles_without_spills(variant: Variant, quick: dict[Variant, dict]) -> None:
    _check(variant, quick[variant])


@pytest.mark.slow
@pytest.mark.parametrize("variant", SLOW, ids=str)
def test_every_variant_compiles_without_spills(variant: Variant, slow: dict[Variant, dict]) -> None:
    _check(variant, slow[variant])


def test_small_kernels_compile_without_spills() -> None:
    """Of the elementwise edit, and of a sum of two tensors."""
    kinds = itertools.product(("scale", "scale_sums", "fold"), ("bfloat16", "float16", "float32"), ARCHS)
    for variant, made in _compiled(
        [Variant(kernel, h, "float32", arch) for kernel, h, arch in kinds]
    ).items():
        assert made["local"] == made["stack"] == made["local_accesses"] == made["atomics"] == 0, variant
        assert made["shared"] <= SHARED and made["loads_of_16_bytes"] > 0, variant
        assert made["stores_of_16_bytes"] > 0 or variant.kernel == "scale_sums", variant


@pytest.mark.parametrize("kernel", triton_more.KERNELS)
def test_kernels_of_norms_and_sources_compile_without_spills(kernel: str) -> None:
    """The order of a norm's sum must not hang on alignment, so its loads are as narrow as the elements."""
    variants = [Variant(kernel, *DTYPES[0], 90), Variant(kernel, *DTYPES[2], 80)]
    for variant, made in _compiled(variants).items():
        assert made["local"] == made["stack"] == made["local_accesses"] == made["atomics"] == 0, variant
        assert made["shared"] <= SHARED, variant
        sums = {"row_norms": 1, "restore_norms": 1, "restore_norms_backward": 2, "source_pool": 1}
        assert len(made["float_sums"]) == sums.get(kernel, 0), made
        if "norms" in kernel:
            assert made["loads_of_16_bytes"] == 0, variant
        elif variant.h != "float32":
            assert made["loads_of_16_bytes"] > 0, variant


def test_every_batch_launches_the_kernels_that_are_compiled_here() -> None:
    """One of each, whatever the sizes of the batch; with the arguments and options that the variants have."""
    command = [sys.executable, str(SUPPORT / "triton_launch.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)
    kinds = {
        "intervene_kernel": ["forward"],
        "intervene_norm_kernel": ["norm"],
        "backward_rows_kernel": ["rows"],
        "backward_pool_kernel": ["pool", "pool_parts"],
        "backward_add_kernel": ["add"],
    }
    wanted = {}
    for name, variants in kinds.items():
        requests = [request(Variant(kernel, "bfloat16", "bfloat16", 90)) for kernel in variants]
        wanted[name] = [list(asked[1:4]) for asked in requests]
    assert {name.rpartition(".")[2]: asked for name, asked in launched.items()} == wanted
