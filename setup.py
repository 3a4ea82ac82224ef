"""Builds the native libraries with reft_kernels/build.py, and lays their sources into the package.

Without a compiler or torch's headers the package installs all the same, pure Python, after one message that
says what is missing; `reft-kernels build` makes up for it later. Everything else about the package is in
pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import setuptools

OLDEST_SETUPTOOLS = 77  # pyproject.toml's license is in its form
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"reft_kernels: the build needs setuptools {OLDEST_SETUPTOOLS} or later, found "
        f"{setuptools.__version__}: pip install --upgrade setuptools"
    )

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

ROOT = Path(__file__).resolve().parent


def _load(path: Path) -> ModuleType:
    """A module by its path: importing reft_kernels would ask for torch."""
    spec = importlib.util.spec_from_file_location(f"reft_kernels_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


native = _load(ROOT / "reft_kernels" / "build.py")

#: The C++ sources, as packages of no Python: reft_kernels/sources in a wheel.
SOURCES = {
    f"reft_kernels.sources.{name.replace('/', '.')}": name
    for name in ("csrc/cpu", "csrc/cuda", "python_bindings")
}


class BuildNative(build_ext):
    """build_ext that runs ninja; where that can't be, it says why and leaves the package pure Python."""

    def run(self) -> None:
        self.built: list[str] = []
        self.notes: list[str] = []
        folder = (Path(self.build_temp) / "native").resolve()
        lib = (ROOT if self.inplace else Path(self.build_lib)) / "reft_kernels" / "lib"
        for library in native.LIBRARIES:
            reason = native.unwanted(library)
            if reason is None:
                try:
                    made = native.build(library, folder / library.name)
                    self.built.append(str(native.install(made, lib)))
                    continue
                except native.CannotBuild as missing:
                    if library.cuda and native.cuda_choice() == "1":
                        raise SystemExit(f"reft_kernels: {library.name} needs {missing}") from missing
                    reason = f"it needs {missing}"
                    _warn(library, reason)
            noted = native.note(library, reason, lib)
            if noted is not None:
                self.notes.append(str(noted))

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [*self.built, *self.notes]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _warn(library, reason: str) -> None:
    print(
        f"reft_kernels: {library.name} was not built, {reason}. The package works without it; "
        f"{native.WITHOUT[library.name]}. `reft-kernels build` compiles it once the package is installed.",
        file=sys.stderr,
    )


class Wheel(bdist_wheel):
    """A wheel for any Python: the library links no Python. Without the library, for any machine."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, machine = super().get_tag()
        built = getattr(self.get_finalized_command("build_ext"), "built", [])
        return "py3", "none", machine if built else "any"


setup(
    # bench/ is installed as the package reft_bench.
    packages=[
        *find_packages(include=["reft_kernels", "reft_kernels.*"]),
        "reft_bench",
        *(f"reft_bench.{name}" for name in find_packages("bench")),
        *SOURCES,
    ],
    package_dir={"reft_bench": "bench", **SOURCES},
    package_data={name: ["*.cpp", "*.h", "*.cu", "*.cuh"] for name in SOURCES},
    ext_modules=[Extension(f"reft_kernels.lib.{library.name}", sources=[]) for library in native.LIBRARIES],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
