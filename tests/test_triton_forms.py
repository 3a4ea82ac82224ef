"""Each form of the forward kernel, compiled by itself: the order of its sums, and what its loops wait for.

Triton's interpreter knows no layouts, so that a row has the same bits alone and in a tile is read here from
what was compiled: outside of products there is no sum whose order Triton chooses, and both heights multiply
alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from support.triton_forms import Form

TESTS = pathlib.Path(__file__).parent
DTYPES = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
FORMS = [Form(*dtypes, rank, alone) for dtypes in DTYPES for rank in (8, 16, 256) for alone in (True, False)]


@pytest.fixture(scope="module")
def made() -> dict[Form, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, str(TESTS / "support" / "triton_forms.py")]
    asked = json.dumps([dataclasses.asdict(form) for form in FORMS])
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(FORMS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_sum_is_left_to_triton(form: Form, made: dict[Form, dict]) -> None:
    assert made[form]["sums"] == []


@pytest.mark.parametrize("form", FORMS[::2], ids=str)
def test_a_row_alone_takes_the_products_of_a_tile(form: Form, made: dict[Form, dict]) -> None:
    """As many terms at a time, in the same precisions, in the same order."""
    in_a_tile = made[dataclasses.replace(form, alone=False)]
    assert made[form]["terms"] == in_a_tile["terms"] != []


@pytest.mark.parametrize("form", FORMS[::2], ids=str)
def test_the_loops_of_a_row_alone_wait_for_no_load(form: Form, made: dict[Form, dict]) -> None:
    """D h and v U: pool rows by 16 bytes, h by 4, all asynchronous; two barriers are the pipeline's."""
    loops = made[form]["loops"]
    assert len(loops) == 2
    for number, loop in enumerate(loops):
        assert loop["async_16_bytes"] >= 2, loop
        # Of float32 rows, v U at ranks up to 16 adds to what a thread loads itself.
        by_itself = form.h == "float32" and number == 1 and form.rank <= 16
        assert loop["waited_for"] == by_itself, loop
        assert loop["barriers"] <= (4 if number == 1 and form.rank > 16 else 2), loop
