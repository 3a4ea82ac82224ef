"""reft_kernels_cuda_occupancy through ctypes, with libraries that a C compiler makes here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from reft_bench.gpu import occupancy

from reft_kernels.ops import native


def _library(folder: Path, source: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = folder / "it.so"
    (folder / "it.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, folder / "it.c"], check=True)
    return path


def _says(text: str) -> str:
    return f'const char* {occupancy.FUNCTION}(void) {{ return "{text}"; }}'


def test_what_the_library_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    said = '{"forward_tiles": {"blocks": 4, "clusters": [66, 132]}, "backward_pool": {"blocks": 1}}'
    library = _library(tmp_path, _says(said.replace('"', '\\"')))
    monkeypatch.setattr(native, "cuda_missing", None)
    monkeypatch.setattr(occupancy, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *words, **more: None)
    assert occupancy.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        'forward_tiles: {"blocks": 4, "clusters": [66, 132]}',
        'backward_pool: {"blocks": 1}',
    ]


def test_a_library_without_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    library = _library(tmp_path, "int another(void) { return 1; }")
    assert occupancy.occupancy(ctypes.CDLL(str(library))) is None
    monkeypatch.setattr(native, "cuda_missing", None)
    monkeypatch.setattr(occupancy, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *words, **more: None)
    assert occupancy.main() == 0 and f"has no {occupancy.FUNCTION}" in capsys.readouterr().out


@pytest.mark.parametrize("source", [_says("no device"), f"char* {occupancy.FUNCTION}(void) {{ return 0; }}"])
def test_what_is_not_json_is_an_error(tmp_path: Path, source: str) -> None:
    library = ctypes.CDLL(str(_library(tmp_path, source)))
    with pytest.raises(RuntimeError, match="which is not JSON"):
        occupancy.occupancy(library)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU the library is not loaded")
def test_no_library_is_a_failure(capsys) -> None:
    assert occupancy.main() == 1 and "no CUDA device" in capsys.readouterr().out
