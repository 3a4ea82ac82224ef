"""Families of models beside Llama, tiny and random: a mixed batch has Hugging Face's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from support.served import serve

from .conftest import CONFIGS, SHAPE, make_tiny, prompt_of, request

pytestmark = pytest.mark.serving

_WINDOW = {"sliding_window": 32}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, **_WINDOW}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 32}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {"head_dim": 32, **_EXPERTS}),
    "Mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "Gemma 2": ("Gemma2Config", _GEMMA),
    "Gemma 3": (
        "Gemma3TextConfig",
        {**_GEMMA, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
}

NAMES = [*CONFIGS, None, "everywhere"]
LENGTHS = (5, 40, 17, 70, 9, 33, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_of_another_family(family: str, tmp_path: Path) -> None:
    """And once more out of the prefix cache."""
    name, changes = FAMILIES[family]
    config = getattr(tf, name)(**SHAPE, **changes)
    tiny = make_tiny(tmp_path / "model", config, attn_implementation="eager")
    requests = [request(prompt_of(length), name, 8) for name, length in zip(NAMES, LENGTHS)]
    wanted = [tiny.tokens(one["prompt"], name, 8) for name, one in zip(NAMES, requests)]
    bare = [tiny.tokens(one["prompt"], None, 8) for one in requests]
    assert sum(one != other for one, other in zip(wanted, bare)) >= len(CONFIGS) - 1, (
        "the edits hardly matter"
    )
    found = serve(tmp_path, {"engine": tiny.engine(), "rounds": [requests, requests[::-1]]})
    assert "error" not in found, found["error"]
    for answers, expected in zip(found["rounds"], (wanted, wanted[::-1])):
        assert [one["tokens"] for one in answers] == expected
