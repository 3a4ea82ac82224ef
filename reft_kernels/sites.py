"""The places in a model where hidden states may be edited, by their names here and elsewhere."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

#: The site whose hidden state is one head's slice of the attention's value output.
HEAD_SITE = "head_attention_value_output"


class Site(NamedTuple):
    """A site by name.

    Attributes:
        where: what is edited there, in words.
        width: how long its hidden states are, in words.
        input: whether it is what goes into a module, and not what comes out.
        heads: whether an intervention there edits one attention head.
        layered: whether every layer has one.
    """

    where: str
    width: str
    input: bool = False
    heads: bool = False
    layered: bool = True


#: All sites that have a name, in the order in which a token meets them; pyvene's names where it has one.
REGISTRY = {
    "embedding_output": Site("the token embeddings", "embedding", layered=False),
    "block_input": Site("what enters a layer", "hidden", input=True),
    "attention_norm_output": Site("the output of the norm before attention", "hidden"),
    "attention_input": Site("what enters the attention", "hidden", input=True),
    "query_output": Site("the output of the query projection", "heads x head"),
    "key_output": Site("the output of the key projection", "key-value heads x head"),
    "value_output": Site("the output of the value projection", "key-value heads x head"),
    "head_query_output": Site("one head of it", "head", heads=True),
    "head_key_output": Site("one key-value head of it", "head", heads=True),
    "head_value_output": Site("one key-value head of it", "head", heads=True),
    "attention_value_output": Site("what enters the output projection", "heads x head", input=True),
    HEAD_SITE: Site("one head of it", "head", input=True, heads=True),
    "attention_dense_output": Site("the output of that projection, before any dropout or norm", "hidden"),
    "attention_output": Site("the output of the attention", "hidden"),
    "mlp_norm_output": Site("the output of the norm before the MLP", "hidden"),
    "mlp_input": Site("what enters the MLP", "hidden", input=True),
    "mlp_activation": Site("the output of the activation function", "intermediate"),
    "mlp_dense_output": Site("the output of its last projection, before any dropout or norm", "hidden"),
    "mlp_output": Site("the output of the MLP", "hidden"),
    "block_output": Site("the output of a layer", "hidden"),
    "lm_head_input": Site("what enters the language-model head", "hidden", input=True, layered=False),
}

SITES = tuple(REGISTRY)

#: What others call them: TransformerLens, representation engineering, steering-vectors, GLP.
SYNONYMS = {
    "resid_pre": "block_input",
    "hook_resid_pre": "block_input",
    "resid_post": "block_output",
    "hook_resid_post": "block_output",
    "decoder_block": "block_output",
    "residual_stream_post_layer": "block_output",
    "attn_out": "attention_output",
    "hook_attn_out": "attention_output",
    "self_attn": "attention_output",
    "attn_out_pre_residual": "attention_output",
    "mlp_out": "mlp_output",
    "hook_mlp_out": "mlp_output",
    "mlp": "mlp_output",
    "ffn_out_pre_residual": "mlp_output",
    "z": "attention_value_output",
    "hook_z": "attention_value_output",
    "input_layernorm": "*.input_layernorm.output",
    "post_attention_layernorm": "*.post_attention_layernorm.output",
}

#: A module by its path in the model, with * for a layer's number; a path that begins with * begins at the
#: layer itself. Its input or its output.
_PATH = re.compile(r"(\*|\w+)(\.(\*|\w+))*\.(input|output)")


def is_path(site: str) -> bool:
    """Whether a site is a module by path, and not one of the names."""
    return site not in REGISTRY


def edits_input(site: str) -> bool:
    """Whether the site is the input of its module."""
    return REGISTRY[site].input if site in REGISTRY else site.endswith(".input")


def takes_heads(site: str) -> bool:
    """Whether an intervention at the site edits one attention head."""
    return site in REGISTRY and REGISTRY[site].heads


def has_layers(site: str) -> bool:
    """Whether every layer has the site; others are given the layer 0."""
    return REGISTRY[site].layered if site in REGISTRY else "*" in site


def canonical(site: object) -> str:
    """The site's name here, of a name, a synonym or a path. Raises ValueError that names `site`."""
    if isinstance(site, str):
        name = SYNONYMS.get(site, site)
        if name in REGISTRY:
            return name
        if _PATH.fullmatch(name) and name not in ("*.input", "*.output") and name.count("*") < 2:
            return name
    close = difflib.get_close_matches(str(site), [*SITES, *SYNONYMS], n=3)
    hint = f" (near: {', '.join(close)})" if close else ""
    raise ValueError(
        f"site: must be one of {', '.join(SITES)}, or a module's path and side such as "
        f"'model.layers.*.mlp.down_proj.output' or '*.mlp.down_proj.input'; was {site!r}{hint}"
    )
