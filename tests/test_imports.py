"""The package's modules import each other without circles, and only as docs/architecture.md says.

The table there under "Who imports whom" is what is tested: a row for each part of the package (a module or a
folder of it), from the bottom up. Imports inside functions count, those for type checkers alone don't.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import floors

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "reft_kernels"
HEADING = "## Who imports whom"

#: Libraries that every part may use.
EVERYWHERE = {"torch", "numpy"}

#: Imports (module, imported module) that break a rule and are to go: each with its reason.
LEFTOVERS: dict[tuple[str, str], str] = {}


class Row(NamedTuple):
    """What a part may import: other parts, and libraries besides those that are used everywhere."""

    parts: frozenset[str]
    libraries: frozenset[str]


def read_table(text: str) -> dict[str, Row]:
    """Part → its row, in the table's order. The first three columns: part, parts, libraries."""
    lines = text.partition(HEADING)[2].partition("\n## ")[0].splitlines()
    rows = [line.split("|")[1:4] for line in lines if line.startswith("| `")]
    table: dict[str, Row] = {}
    for row in rows:
        (part,), parts, libraries = (re.findall(r"`([^`]+)`", cell) for cell in row)
        table[part] = Row(frozenset(parts), frozenset(libraries))
    return table


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(root: Path) -> dict[str, Path]:
    """Name → file of every module of the package in `root`."""
    return {module_name(file, root): file for file in sorted((root / PACKAGE).rglob("*.py"))}


class Imports(ast.NodeVisitor):
    """Collects the modules that a module imports when it runs, wherever the statements stand."""

    def __init__(self, name: str, file: Path, modules: dict[str, Path]) -> None:
        self.modules = modules
        self.package = name if file.stem == "__init__" else name.rpartition(".")[0]
        self.found: set[str] = set()
        self.visit(ast.parse(file.read_text(encoding="utf-8")))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        above = self.package.split(".")[: self.package.count(".") + 2 - node.level] if node.level else []
        source = ".".join([*above, *filter(None, [node.module])])
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            self.found.add(inner if inner in self.modules else source)


def imports_in(root: Path) -> dict[str, set[str]]:
    """Module → what it imports, of the package and of others."""
    modules = modules_of(root)
    return {name: Imports(name, file, modules).found for name, file in modules.items()}


def part_of(module: str) -> str:
    """`reft_kernels.adapter.config` is of the part `adapter`; the package's own module is `reft_kernels`."""
    return [*module.split("."), PACKAGE][1]


def inside(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def circle_in(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, or None."""
    graph = {
        name: {other for other in found if inside(other) and (name, other) not in LEFTOVERS}
        for name, found in imports.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def forbidden(imports: dict[str, set[str]], table: dict[str, Row]) -> Iterator[str]:
    """What modules import although the table does not say so."""
    for name, found in imports.items():
        part = part_of(name)
        for other in sorted(found):
            if inside(other):
                allowed = part_of(other) in (part, *table[part].parts) or (name, other) in LEFTOVERS
            else:
                library = other.partition(".")[0]
                known = EVERYWHERE | table[part].libraries | set(sys.stdlib_module_names)
                allowed = library in known
            if not allowed:
                yield f"{name} imports {other}"


@pytest.fixture(scope="module")
def table() -> dict[str, Row]:
    return read_table((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return imports_in(ROOT)


def test_no_modules_import_each_other_in_a_circle(imports) -> None:
    circle = circle_in(imports)
    assert circle is None, " <- ".join(circle)


def test_every_part_has_a_row_and_every_row_a_part(imports, table) -> None:
    assert set(table) == {part_of(name) for name in imports}


def test_a_row_names_only_rows_above_it(table) -> None:
    above: set[str] = set()
    for part, row in table.items():
        assert row.parts <= above, f"{part} may import {sorted(row.parts - above)}, which stand below it"
        above.add(part)


def test_what_is_imported_stands_in_the_table(imports, table) -> None:
    assert list(forbidden(imports, table)) == []


def test_what_stands_in_the_table_is_imported(imports, table) -> None:
    """A permission that nobody uses says nothing about the code."""
    used: dict[str, set[str]] = defaultdict(set)
    for name, found in imports.items():
        used[part_of(name)] |= {
            part_of(other) if inside(other) else other.partition(".")[0] for other in found
        }
    for part, row in table.items():
        idle = (row.parts | row.libraries) - used[part]
        assert not idle, f"{part} may import {sorted(idle)}, but does not"


def test_the_picture_is_drawn_from_the_table() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    drawn = (ROOT / "docs/floors.svg").read_text(encoding="utf-8")
    assert drawn == floors.draw(text), "run python tests/support/floors.py"


def test_leftovers_are_still_there(imports) -> None:
    for name, other in LEFTOVERS:
        assert other in imports[name], f"{name} imports {other} no more: strike it off LEFTOVERS"


# What the walk sees ---------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> dict[str, set[str]]:
    for name, text in files.items():
        file = root / PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return imports_in(root)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from . import a", "a"),
        ("from .a import x", "a"),
        ("from .folder import x", "folder"),
        ("from .folder import b", "folder.b"),
        ("from .folder.b import x", "folder.b"),
        ("import reft_kernels.folder.b as b", "folder.b"),
        ("from reft_kernels.folder import b", "folder.b"),
        ("def f():\n    if True:\n        from . import a", "a"),
        ("class C:\n    def f(self):\n        from .a import x", "a"),
        ("if TYPE_CHECKING:\n    from . import a\nelse:\n    from .folder import b", "folder.b"),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path: Path, text: str, found: str) -> None:
    files = {"__init__.py": "", "a.py": "", "folder/__init__.py": "", "folder/b.py": "", "c.py": text}
    assert write(tmp_path, files)[f"{PACKAGE}.c"] == {f"{PACKAGE}.{found}"}


def test_imports_out_of_a_folder(tmp_path: Path) -> None:
    text = (
        "from .. import a\nfrom ..a import x\nfrom . import c\nfrom .c import x\nfrom .. import __version__"
    )
    files = {
        "__init__.py": "",
        "a.py": "",
        "folder/b.py": text,
        "folder/c.py": "",
        "folder/__init__.py": text,
    }
    wanted = {f"{PACKAGE}.a", f"{PACKAGE}.folder.c", PACKAGE}
    found = write(tmp_path, files)
    assert found[f"{PACKAGE}.folder.b"] == found[f"{PACKAGE}.folder"] == wanted


def test_a_circle_is_found_inside_functions_and_not_for_type_checkers(tmp_path: Path) -> None:
    files = {"__init__.py": "", "a.py": "from . import b", "b.py": "def f():\n    from .a import x"}
    assert set(circle_in(write(tmp_path, files)) or ()) == {f"{PACKAGE}.a", f"{PACKAGE}.b"}
    (tmp_path / PACKAGE / "b.py").write_text("if TYPE_CHECKING:\n    from .a import x")
    assert circle_in(imports_in(tmp_path)) is None


def test_what_the_table_does_not_name_is_found(tmp_path: Path) -> None:
    table = read_table(
        f"{HEADING}\n\n| `low` | – | – | x |\n| `high` | `low` | `rich` | y |\n\n## Next\n| `no` |"
    )
    assert list(table) == ["low", "high"]
    files = {"low.py": "import json, torch, rich", "high/a.py": "from .. import low\nimport rich.table"}
    assert list(forbidden(write(tmp_path, files), table)) == [f"{PACKAGE}.low imports rich"]
    files = {"low.py": "def f():\n    from .high import a"}
    assert list(forbidden(write(tmp_path, files), table)) == [f"{PACKAGE}.low imports {PACKAGE}.high.a"]
