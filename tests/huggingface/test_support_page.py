"""docs/support.md says what works where, as it is found by trying all of it."""

from __future__ import annotations

import pytest
from support import matrix

from reft_kernels import ops

pytestmark = pytest.mark.models
LABELS = list(dict.fromkeys(case.label for case in matrix.METHOD_CASES))
SITES = list(dict.fromkeys(f"`{case.site}`" for case in matrix.SITE_CASES))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    for backend in ops.BACKENDS:
        reason = ops.why_not(backend, "cpu")
        if reason is not None:
            pytest.skip(f"the page is of all backends; {backend}: {reason}")
    return matrix.written(matrix.Tried().found).splitlines()


@pytest.mark.parametrize("name", [*LABELS, *SITES])
def test_a_row_is_what_was_found(lines: list[str], name: str) -> None:
    """A method or a site that is new has no row yet; one that changed has another."""
    (found,) = [line for line in lines if line.startswith(f"| {name} |")]
    assert "WRONG" not in "".join(lines), lines
    assert found in matrix.on_the_page().splitlines(), f"docs/support.md: run {matrix.COMMAND}"


def test_the_page_has_nothing_else(lines: list[str]) -> None:
    """No row of what is gone, and the reason of each hole."""
    assert matrix.on_the_page().splitlines() == lines, f"docs/support.md: run {matrix.COMMAND}"
