"""The native backend: loads the compiled library, which adds its implementations to the op schemas."""

from __future__ import annotations

from pathlib import Path

import torch

from . import schema

_PACKAGE = Path(__file__).resolve().parent.parent

#: Why the compiled CPU library is not there; None when it is loaded.
cpu_missing: str | None = "not loaded"


def _load(stem: str) -> str | None:
    """Loads reft_kernels/lib/<stem>.so; returns why that failed, or None."""
    path = _PACKAGE / "lib" / f"{stem}.so"
    if not path.exists():
        return f"{path.name} was not built (no C++ compiler when the package was installed?)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


assert schema.NAMESPACE == "reft_kernels"  # the name that the compiled library registers under
cpu_missing = _load("reft_kernels_cpu")
