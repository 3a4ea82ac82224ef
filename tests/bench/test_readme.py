"""The README says what was recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from reft_bench.commands import readme
from reft_bench.records.record import ResultError

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_tables_are_those_of_the_recorded_files():
    text = README.read_text()
    assert readme.update(text) == text, "run: python -m reft_bench.commands.readme README.md"


def test_a_number_that_was_changed_by_hand_is_noticed():
    text = README.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| forward | float32 | 64 "))
    assert readme.update(text.replace(row, row.replace("0.", "0.0", 1))) == text


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ResultError, match="results"):
        readme.update("# Nothing here\n")
