"""What the sites are in each family, written down by hand, and plain torch hooks there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers as tf

from . import model_oracle
from .models import FAMILIES, LAYERS

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
MODELS = FAMILIES | {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_SIZES)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **_SIZES, num_key_value_heads=2, head_dim=8, layer_types=["full_attention"] * LAYERS
        )
    ),
}


class At(NamedTuple):
    """A module's path, input or output, and the stretch of its last dimension (None for all)."""

    path: str
    side: str = "output"
    stretch: tuple[int, int] | None = None


_ALL = {
    "block_input": At("{}", "input"),
    "block_output": At("{}"),
}
_MODERN = _ALL | {
    "embedding_output": At("model.embed_tokens"),
    "attention_norm_output": At("{}.input_layernorm"),
    "attention_input": At("{}.self_attn", "input"),
    "query_output": At("{}.self_attn.q_proj"),
    "key_output": At("{}.self_attn.k_proj"),
    "value_output": At("{}.self_attn.v_proj"),
    "attention_value_output": At("{}.self_attn.o_proj", "input"),
    "attention_dense_output": At("{}.self_attn.o_proj"),
    "attention_output": At("{}.self_attn"),
    "mlp_norm_output": At("{}.post_attention_layernorm"),
    "mlp_input": At("{}.mlp", "input"),
    "mlp_activation": At("{}.mlp.act_fn"),
    "mlp_dense_output": At("{}.mlp.down_proj"),
    "mlp_output": At("{}.mlp"),
    "lm_head_input": At("lm_head", "input"),
}
_GEMMA = _MODERN | {"mlp_norm_output": At("{}.pre_feedforward_layernorm")}

#: Family → the path of its layers, and its sites. What a family lacks, it does not have.
SITES: dict[str, tuple[str, dict[str, At]]] = {
    "llama": ("model.layers", _MODERN),
    "mistral": ("model.layers", _MODERN),
    "qwen2": ("model.layers", _MODERN),
    "qwen3": ("model.layers", _MODERN),
    "gemma2": ("model.layers", _GEMMA),
    "gemma3": ("model.layers", _GEMMA),
    "phi3": (
        "model.layers",
        _MODERN
        | {
            "query_output": At("{}.self_attn.qkv_proj", stretch=(0, 32)),
            "key_output": At("{}.self_attn.qkv_proj", stretch=(32, 48)),
            "value_output": At("{}.self_attn.qkv_proj", stretch=(48, 64)),
            "mlp_activation": At("{}.mlp.activation_fn"),
        },
    ),
    "gpt2": (
        "transformer.h",
        _ALL
        | {
            "embedding_output": At("transformer.wte"),
            "attention_norm_output": At("{}.ln_1"),
            "attention_input": At("{}.attn", "input"),
            "query_output": At("{}.attn.c_attn", stretch=(0, 32)),
            "key_output": At("{}.attn.c_attn", stretch=(32, 64)),
            "value_output": At("{}.attn.c_attn", stretch=(64, 96)),
            "attention_value_output": At("{}.attn.c_proj", "input"),
            "attention_dense_output": At("{}.attn.c_proj"),
            "attention_output": At("{}.attn"),
            "mlp_norm_output": At("{}.ln_2"),
            "mlp_input": At("{}.mlp", "input"),
            "mlp_activation": At("{}.mlp.act"),
            "mlp_dense_output": At("{}.mlp.c_proj"),
            "mlp_output": At("{}.mlp"),
            "lm_head_input": At("lm_head", "input"),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        _ALL
        | {
            "embedding_output": At("gpt_neox.embed_in"),
            "attention_norm_output": At("{}.input_layernorm"),
            "attention_input": At("{}.attention", "input"),
            "attention_value_output": At("{}.attention.dense", "input"),
            "attention_dense_output": At("{}.attention.dense"),
            "attention_output": At("{}.attention"),
            "mlp_norm_output": At("{}.post_attention_layernorm"),
            "mlp_input": At("{}.mlp", "input"),
            "mlp_activation": At("{}.mlp.act"),
            "mlp_dense_output": At("{}.mlp.dense_4h_to_h"),
            "mlp_output": At("{}.mlp"),
            "lm_head_input": At("lm_head|embed_out", "input"),  # transformers 5, 4
        },
    ),
    "bert": (
        "bert.encoder.layer",
        _ALL
        | {
            "embedding_output": At("bert.embeddings.word_embeddings"),
            "attention_input": At("{}.attention", "input"),
            "query_output": At("{}.attention.self.query"),
            "key_output": At("{}.attention.self.key"),
            "value_output": At("{}.attention.self.value"),
            "attention_value_output": At("{}.attention.output.dense", "input"),
            "attention_dense_output": At("{}.attention.output.dense"),
            "attention_output": At("{}.attention"),
            "mlp_input": At("{}.intermediate", "input"),
            "mlp_activation": At("{}.intermediate.intermediate_act_fn"),
            "mlp_dense_output": At("{}.output.dense"),
            "mlp_output": At("{}.output"),
            "lm_head_input": At("cls.predictions.decoder", "input"),
        },
    ),
}
HEAD = 8  # width of one head in all of them


def sites_of(family: str) -> dict[str, At]:
    """The sites that a family has, those of one head (number 1) included."""
    sites = dict(SITES[family][1])
    for name in ("query_output", "key_output", "value_output", "attention_value_output"):
        at = sites.get(name)
        if at is not None:
            first = HEAD + (at.stretch[0] if at.stretch else 0)
            sites[f"head_{name}"] = at._replace(stretch=(first, first + HEAD))
    return sites


def module_at(model: torch.nn.Module, family: str, at: At, layer: int) -> torch.nn.Module:
    names = at.path.split("|")
    path = next((name for name in names if hasattr(model, name)), names[0])
    return model.get_submodule(path.format(f"{SITES[family][0]}.{layer}"))


def hook(model: torch.nn.Module, family: str, at: At, intervention, columns):
    """Edits these columns of every row there, by a hook that returns another tensor. Returns its handle."""
    module = module_at(model, family, at, intervention.layer)
    first, last = at.stretch or (None, None)

    def edited(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        part = h[:, columns, first:last]
        h[:, columns, first:last] = model_oracle.formula(intervention, part.double()).to(h.dtype)
        return h

    def before(module, args, kwargs):
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"])}

    def after(module, args, output):
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    if at.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def width_of(model: torch.nn.Module, family: str, at: At) -> int:
    """How long what is edited there is, found out by running the model."""
    if at.stretch is not None:
        return at.stretch[1] - at.stretch[0]
    module = module_at(model, family, at, 0)
    seen: list[int] = []

    def note(module, args, kwargs, output):
        h = output[0] if isinstance(output, tuple) else output
        if at.side == "input":
            h = args[0] if args else kwargs["hidden_states"]
        seen.append(h.shape[-1])

    handle = module.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    handle.remove()
    return seen[0]
