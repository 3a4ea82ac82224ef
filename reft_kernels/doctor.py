"""What runs on this machine and what does not: the facts behind `reft-kernels doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import warnings
from typing import Any

import torch

from . import __version__, ops
from .ops import launch, native
from .ops.dispatch import ENVIRONMENT

#: Name → (oldest supported version, first unsupported one or None); the same ranges as in pyproject.toml.
SUPPORTED: dict[str, tuple[str, str | None]] = {
    "python": ("3.10", None),
    "torch": ("2.10", None),
    "transformers": ("4.57", "6"),
    "triton": ("3.6", None),
}

#: What is lost where a backend can't run, by (backend, device type).
_COST = {
    (
        "native",
        "cpu",
    ): "edits on the CPU run as a chain of torch operations: same results, several times slower",
    ("native", "cuda"): "edits on the GPU run through triton",
    ("triton", "cuda"): "edits on the GPU run as a chain of torch operations, a launch for each",
}


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without trailing zeros: "2.13.0+cpu" → (2, 13)."""
    numbers = [int(part) for part in re.split(r"[^0-9.]", version)[0].strip(".").split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def in_range(version: str, oldest: str, below: str | None) -> bool:
    """Whether oldest <= version < below, by release numbers."""
    release = _release(version)
    return _release(oldest) <= release and (below is None or release < _release(below))


def _versions() -> dict[str, dict[str, Any]]:
    found = {}
    for name, (oldest, below) in SUPPORTED.items():
        version = _version(name)
        found[name] = {
            "found": version,
            "supported": f">={oldest}" + (f",<{below}" if below else ""),
            "ok": version is not None and in_range(version, oldest, below),
        }
    return found


def _backend(name: str, device_type: str) -> dict[str, Any]:
    reason = ops.why_not(name, device_type)
    if reason is not None:
        cost = _COST.get((name, device_type))
        return {"available": False, "detail": reason, "cost": cost}
    detail = None
    if name == "native":
        detail = native.cpu_isa() if device_type == "cpu" else "built, not confirmed on hardware: on request"
    return {"available": True, "detail": detail, "cost": None}


def _default(device_type: str) -> tuple[str | None, str | None]:
    """(the backend that runs there, None) or (None, why none does)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what it warns of is in the report
        try:
            return ops.current_backend(device_type), None
        except ops.BackendUnavailable as error:
            return None, str(error)


def diagnose() -> dict[str, Any]:
    """Versions, devices, backends and the choice among them, as plain data for JSON.

    "fast" tells whether on some device here a backend other than the reference runs.
    """
    types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = {}
    for device_type in types:
        default, error = _default(device_type)
        devices[device_type] = {
            "names": _names(device_type),
            "default": default,
            "error": error,
            "backends": {name: _backend(name, device_type) for name in ops.BACKENDS},
        }
    return {
        "reft_kernels": __version__,
        "versions": _versions(),
        "environment": {ENVIRONMENT: os.environ.get(ENVIRONMENT)},
        "devices": devices,
        "short_way": {"available": launch.missing is None, "detail": launch.missing},
        "fast": any(device["default"] not in (None, "reference") for device in devices.values()),
    }


def _names(device_type: str) -> list[str]:
    if device_type == "cpu":
        return [f"{platform.machine()}, {torch.get_num_threads()} threads"]
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def report(facts: dict[str, Any]) -> str:
    """The facts of `diagnose` as text."""
    lines = [f"reft_kernels {facts['reft_kernels']}", ""]
    for name, version in facts["versions"].items():
        found = version["found"] or "not installed"
        verdict = "" if version["ok"] else f"   outside the supported range {version['supported']}"
        lines.append(f"  {name:<14}{found}{verdict}")
    for name, value in facts["environment"].items():
        lines.append(f"  {name} is {value or 'not set'}")
    for device_type, device in facts["devices"].items():
        lines += ["", f"{device_type}: {'; '.join(device['names'])}"]
        for name, backend in device["backends"].items():
            mark = "yes" if backend["available"] else "no"
            detail = f"  {backend['detail']}" if backend["detail"] else ""
            lines.append(f"  {name:<14}{mark:<4}{detail}".rstrip())
            if backend["cost"]:
                lines.append(f"  {'':<20}so {backend['cost']}")
        lines.append(f"  used here: {device['default'] or device['error']}")
    short = facts["short_way"]
    lines += ["", f"edits past torch's dispatcher, on CPUs: {'yes' if short['available'] else 'no'}"]
    if not short["available"]:
        lines.append(f"  {short['detail']}")
    verdict = "A fused backend runs here." if facts["fast"] else "Only the reference backend runs here: slow."
    return "\n".join([*lines, "", verdict])
