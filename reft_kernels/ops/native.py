"""The native backend: loads the compiled library, which adds its implementations to the op schemas."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from .. import build
from . import schema

_CPU_LIBRARY = build.LIB / "reft_kernels_cpu.so"
_CUDA_LIBRARY = build.LIB / "reft_kernels_cuda.so"


def _load(path: Path) -> str | None:
    """Loads a compiled library; returns why that failed, or None."""
    if not path.exists():
        return build.why_missing(path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}; `reft-kernels build` compiles it anew"
    return None


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use: "avx512_bf16", "avx512", "avx2" or "scalar".

    None where the library is missing (`cpu_missing` says why). The best one that the machine has, or the
    one that the environment variable REFT_KERNELS_CPU_ISA names, read once.

    Raises:
        RuntimeError: REFT_KERNELS_CPU_ISA names none of them, or one that this machine lacks.
    """
    if cpu_missing is not None:
        return None
    function = ctypes.CDLL(str(_CPU_LIBRARY)).reft_kernels_cpu_isa
    function.restype = ctypes.c_char_p
    error = ctypes.c_char_p()
    name = function(ctypes.byref(error))
    if name is None:
        raise RuntimeError((error.value or b"").decode())
    return name.decode()


assert schema.NAMESPACE == "reft_kernels"  # the name that the compiled library registers under

#: Why the compiled CPU library is not there; None when it is loaded.
cpu_missing: str | None = _load(_CPU_LIBRARY)

#: The same of the CUDA library, which only a machine with a GPU loads.
cuda_missing: str | None = _load(_CUDA_LIBRARY) if torch.cuda.is_available() else "torch finds no CUDA device"
