"""docs/methods.md says of each method what the registry says, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import formulas

from reft_kernels.adapter.method import METHODS
from reft_kernels.ops import Act

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
METHOD = r"^\| `(\w+)` \|(.*)\|$"


def tables() -> list[dict[str, list[str]]]:
    """The cells of each table by method."""
    blocks = [block for block in PAGE.split("\n\n") if block.startswith("| method")]
    return [
        {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in re.findall(METHOD, block, re.M)}
        for block in blocks
    ]


@pytest.mark.parametrize("table", tables())
def test_every_method_has_its_row(table: dict[str, list[str]]) -> None:
    assert list(table) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_parameters(name: str) -> None:
    spec = METHODS[name]
    said = tables()[0][name][1].split(", ")
    marks = {n: ("*" if n in spec.fixed else "") + ("?" if n in spec.optional else "") for n in spec.shapes}
    assert said == [n + mark for n, mark in marks.items()]


@pytest.mark.parametrize("name", METHODS)
def test_sites_and_training(name: str) -> None:
    spec = METHODS[name]
    _, sites, trains, _ = tables()[1][name]
    assert sites == ("all" if spec.sites is None else ", ".join(spec.sites))
    assert trains.partition(":")[0] == ("yes" if spec.trainable else "no")


@pytest.mark.parametrize("name", METHODS)
def test_merging(name: str) -> None:
    from reft_kernels.huggingface.merging import is_linear

    spec = METHODS[name]
    linear = {}
    for options in formulas.VARIANTS.get(name, [{}]):
        for act in (Act.NONE, Act.GELU) if spec.takes_activation else (Act.NONE,):
            p = formulas.parameters(name, 3, 8, options=options)
            linear[options.get("mode", ""), act] = is_linear(spec.fold(p, act, spec.resolve(options)))
    said = {
        "yes": {("", Act.NONE)},
        "without act_fn": {("", Act.NONE)},
        "add": {("add", Act.NONE)},
        "add, replace": {("add", Act.NONE), ("replace", Act.NONE)},
        "no": set(),
        "if its parts do": set(),  # (these parameters have a GELU)
    }[tables()[1][name][3]]
    assert {key for key, is_so in linear.items() if is_so} == said
