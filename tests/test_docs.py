"""The code in the documents runs as it stands there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import torch

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
