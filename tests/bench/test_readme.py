"""The README and the page of benchmarks say what was recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from reft_bench.commands import readme
from reft_bench.records import questions
from reft_bench.records.record import ResultError

ROOT = Path(__file__).resolve().parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"


@pytest.mark.parametrize("file", [README, PAGE], ids=lambda file: file.name)
def test_the_results_are_those_of_the_recorded_files(file: Path):
    text = file.read_text()
    assert readme.update(text) == text, "run: python -m reft_bench.commands.readme"


def test_a_number_that_was_changed_by_hand_is_noticed():
    text = PAGE.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| forward | float32 | 64 "))
    assert readme.update(text.replace(row, row.replace("0.", "0.0", 1))) == text


def test_a_short_answer_that_was_changed_by_hand_is_noticed():
    text = README.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| a training step"))
    assert readme.update(text.replace(row, row.replace(" ± ", " ± 9", 1))) == text


def test_every_question_of_the_readme_is_answered():
    """Of the records that there are."""
    known = readme.loaded()
    rows = questions.rows(known)
    assert len(rows) == sum(one.record in known for one in questions.QUESTIONS) >= 6
    assert all(row[1] != "–" for row in rows), rows


def test_what_the_page_names_is_there():
    for file in (README, PAGE):
        for part in file.read_text().split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if "bench/results" in target:
                assert (file.parent / target).exists(), target


def test_a_page_without_markers_is_refused():
    with pytest.raises(ResultError, match="results"):
        readme.update("# Nothing here\n")
