"""Tiny random models of every family that the patch is tested on, and batches for them."""

from __future__ import annotations

import torch
import transformers as tf

VOCABULARY = 97
LAYERS = 3

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MODERN = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

FAMILIES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_MODERN)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_MODERN)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_MODERN)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_MODERN, head_dim=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_MODERN, head_dim=8)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_MODERN)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(**_COMMON, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128)
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            **_COMMON,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
        )
    ),
}


def make_model(family: str = "llama", seed: int = 0, gain: float = 4.0, families=FAMILIES):
    """A model in eval mode whose weights are large enough (by `gain`) for edits to change greedy tokens."""
    torch.manual_seed(seed)
    model = families[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # every row generates to the end
        model.generation_config.pad_token_id = 0
    return model


def batch_of(lengths: list[int], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on one side, with their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = tokens
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def row_alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch without its padding."""
    kept = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][kept][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
