"""reft-bench serve, as far as it goes without vLLM: its cases, and what it says of wrong ones."""

from __future__ import annotations

import argparse
import importlib.util

import pytest
from reft_bench.commands import serve
from reft_bench.records.record import ResultError
from reft_bench.serving import engines


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words)


def test_a_case_for_each_number_of_adapters():
    cases = serve.cases_of(arguments("--adapters", "8,0,2", "--requests", "8"))
    assert [case.adapters for case in cases] == [0, 2, 8]
    assert len({case.id for case in cases}) == 3


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--adapters", "128"), "as many --requests"),
        (("--adapters", "few"), "--adapters"),
        (("--new-tokens", "0"), "--new-tokens"),
    ],
)
def test_wrong_numbers_are_refused(words, text):
    with pytest.raises(ResultError, match=text):
        serve.cases_of(arguments(*words))


def test_requests_take_the_adapters_in_turn(tmp_path):
    assert engines.requests_of(engines.REFT, tmp_path, 2, 3) == ["every-0", "every-1", "every-0"]
    assert engines.requests_of(engines.BARE, tmp_path, 2, 2) == [None, None]
    (one,) = engines.requests_of(engines.LORA, tmp_path, 1, 1)
    assert one["lora"][:2] == ["0", 1]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_where_there_is_one(bench):
    status, text = bench("serve")
    assert status == 2 and "make test-serving" in text
