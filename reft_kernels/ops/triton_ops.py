"""The triton backend (placeholder until its kernels land)."""

from __future__ import annotations


def why_not(device_type: str) -> str | None:
    return "not built yet"
