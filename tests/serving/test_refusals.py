"""Refused, never ignored: at the start, or as that request's error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.served import serve

from .conftest import Tiny, prompt_of, request

pytestmark = pytest.mark.serving


def error_of(tiny: Tiny, folder: Path, engine: dict[str, Any] | None = None, **spec: Any) -> str:
    found = serve(folder, {"engine": tiny.engine(**(engine or {})), "rounds": [], **spec})
    assert "error" in found, "the engine started"
    return found["error"]


def test_wrong_requests_are_refused_and_right_ones_beside_them_are_served(tiny: Tiny, tmp_path: Path) -> None:
    prompt = prompt_of(12)

    def asking(**extra: Any) -> dict[str, Any]:
        return {"prompt": prompt, "new": 6, "extra": extra}

    wrong = {
        "no adapter 'evrywhere'": asking(reft_adapter="evrywhere"),
        "reft_adapter is not given": asking(reft_scale=2.0),
        "finite number": asking(reft_adapter="everywhere", reft_scale="much"),
        "plugin's own": asking(_reft={}),
        "would edit the same": asking(reft_adapter=["tied", "everywhere"]),
    }
    right = [request(prompt, "everywhere", 6), asking(reft_adapter=["everywhere"])]
    engine = tiny.engine()
    found = serve(tmp_path, {"engine": engine, "rounds": [[*wrong.values(), *right]]})
    assert "error" not in found, found["error"]
    answers = found["rounds"][0]
    for text, answer in zip(wrong, answers):
        assert text in answer.get("refused", ""), answer
    for answer in answers[len(wrong) :]:
        assert answer["tokens"] == tiny.tokens(prompt, "everywhere", 6)


def test_a_server_without_adapters_refuses_requests_for_them(tiny: Tiny, tmp_path: Path) -> None:
    engine = {"model": str(tiny.folder)}
    forged = {"prompt": prompt_of(12), "new": 6, "extra": {"_reft": {}}}
    rounds = [[request(prompt_of(12), "everywhere", 6), forged, request(prompt_of(12), None, 6)]]
    found = serve(tmp_path, {"engine": engine, "rounds": rounds})
    refused, own, served = found["rounds"][0]
    assert "plugin's own" in own["refused"]
    assert "additional_config" in refused["refused"]
    assert served["tokens"] == tiny.tokens(prompt_of(12), None, 6)


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"additional_config": {"reft": {"max_adapters": 3}}}, "reft.max_adapters: 3"),
        ({"additional_config": {"reft": {"adapters": {"a": "/nowhere"}}}}, "/nowhere"),
        ({"worker_extension_cls": "json.JSONDecoder"}, "worker_extension_cls"),
    ],
    ids=["speculative decoding", "too few places", "no folder", "another extension"],
)
def test_configs_with_which_answers_would_be_wrong(
    tiny: Tiny, tmp_path: Path, engine: dict[str, Any], text: str
) -> None:
    assert text in error_of(tiny, tmp_path, engine)


@pytest.mark.parametrize(
    ("sabotage", "text"),
    [
        ("unchecked keys", "does not ask for an adapter's part"),
        ("hooks", "is not active in worker 0"),
        ("import", "could not be installed"),
    ],
)
def test_a_plugin_that_is_not_whole_stops_the_engine(
    tiny: Tiny, tmp_path: Path, sabotage: str, text: str
) -> None:
    """A prefix cache that does not ask for the key, a model without edits, an import that fails."""
    assert text in error_of(tiny, tmp_path, sabotage=sabotage)
