"""The CUDA kernels' ways beside the usual one (csrc/cuda/intervene.h): bits stay the same, time may not."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from reft_kernels import build

#: Name → its number, and the directions that it is there for.
WAYS = {"push": (1, ("forward", "norm")), "ring": (2, ("forward",))}


@contextlib.contextmanager
def in_way(number: int) -> Iterator[None]:
    """Runs the CUDA kernels of this process in another way. A call for which that has no kernel is an error.

    Raises ValueError for a number that is none of a way.
    """
    choose = ctypes.CDLL(str(build.LIB / "reft_kernels_cuda.so")).reft_kernels_cuda_way
    before = choose(number)
    if before < 0:
        raise ValueError(f"number: must be that of a way of the CUDA kernels, was {number}")
    try:
        yield
    finally:
        choose(before)
