"""Which model an adapter is for: its name, its type, and a fingerprint of the fields that shape it."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

from torch import nn

from ..adapter import Adapter, BaseModel
from .blocks import text_config

#: Before every fingerprint; to be raised when `_shape` changes, as those of two schemes can't be compared.
_SCHEME = "1"

#: Read by transformers' common names, which each family's config translates to its own.
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)

#: The number of experts has no common name.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def _field(config: Any, *names: str) -> Any:
    """The first of these fields that the config has."""
    for name in names:
        try:
            found = getattr(config, name, None)
        except (
            Exception
        ):  # transformers 5 refuses fields that differ from layer to layer, with errors of its own
            found = None
        if found is not None:
            return found
    return None


def _rope_theta(config: Any) -> float:
    """The base of the rotary embedding, which transformers 5 keeps in `rope_parameters`, and 4 beside it.

    Where neither has it (as in families without one), the usual 10000.
    """
    rope = _field(config, "rope_parameters") or {}
    rope = (
        rope.get("full_attention", rope) or {}
    )  # families with sliding windows have one for each kind of layer
    theta = rope.get("rope_theta", _field(config, "rope_theta"))
    return 10000.0 if theta is None else float(theta)


def _shape(config: Any) -> dict[str, Any]:
    """What tells models apart whose weights can't be the same.

    Nothing that a user sets when loading (dtype, attention, cache, quantisation), and nothing that only one
    of the supported versions of transformers has: what a family leaves out is filled in.
    """
    shape = {name: _field(config, name) for name in _FIELDS}
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    head_dim = _field(config, "head_dim")
    if head_dim is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        head_dim = width // heads
    shape["num_key_value_heads"] = _field(config, "num_key_value_heads", "num_attention_heads")
    shape["head_dim"] = head_dim
    shape["experts"] = _field(config, *_EXPERTS)
    shape["rope_theta"] = _rope_theta(config)
    return shape


def base_model(model: nn.Module) -> BaseModel:
    """What files say of `model`: of its text part, where it has others."""
    config: Any = model.config
    text = text_config(model)
    shape = json.dumps(_shape(text), sort_keys=True, default=str)
    return BaseModel(
        model_type=str(getattr(text, "model_type", "")),
        fingerprint=f"{_SCHEME}-{hashlib.sha256(shape.encode()).hexdigest()[:16]}",
        name=getattr(config, "_name_or_path", None) or None,
        revision=getattr(config, "_commit_hash", None),
    )


def warn_of_another(what: str, theirs: BaseModel | None, mine: BaseModel, stacklevel: int) -> None:
    """Warns if `what` was made for a model of another type or shape than `mine`, as far as that is known."""
    if theirs is not None and not theirs.matches(mine):
        warnings.warn(
            f"{what}: was made for {theirs}; this model is {mine}. The shapes of the edits fit, but "
            "what they mean is another model's",
            stacklevel=stacklevel + 1,
        )


def meet_base(name: str, adapter: Adapter, model: nn.Module) -> None:
    """Warns if the adapter was made for another model. One that is to train is this model's from here on."""
    mine = base_model(model)
    warn_of_another(f"adapter {name!r}", adapter.base, mine, stacklevel=5)
    if adapter.trainable:
        adapter.base = mine
