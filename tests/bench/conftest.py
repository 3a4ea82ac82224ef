"""The benchmark suite under its installed name, from this checkout also where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("reft_bench") is None:
    folder = Path(__file__).resolve().parents[2] / "bench"
    spec = importlib.util.spec_from_file_location(
        "reft_bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["reft_bench"] = package
    spec.loader.exec_module(package)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny cases are over before two threads have found each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tmp_path, capsys):
    """Runs a command line; returns (exit status, what it printed)."""
    from reft_bench.cli import main

    def run(*words: object) -> tuple[int, str]:
        status = main([str(word) for word in words])
        return status, " ".join(capsys.readouterr().out.split())

    return run
