"""Which backend runs: chosen by name, by REFT_KERNELS_BACKEND, or as the best one that the device has.

Nothing falls back in silence. A backend that was asked for and can't run is an error; where the best one
is missing, one warning says what runs instead and why, and `reft-kernels doctor` says it again.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch

from . import native, triton_ops
from .schema import BACKENDS

ENVIRONMENT = "REFT_KERNELS_BACKEND"


class BackendUnavailable(RuntimeError):
    """A backend was asked for that can't run here."""


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    return name


def _from_environment() -> str | None:
    name = os.environ.get(ENVIRONMENT, "").strip()
    return _checked(name, f"environment variable {ENVIRONMENT}") if name else None


# One for the process, not one a thread: recomputation under gradient checkpointing runs in threads of
# autograd's own, and must take the backend that the forward took.
_chosen: str | None = _from_environment()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on the backend `name`: "native", "triton" or "reference".

    >>> with backend("reference"):
    ...     current_backend("cpu")
    'reference'

    Raises ValueError for another name. Whether the backend can run on a tensor's device is checked when
    an op is called (BackendUnavailable). The choice holds for the whole process, its other threads too.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "backend")
    try:
        yield
    finally:
        _chosen = before


def why_not(name: str, device_type: str) -> str | None:
    """Why `name` can't run on a device type ("cpu", "cuda", …), or None if it can."""
    if name == "reference":
        return None
    if name == "native":
        if device_type == "cpu":
            return native.cpu_missing
        if device_type == "cuda":
            return native.cuda_missing
        return f"the native backend has no kernels for {device_type} devices yet"
    return triton_ops.why_not(device_type)


# native on CUDA runs where it is asked for; no GPU has confirmed it yet, so it is nobody's default.
_PREFERENCE = {"cpu": ("native", "reference"), "cuda": ("triton", "reference")}


def _best(device_type: str) -> str:
    missing = []
    for name in _PREFERENCE.get(device_type, ("triton", "reference")):
        reason = why_not(name, device_type)
        if reason is None:
            break
        missing.append(f"{name}: {reason}")
    if missing:
        warnings.warn(
            f"reft_kernels: the {name} backend runs on {device_type}, slowly, because "
            + "; ".join(missing)
            + ". `reft-kernels doctor` says more.",
            RuntimeWarning,
            stacklevel=3,
        )
    return name


def _verified(name: str, device_type: str) -> str:
    reason = why_not(name, device_type)
    if reason is not None:
        raise BackendUnavailable(f"backend {name!r} was asked for but can't run on {device_type}: {reason}")
    return name


#: (chosen name or None, device type) → the backend, so that the way to it is gone once.
_resolved: dict[tuple[str | None, str], str] = {}


# A constant to torch.compile: it guards on the choice, not on what happened to be resolved already.
@torch.compiler.assume_constant_result
def _resolve(chosen: str | None, device_type: str) -> str:
    name = _resolved.get((chosen, device_type))
    if name is None:
        name = _best(device_type) if chosen is None else _verified(chosen, device_type)
        _resolved[chosen, device_type] = name
    return name


def current_backend(device: torch.device | str) -> str:
    """The backend that an op on `device` takes now.

    >>> current_backend("cpu") in ("native", "reference")
    True
    """
    return _resolve(_chosen, device if isinstance(device, str) else device.type)


def chosen_backend() -> str | None:
    """The backend that was asked for by name, or None where each device takes its best."""
    return _chosen
