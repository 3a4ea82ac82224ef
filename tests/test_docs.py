"""The code in the documents runs as it stands there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import torch

from reft_kernels.sites import REGISTRY, SYNONYMS, canonical

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_filling_a_pool_by_hand() -> None:
    code, _ = re.findall(r"```python\n(.*?)```", (DOCS / "engine.md").read_text(), re.DOTALL)
    start = torch.randn(10, 64)
    assert code.count("h = torch.randn(2, 5, d)") == 1
    names: dict = {"start": start}
    exec(code.replace("h = torch.randn(2, 5, d)", "h = start.clone().view(2, 5, d)"), names)
    R, W, b = (names[name] for name in ("R", "W", "b"))
    expected = start.clone()
    rows = [0, 4, 9]
    expected[rows] += (start[rows] @ W.T + b - start[rows] @ R.T) @ R  # the paper's formula
    torch.testing.assert_close(names["h"].view(10, 64), expected, rtol=1e-5, atol=1e-5)
    untouched = [row for row in range(10) if row not in rows]
    assert torch.equal(names["h"].view(10, 64)[untouched], start[untouched])


def test_the_examples_of_positions() -> None:
    failures, tried = doctest.testfile(str(DOCS / "positions.md"), module_relative=False, encoding="utf-8")
    assert tried > 10 and failures == 0


def test_the_table_of_sites() -> None:
    """It is the registry, in its order."""
    text = (DOCS / "sites.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:3] == "| `"
    ]
    found = [(row[0].strip("`"), row[1], row[2], re.findall(r"`([^`]+)`", row[3])) for row in rows]
    assert found == [
        (name, kind.where, kind.width, [other for other, own in SYNONYMS.items() if own == name])
        for name, kind in REGISTRY.items()
    ]
    for path in re.findall(r'site="([^"]+)"', text):
        assert canonical(path) == path
