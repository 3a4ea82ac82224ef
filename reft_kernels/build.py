"""Compiles the native libraries: for `setup.py`, and for `reft-kernels build` in an installed package.

For CPUs where a C++ compiler, ninja and torch's headers are found, for CUDA where nvcc and a torch with CUDA
are there besides. They use torch's stable ABI and no Python, so one library serves every Python and torch
from 2.10 on. setup.py loads this file by its path, before there is a torch to import: it knows nothing of
the package.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST_TORCH = (2, 10)

#: Where the libraries lie once they are built.
LIB = Path(__file__).resolve().parent / "lib"

#: What machine code the CUDA library holds, where nvcc knows it; PTX of the last one serves newer GPUs.
#: sm_80 runs on 8.x, sm_90a on Hopper, sm_100 on Blackwell of data centres. REFT_KERNELS_CUDA_ARCHS=90a, say,
#: builds for those that it names, without PTX.
CUDA_ARCHITECTURES = ("80", "90a", "100")


class CannotBuild(Exception):
    """Something that a native library needs is missing."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A shared library of reft_kernels/lib: sources, each with flags of its own, and what it links."""

    name: str
    sources: dict[str, list[str]]
    flags: list[str]
    link: list[str]
    cuda: bool = False
    python: bool = False

    @property
    def file(self) -> str:
        return f"{self.name}.abi3.so" if self.python else f"{self.name}.so"


def _cpu_library() -> Library:
    files: dict[str, list[str]] = {
        "csrc/cpu/activation.cpp": [],
        "csrc/cpu/select.cpp": [],
        "csrc/cpu/weight_ranges.cpp": [],
        "csrc/cpu/isa_scalar.cpp": [],
        "csrc/cpu/scale_shift.cpp": [],
        "csrc/cpu/keep_norm.cpp": [],
        "python_bindings/arguments.cpp": [],
        "python_bindings/cpu.cpp": [],
        "python_bindings/cpu_scale_shift.cpp": [],
        "python_bindings/cpu_keep_norm.cpp": [],
    }
    if platform.machine().lower() in ("x86_64", "amd64"):
        avx2 = ["-mavx2", "-mfma", "-mf16c"]
        files["csrc/cpu/isa_avx2.cpp"] = avx2
        avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
        files["csrc/cpu/isa_avx512.cpp"] = avx512
        files["csrc/cpu/isa_avx512_bf16.cpp"] = [*avx512, "-mavx512bf16"]
    # No contraction: a compiler that fuses a product and a sum in one block size and not in another
    # would make a row's bits depend on its neighbours.
    flags = ["-Icsrc/cpu", "-ffp-contract=off", "-fvisibility=hidden"]
    return Library("reft_kernels_cpu", files, flags, ["-ltorch_cpu"])


def _cuda_library() -> Library:
    kernels = ("forward", "forward_norm", "forward_ways", "sum", "backward", "scale_shift")
    files: dict[str, list[str]] = {f"csrc/cuda/{name}.cu": [] for name in kernels}
    files |= {f"python_bindings/{name}.cpp": [] for name in ("cuda", "cuda_scale_shift")}
    flags = ["-Icsrc/cuda", "-DUSE_CUDA", "-fvisibility=hidden"]
    return Library("reft_kernels_cuda", files, flags, ["-ltorch_cpu", "-ltorch_cuda"], cuda=True)


def _standin_library() -> Library:
    """The one that knows Python, by its limited API: one binary serves every Python from 3.10 on."""
    files: dict[str, list[str]] = {
        f"python_bindings/{name}.cpp": [] for name in ("standin", "standin_records")
    }
    return Library("reft_kernels_standin", files, ["-fvisibility=hidden"], ["-ldl"], python=True)


LIBRARIES = [_cpu_library(), _cuda_library(), _standin_library()]

#: What is so without a library.
WITHOUT = {
    "reft_kernels_cpu": "on a CPU it then runs its slow reference backend",
    "reft_kernels_cuda": "GPUs then take the triton backend",
    "reft_kernels_standin": "an edit then takes the longer way through torch's dispatcher",
}


def unwanted(library: Library) -> str | None:
    """Why a library is not to be built, or None.

    REFT_KERNELS_BUILD_NATIVE=0 leaves all libraries alone.

    REFT_KERNELS_BUILD_CUDA: 0 leaves the CUDA library alone, 1 makes it an error if it can't be built, and
    auto (the default) builds it where nvcc and a torch with CUDA are found, without a word where they are
    not.
    """
    if os.environ.get("REFT_KERNELS_BUILD_NATIVE") == "0":
        return "REFT_KERNELS_BUILD_NATIVE was 0"
    choice = cuda_choice()
    if not library.cuda or choice == "1":
        return None
    if choice == "0":
        return "REFT_KERNELS_BUILD_CUDA was 0"
    if not shutil.which("nvcc"):
        return "it needs nvcc (not on PATH)"
    try:
        _torch_with_cuda()
    except CannotBuild as missing:
        return f"it needs {missing}"
    return None


def cuda_choice() -> str:
    """REFT_KERNELS_BUILD_CUDA: "0", "1" or "auto"."""
    choice = os.environ.get("REFT_KERNELS_BUILD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"REFT_KERNELS_BUILD_CUDA: must be 0, 1 or auto, was {choice!r}")
    return choice


def _torch_with_cuda() -> Path:
    torch = _torch()
    if not (torch / "lib" / "libtorch_cuda.so").is_file():
        raise CannotBuild(f"a torch with CUDA ({torch} is one without)")
    return torch


def gencodes(nvcc: str) -> str:
    """nvcc's options: machine code for REFT_KERNELS_CUDA_ARCHS alone, or for CUDA_ARCHITECTURES, and PTX."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [code.removeprefix("sm_") for code in listed]
    wanted = os.environ.get("REFT_KERNELS_CUDA_ARCHS", "")
    if wanted:
        chosen = wanted.split(",")
        if all(re.fullmatch(r"([89]|1\d)\da?", arch) and arch.rstrip("a") in known for arch in chosen):
            return " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in chosen)
        raise SystemExit(
            f"REFT_KERNELS_CUDA_ARCHS: must be architectures from 80 on that nvcc knows, with commas between "
            f"(90a, or {','.join(CUDA_ARCHITECTURES)}), was {wanted!r}; {nvcc} knows {', '.join(known)}"
        )
    found = [arch for arch in CUDA_ARCHITECTURES if arch.rstrip("a") in known]
    if not found:
        raise CannotBuild(f"an nvcc that knows one of {', '.join(CUDA_ARCHITECTURES)}")
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in found]
    newest = found[-1].rstrip("a")
    return " ".join([*codes, f"-gencode arch=compute_{newest},code=compute_{newest}"])


def _torch() -> Path:
    """The folder of the torch that is installed, without importing it.

    Under build isolation torch can't be imported, but the environment that the package goes into has it.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    for place in [*places, Path(sysconfig.get_path("platlib")) / "torch"]:
        header = place / "include" / "torch" / "headeronly" / "version.h"
        if not header.is_file():
            continue
        text = header.read_text()
        found = [re.search(rf"#define TORCH_VERSION_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
        version = tuple(int(match[1]) for match in found if match)
        if version < OLDEST_TORCH:
            raise CannotBuild(f"torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later (found {version})")
        return place
    raise CannotBuild("torch's headers (torch was not installed yet)")


def _tool(name: str, what: str) -> str:
    path = shutil.which(name)
    if path is None:
        beside = Path(sys.executable).parent / name  # an environment that is not activated
        if not beside.is_file():
            raise CannotBuild(f"{what} ({name} is not on PATH)")
        path = str(beside)
    return path


def _python_headers() -> Path:
    """The folder of Python.h."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        raise CannotBuild(f"Python's headers (there is no Python.h in {include})")
    return include


def _escaped(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _ninja_file(library: Library, compiler: str, torch: Path, folder: Path) -> str:
    """build.ninja with one compile edge a source, and one link edge."""
    include = f"-isystem '{torch / 'include'}'"
    if library.python:
        include += f" -isystem '{_python_headers()}'"
    common = ["-O3", "-std=c++17", "-fPIC", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    if not library.python:  # which takes one header of torch, in plain C, that is not for the stable ABI
        common += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    common += library.flags
    shared = "-shared" if sys.platform != "darwin" else "-dynamiclib -undefined dynamic_lookup"
    link = f"{shared} -L'{torch / 'lib'}' {' '.join(library.link)}"
    linker, cuda = "$cxx", []
    if library.cuda:
        nvcc = _tool("nvcc", "nvcc")
        linker = f"{nvcc} -cudart static"
        # --fmad=false: products are fused where the kernels say so, or a row's bits would depend on
        # which kernel it went through.
        flags = f"-O3 -std=c++17 --fmad=false --threads 0 {os.environ.get('NVCCFLAGS', '')}"
        cuda = [
            f"nvcc = {nvcc} {flags} {gencodes(nvcc)}",
            "rule cuda",
            "  command = $nvcc -Xcompiler -fPIC,-fvisibility=hidden -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {compiler}",
        f"flags = {' '.join(common)} {include} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} $in {link} {os.environ.get('LDFLAGS', '')} -o $out",
        *cuda,
    ]
    objects = []
    for source, extra in library.sources.items():
        objects.append(_escaped(folder / (source.replace("/", "_") + ".o")))
        rule = "cuda" if source.endswith(".cu") else "compile"
        lines += [f"build {objects[-1]}: {rule} {source}", f"  extra = {' '.join(extra)}"]
    lines += [f"build {_escaped(folder / library.file)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def sources() -> Path:
    """The folder that has csrc/ and python_bindings/: a checkout's, or the one in an installed package."""
    package = Path(__file__).resolve().parent
    for root in (package / "sources", package.parent):
        if (root / "csrc").is_dir() and (root / "python_bindings").is_dir():
            return root
    raise CannotBuild("the C++ sources (neither in the package nor beside it)")


def build(library: Library, folder: Path) -> Path:
    """Builds a library incrementally in `folder` and returns its path. Raises CannotBuild."""
    if sys.platform == "win32":
        raise CannotBuild("a Unix toolchain (there is no Windows build)")
    root = sources()
    torch = _torch_with_cuda() if library.cuda else _torch()
    ninja = _tool("ninja", "ninja, which pip installs")
    command = os.environ.get("CXX") or "c++"
    _tool(command.split()[0], "a C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(library, command, torch, folder))
    done = subprocess.run([ninja, "-f", str(folder / "build.ninja")], cwd=root)
    if done.returncode:
        raise CannotBuild(f"a compile of {library.name} without errors (they stand above)")
    return folder / library.file


def install(made: Path, lib: Path = LIB) -> Path:
    """Puts a library where the package loads it from; what was noted of it before is gone."""
    target = lib / made.name
    lib.mkdir(parents=True, exist_ok=True)
    # Under another name first: a process that has the old library loaded keeps it whole.
    shutil.copy2(made, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)
    target.with_suffix(".txt").unlink(missing_ok=True)
    return target


def note(library: Library, reason: str, lib: Path = LIB) -> Path | None:
    """Writes down why a library was not built, for who asks later; nothing where one lies there."""
    target = lib / library.file
    if target.exists():
        return None
    lib.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".txt").write_text(reason + "\n")
    return target.with_suffix(".txt")


def why_missing(path: Path) -> str:
    """Why a library does not lie at `path`, and what helps."""
    noted = path.with_suffix(".txt")
    reason = noted.read_text().strip() if noted.exists() else ""
    return f"{path.name} was not built{': ' if reason else ''}{reason}; `reft-kernels build` compiles it"


def build_all(folder: Path) -> int:
    """What `reft-kernels build` does, with `folder` for what compilers write; returns the exit status."""
    failed = False
    for library in LIBRARIES:
        reason = unwanted(library)
        if reason is not None:
            print(f"{library.name}: not built, {reason}")
            continue
        try:
            print(f"{library.name}: built, {install(build(library, folder / library.name))}")
        except (CannotBuild, OSError) as error:
            failed = True
            needs = f"it needs {error}" if isinstance(error, CannotBuild) else str(error)
            print(f"reft-kernels build: {library.name} was not built, {needs}", file=sys.stderr)
    return 1 if failed else 0
