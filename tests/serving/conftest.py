"""A tiny model, adapters of it, and what Hugging Face generates with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from support.adapters import random_adapter

import reft_kernels as rk

LAYERS, WIDTH, VOCABULARY = 3, 64, 97

CONFIGS = {
    "tied": rk.ReftConfig(r=2, layers=[0, 2], positions="f2+l4", share_weights=True),
    "untied": rk.ReftConfig(r=3, layers=[1], positions="f2+l1", act_fn="relu"),
    "everywhere": rk.ReftConfig(method="direft", r=5, layers="all", positions="all"),
    "generated": rk.ReftConfig(r=2, layers=[1, 2], positions="generated", act_fn="silu"),
    "last": rk.ReftConfig(r=2, layers="all", positions="l4", share_weights=True),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("serving") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; make test-serving has it")


class Tiny(NamedTuple):
    """folder: of the model; its adapters lie in adapters/ below. tokens: what Hugging Face generates."""

    folder: Path
    tokens: Callable[..., list[int]]

    def adapter(self, name: str) -> str:
        return str(self.folder / "adapters" / name)

    @property
    def reft(self) -> dict[str, Any]:
        """additional_config["reft"] with all adapters."""
        return {"adapters": {name: self.adapter(name) for name in CONFIGS}}

    def engine(self, **changes: Any) -> dict[str, Any]:
        return {"model": str(self.folder), "additional_config": {"reft": self.reft}, **changes}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def make_model(config: tf.PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_tiny(folder: Path, config: tf.PretrainedConfig, **loading: Any) -> Tiny:
    """A model of a config, and what Hugging Face, `loading` it so, generates with each adapter."""
    make_model(config).save_pretrained(folder)
    for seed, (name, one) in enumerate(CONFIGS.items()):
        random_adapter(one, WIDTH, LAYERS, 2.0, seed).save_pretrained(folder / "adapters" / name)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, **loading).eval()
    model.generation_config.eos_token_id = None
    reft = rk.patch(model)
    for name in CONFIGS:
        reft.load_adapter(str(folder / "adapters" / name), name)
    answers: dict[tuple, list[int]] = {}

    def tokens(prompt: list[int], name: str | None, new: int) -> list[int]:
        key = (tuple(prompt), name, new)
        if key not in answers:
            with torch.no_grad():
                row = torch.tensor([prompt])
                out = model.generate(
                    row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False,
                    adapter_names=[name or "__base__"],
                )  # fmt: skip
            answers[key] = out[0, len(prompt) :].tolist()
        return answers[key]

    return Tiny(folder, tokens)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), tf.LlamaConfig(**SHAPE))


def request(prompt: list[int], name: str | None = None, new: int = 10) -> dict[str, Any]:
    return {"prompt": prompt, "new": new, "extra": {"reft_adapter": name} if name else None}
