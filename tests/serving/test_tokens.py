"""vLLM's tokens are Hugging Face's with the same adapter, however the engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.served import serve

from .conftest import CONFIGS, Tiny, prompt_of, request

pytestmark = pytest.mark.serving

NAMES = [*CONFIGS, None, "everywhere", "tied"]
LENGTHS = (5, 40, 17, 70, 9, 33, 12, 66)
MIXED = [request(prompt_of(length), name) for name, length in zip(NAMES, LENGTHS)]


def assert_same(tiny: Tiny, requests: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    for one, answer in zip(requests, answers, strict=True):
        name = (one["extra"] or {}).get("reft_adapter")
        wanted = tiny.tokens(one["prompt"], name, one["new"])
        assert answer["tokens"] == wanted, f"{name}, a prompt of {len(one['prompt'])}"


def run(tiny: Tiny, folder: Path, rounds: list, environment: dict | None = None, **spec: Any) -> dict:
    engine = tiny.engine(**spec.pop("engine", {}))
    found = serve(folder, {"engine": engine, "rounds": rounds, **spec}, environment)
    assert "error" not in found, found["error"]
    return found


def test_the_adapters_change_the_tokens(tiny: Tiny) -> None:
    """Otherwise the tests below would say nothing."""
    for one in MIXED:
        if one["extra"]:
            edited = tiny.tokens(one["prompt"], one["extra"]["reft_adapter"], one["new"])
            assert edited != tiny.tokens(one["prompt"], None, one["new"]), one["extra"]


@pytest.mark.parametrize(
    ("how", "spec"),
    [
        ("eager", {}),
        ("compiled", {"engine": {"enforce_eager": False}}),
        ("second model runner", {"v2": True}),
    ],
)
def test_a_mixed_batch(tiny: Tiny, tmp_path: Path, how: str, spec: dict) -> None:
    """And once more, out of the prefix cache, in another order."""
    found = run(tiny, tmp_path, [MIXED, MIXED[::-1]], **spec)
    for requests, answers in zip([MIXED, MIXED[::-1]], found["rounds"]):
        assert_same(tiny, requests, answers)
    assert found["v2"] == ("v2" in spec)


@pytest.mark.parametrize("spec", [{}, {"v2": True}], ids=["first model runner", "second model runner"])
def test_chunks_and_preemption(tiny: Tiny, tmp_path: Path, spec: dict) -> None:
    """Prompts in chunks of less than 24 tokens; so few blocks that requests are put off and begin again."""
    long = [request(one["prompt"], (one["extra"] or {}).get("reft_adapter"), 40) for one in MIXED]
    engine = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 9, "enable_prefix_caching": False}
    found = run(tiny, tmp_path, [long], engine=engine, **spec)
    assert found["preempted"] > 0
    assert_same(tiny, long, found["rounds"][0])


def test_the_prefix_cache_across_adapters_and_prompt_lengths(tiny: Tiny, tmp_path: Path) -> None:
    """Requests one after another, so that each finds the blocks of those before it."""
    base, more = prompt_of(66), prompt_of(20, seed=1)
    rounds = [
        [request(base)],
        [request(base, "last")],  # its first edited position is 62, in the second block
        [request(base + more, "last")],  # whose last positions are others
        [request(base + more)],
        [request(base, "everywhere")],
        [request(base + more, "everywhere")],
        [request(base, "tied"), request(base + more, "tied"), request(base + more, "generated")],
        [request(base)],
    ]
    found = run(tiny, tmp_path, rounds)
    for requests, answers in zip(rounds, found["rounds"]):
        assert_same(tiny, requests, answers)
    cached = [[answer["cached"] for answer in answers] for answers in found["rounds"]]
    # Blocks of 32. What lies before the first edited position is the bare model's.
    assert cached == [[0], [32], [64], [64], [0], [64], [0, 32, 64], [64]]


def test_without_the_key_the_prefix_cache_gives_wrong_tokens(tiny: Tiny, tmp_path: Path) -> None:
    base, more = prompt_of(66), prompt_of(20, seed=1)
    rounds = [[request(base, "everywhere")], [request(base)], [request(base, "last")], [request(base + more)]]
    found = run(tiny, tmp_path, rounds, sabotage="keys")
    wrong = [
        answer["tokens"] != tiny.tokens(one["prompt"], (one["extra"] or {}).get("reft_adapter"), one["new"])
        for (one,), (answer,) in zip(rounds, found["rounds"])
    ]
    assert not wrong[0] and any(wrong[1:])


@pytest.mark.parametrize(
    ("how", "spec"),
    [
        ("tensor parallel", {"engine": {"tensor_parallel_size": 2}}),
        ("pipeline parallel", {"engine": {"pipeline_parallel_size": 2}, "v2": True}),
    ],
)
def test_two_workers(tiny: Tiny, tmp_path: Path, how: str, spec: dict) -> None:
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = run(tiny, tmp_path, [MIXED], environment=threads, **spec)
    assert_same(tiny, MIXED, found["rounds"][0])
