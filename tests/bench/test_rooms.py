"""The folders of the benchmark suite build on one another one way, and so do the files within each."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest
import reft_bench

BENCH = Path(reft_bench.__file__).resolve().parent

#: Each folder may import those before it.
ROOMS = ("records", "measure", "systems", "kernels", "serving", "gpu", "commands")


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(BENCH.rglob("*.py")):
        parts = path.relative_to(BENCH).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(name: str, modules: dict[str, Path]) -> set[str]:
    """Modules of the suite that a module imports, wherever it does."""
    package = name.split(".") if modules[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(modules[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
        for alias in node.names:
            inner = ".".join([*base, alias.name])
            found.add(inner if inner in modules else ".".join(base))
    return found - {name, ""}


def _room(name: str) -> str:
    return name.split(".")[0]


def test_folders_build_on_one_another_one_way():
    modules = _modules()
    for name in modules:
        for other in _imports(name, modules):
            if _room(name) in ROOMS and _room(other) != _room(name):
                allowed = ROOMS[: ROOMS.index(_room(name))]
                assert _room(other) in allowed, f"{name} imports {other}"


def test_no_files_import_each_other_in_a_circle():
    modules = _modules()
    graph = {name: _imports(name, modules) & modules.keys() for name in modules}
    for name in list(graph):  # a package stands for what it hands on
        graph[name] -= {other for other in graph[name] if name.startswith(other + ".")}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_top_holds_the_command_line_alone():
    top = {path.name for path in BENCH.glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "cli.py"}
    for name in ROOMS:
        assert (BENCH / name / "__init__.py").is_file(), f"bench/{name} would not be installed"


@pytest.mark.parametrize("path", sorted(BENCH.rglob("*.py")), ids=lambda path: path.stem)
def test_files_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) < 400
