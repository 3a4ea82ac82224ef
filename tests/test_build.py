"""The wheel, built from a copy of the sources: with a compiler, and without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from reft_kernels import build

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("bench", "csrc", "python_bindings", "reft_kernels")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")

#: What runs in the folder that a wheel was unpacked to.
TRIAL = """
import torch
import reft_kernels as rk
from reft_kernels.ops import native
h = torch.ones(2, 8)
pool = rk.Pool(8)
ones, kind = torch.ones(1, 8), torch.zeros(1, dtype=torch.int32)
span = pool.add(rk.Fold(ones, ones, torch.zeros(1), kind))
rk.functional.intervene_(h, pool, rk.make_plan([(span, [1])]))
assert h.tolist() == [[1.0] * 8, [9.0] * 8]
print(rk.__file__, rk.current_backend("cpu"), native.cpu_isa())
"""


def build_wheel(folder: Path, compiler: str) -> tuple[Path, str]:
    """The wheel, and what the build said."""
    source = folder / "source"
    for name in SOURCES:
        ignored = shutil.ignore_patterns("lib", "__pycache__", "results")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    # -O0: what is tested here is the wheel, and the optimizer takes most of a build's time.
    environment = {**os.environ, "CXX": compiler, "CXXFLAGS": "-O0"}
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(folder / "dist")]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel, done.stderr


def try_wheel(wheel: Path | None, folder: Path) -> list[str]:
    """Runs TRIAL on the unpacked wheel (None: one that was unpacked before), away from the sources."""
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    environment.pop("REFT_KERNELS_BACKEND", None)
    command = [sys.executable, "-W", "ignore", "-c", TRIAL]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, *rest = done.stdout.split()
    assert Path(where).is_relative_to(folder)
    return rest


def test_without_a_compiler_the_package_installs_and_says_so_once(tmp_path):
    wheel, said = build_wheel(tmp_path, "/nonexistent/c++")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said.count("reft_kernels_cpu was not built, it needs a C++ compiler") == 1
    names = zipfile.ZipFile(wheel).namelist()
    assert "reft_kernels/ops/schema.py" in names and "reft_bench/cli.py" in names
    bench = ROOT / "bench"
    assert {f"reft_bench/{path.relative_to(bench).as_posix()}" for path in bench.rglob("*.py")} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    away = tmp_path / "away"
    assert try_wheel(wheel, away) == ["reference", "None"]
    doctor = run_command(away, "doctor", "--json")
    reason = json.loads(doctor.stdout)["devices"]["cpu"]["backends"]["native"]["detail"]
    assert reason == (
        "reft_kernels_cpu.so was not built: it needs a C++ compiler (/nonexistent/c++ is not on PATH); "
        "`reft-kernels build` compiles it"
    )


def run_command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`reft-kernels` of the wheel that was unpacked to `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "reft_kernels.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++"), reason="needs Linux and a C++ compiler"
)
def test_an_installed_package_builds_what_it_lacks(tmp_path: Path) -> None:
    """From the sources that the wheel carries, with the torch that is there by then."""
    wheel, _ = build_wheel(tmp_path, "/nonexistent/c++")
    shutil.rmtree(tmp_path / "source")
    away = tmp_path / "away"
    assert try_wheel(wheel, away) == ["reference", "None"]
    failed = run_command(away, "build", CXX="/nonexistent/c++", REFT_KERNELS_BUILD_CUDA="0")
    assert (
        failed.returncode == 1 and "needs a C++ compiler (/nonexistent/c++ is not on PATH)" in failed.stderr
    )
    done = run_command(away, "build", CXX="c++", CXXFLAGS="-O0", REFT_KERNELS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert f"reft_kernels_cpu: built, {away / 'reft_kernels' / 'lib' / 'reft_kernels_cpu.so'}" in done.stdout
    assert "reft_kernels_cuda: not built, REFT_KERNELS_BUILD_CUDA was 0" in done.stdout
    backend, level = try_wheel(None, away)
    assert backend == "native" and level != "None"


def test_without_torch_the_reason_is_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under pip's build isolation where torch is not installed yet."""
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    library = build.LIBRARIES[0]
    with pytest.raises(build.CannotBuild) as caught:
        build.build(library, tmp_path / "build")
    build.note(library, f"it needs {caught.value}", tmp_path / "lib")
    assert build.why_missing(tmp_path / "lib" / "reft_kernels_cpu.so") == (
        "reft_kernels_cpu.so was not built: it needs torch's headers (torch was not installed yet); "
        "`reft-kernels build` compiles it"
    )
    assert build.why_missing(tmp_path / "reft_kernels_cpu.so") == (
        "reft_kernels_cpu.so was not built; `reft-kernels build` compiles it"
    )


def test_a_library_that_is_there_is_not_said_to_be_missing(tmp_path: Path) -> None:
    library, made = build.LIBRARIES[0], tmp_path / "reft_kernels_cpu.so"
    made.write_bytes(b"new")
    lib = tmp_path / "lib"
    noted = build.note(library, "it needs ninja", lib)
    assert noted is not None and noted.exists()
    target = build.install(made, lib)
    assert target.read_bytes() == b"new" and not noted.exists()
    assert build.note(library, "it needs ninja", lib) is None and not noted.exists()


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++"), reason="needs Linux and a C++ compiler"
)
def test_with_a_compiler_the_wheel_carries_the_library(tmp_path):
    wheel, said = build_wheel(tmp_path, "c++")
    assert "was not built" not in said
    assert "-py3-none-linux_" in wheel.name
    libraries = {
        f"reft_kernels/lib/{name}" for name in ("reft_kernels_cpu.so", "reft_kernels_standin.abi3.so")
    }
    assert libraries <= set(zipfile.ZipFile(wheel).namelist())
    backend, level = try_wheel(wheel, tmp_path / "away")
    assert backend == "native" and level != "None"


def test_an_old_setuptools_is_told_of_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "reft_kernels: the build needs setuptools 77 or later, found 65.5.0: pip install --upgrade setuptools"
    ]
