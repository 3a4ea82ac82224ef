"""Where a site is in a model: its module, found by structure and not by the family's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn

from ..batch import SiteKey
from ..sites import HEAD_SITE, REGISTRY, is_path
from .blocks import Blocks, text_config

#: Names that families give the parts of a block, dotted where a part lies in a part.
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "output")
_MLP_IN = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "intermediate")
_MLP_OUT = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "lin2", "w2", "dense")
_ACT = ("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_ATTENTION_OUT = ("o_proj", "c_proj", "dense", "out_proj", "wo", "out_lin", "output.dense")
_PROJECTIONS = {
    "query_output": ("q_proj", "query", "q_lin", "self.query"),
    "key_output": ("k_proj", "key", "k_lin", "self.key"),
    "value_output": ("v_proj", "value", "v_lin", "self.value"),
}
_FUSED = ("qkv_proj", "c_attn")
_FIRST_NORM = ("input_layernorm", "ln_1", "attention_norm", "self_attn_layer_norm")
_MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm", "final_layer_norm")

#: Modules whose output is no tensor of anybody else's, nor kept by autograd: it may be edited in place.
_PLAIN = (nn.Linear, nn.Embedding)


class NotHere(ValueError):
    """The model has no such site."""


class Location(NamedTuple):
    """Where a site is.

    Attributes:
        module: whose input or output it is.
        input: whether it is the input.
        width: of what is edited; None where the module does not tell.
        first: the element of the last dimension at which that begins; None for all of it.
        shared: whether others may read the tensor, so that it must be copied before it is edited.
        kept: whether autograd may keep the tensor for a backward.
    """

    module: nn.Module
    input: bool
    width: int | None
    first: int | None = None
    shared: bool = False
    kept: bool = False


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The first of these children (or children's children) that there is. Raises NotHere."""
    for name in names:
        part: object = module
        for piece in name.split("."):
            part = getattr(part, piece, None)
        if isinstance(part, nn.Module):
            return part
    raise NotHere(f"none of the parts of {type(module).__name__} is called {', '.join(names)}")


def widths_of(module: nn.Module) -> tuple[int | None, int | None]:
    """How long the input and the output of a module are, as far as it tells."""
    for names in (("in_features", "out_features"), ("nx", "nf"), ("num_embeddings", "embedding_dim")):
        found = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(one, int) for one in found):
            return (None, found[1]) if names[0] == "num_embeddings" else found  # type: ignore[return-value]
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() == 1:  # a norm
        return weight.shape[0], weight.shape[0]
    return None, None


class Locator:
    """Finds the sites of one model."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self.model, self.blocks = model, blocks
        config = text_config(model)
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def find(self, key: SiteKey) -> Location:
        """Raises NotHere (a ValueError) that says which sites the model has, or ValueError for a head."""
        try:
            found = self._path(key) if is_path(key.site) else _FINDERS[key.site](self, key)
        except NotHere as error:
            name = type(self.model).__name__
            raise NotHere(
                f"site: {key.site!r} was not found in layer {key.layer}: {error}. {name} "
                f"has {', '.join(self.available(key.layer))}, and any module by its path, such as "
                "'*.mlp.output'"
            ) from None
        return found

    def available(self, layer: int) -> Iterator[str]:
        """The named sites that a layer (or the model itself) has."""
        for site, kind in REGISTRY.items():
            try:
                _FINDERS[site](self, SiteKey(site, layer, 0 if kind.heads else None))
            except ValueError:
                continue
            yield site

    # Parts -----------------------------------------------------------------------------------------------

    def _block(self, key: SiteKey) -> nn.Module:
        return self.blocks.layers[key.layer]

    def _attention(self, key: SiteKey) -> nn.Module:
        return _child(self._block(key), _ATTENTION)

    def _attention_out(self, key: SiteKey) -> nn.Module:
        return _child(self._attention(key), _ATTENTION_OUT)

    def _hidden(self, module: nn.Module, input: bool = False, shared: bool = False) -> Location:
        return Location(module, input, self.blocks.width, shared=shared)

    def _path(self, key: SiteKey) -> Location:
        path, _, side = key.site.rpartition(".")
        root, at = self.model, ""
        if path.startswith("*."):
            root, path = self._block(key), path[2:]
        for piece in path.split("."):
            piece = str(key.layer) if piece == "*" else piece
            part = getattr(root, piece, None)
            if not isinstance(part, nn.Module):
                names = ", ".join(name for name, _ in root.named_children()) or "nothing"
                raise NotHere(f"{at or 'it'} has no module {piece!r}, but {names}")
            root, at = part, f"{at}.{piece}" if at else piece
        into, out = widths_of(root)
        if side == "input":
            return Location(root, True, into, shared=True)
        return Location(root, False, out, shared=not isinstance(root, _PLAIN), kept=True)

    def _projection(self, key: SiteKey) -> Location:
        """Of query, key or value, where it has a module of its own, or a stretch of a common one."""
        attention = self._attention(key)
        try:
            module = _child(attention, _PROJECTIONS[key.site])
            width = widths_of(module)[1]
            if width is None:
                raise NotHere(f"the width of {type(module).__name__} is not known")
            return Location(module, False, width)
        except NotHere:
            fused = _child(attention, (*_PROJECTIONS[key.site], *_FUSED))
        parts = [heads * self.head_width for heads in (self.heads, self.kv_heads, self.kv_heads)]
        if widths_of(fused)[1] != sum(parts):
            raise NotHere(f"query, key and value do not lie side by side in {type(fused).__name__}")
        number = list(_PROJECTIONS).index(key.site)
        return Location(fused, False, parts[number], sum(parts[:number]))

    def _one_head(self, key: SiteKey) -> Location:
        whole = self._projection(key._replace(site=key.site.removeprefix("head_"), head=None))
        assert whole.width is not None
        self._check_head(key, whole.width // self.head_width)
        first = (whole.first or 0) + (key.head or 0) * self.head_width
        return whole._replace(width=self.head_width, first=first)

    def _check_head(self, key: SiteKey, heads: int) -> None:
        if key.head is not None and key.head >= heads:
            raise ValueError(f"adapter: edits head {key.head}; the model has {heads} heads at {key.site}")

    def _value_output(self, key: SiteKey) -> Location:
        module = self._attention_out(key)
        return Location(module, True, widths_of(module)[0] or self.heads * self.head_width)

    def _value_head(self, key: SiteKey) -> Location:
        self._check_head(key, self.heads)
        return Location(self._attention_out(key), True, self.head_width)

    def _first_norm(self, key: SiteKey) -> Location:
        return self._hidden(_child(self._block(key), _FIRST_NORM))

    def _mlp_norm(self, key: SiteKey) -> Location:
        block = self._block(key)
        self._first_norm(key)  # without one the others stand behind what they are named for
        if hasattr(block, "post_feedforward_layernorm") and not hasattr(block, "pre_feedforward_layernorm"):
            raise NotHere("its norms stand behind attention and MLP")
        return self._hidden(_child(block, _MLP_NORM))

    def _mlp_dense(self, key: SiteKey) -> nn.Module:
        return _child(_child(self._block(key), _MLP), _MLP_OUT)

    def _activation(self, key: SiteKey) -> Location:
        module = _child(_child(self._block(key), _MLP_IN), _ACT)
        if sum(one is module for one in self.blocks.layers.modules()) > 1 or any(
            module in other.modules() for other in self.blocks.layers if other is not self._block(key)
        ):
            raise NotHere(f"its layers share one {type(module).__name__}")
        return Location(module, False, widths_of(self._mlp_dense(key))[0], kept=True)

    def _embedding(self, key: SiteKey) -> Location:
        module = self.model.get_input_embeddings()  # type: ignore[operator]
        return Location(module, False, widths_of(module)[1])

    def _lm_head(self, key: SiteKey) -> Location:
        module = getattr(self.model, "get_output_embeddings", lambda: None)()
        if not isinstance(module, nn.Module):
            raise NotHere("the model has no language-model head")
        return Location(module, True, widths_of(module)[0], shared=True)


_FINDERS: dict[str, Callable[[Locator, SiteKey], Location]] = {
    "embedding_output": Locator._embedding,
    "block_input": lambda model, key: model._hidden(model._block(key), True, key.layer == 0),
    "attention_norm_output": Locator._first_norm,
    "attention_input": lambda model, key: model._hidden(model._attention(key), True, True),
    "query_output": Locator._projection,
    "key_output": Locator._projection,
    "value_output": Locator._projection,
    "head_query_output": Locator._one_head,
    "head_key_output": Locator._one_head,
    "head_value_output": Locator._one_head,
    "attention_value_output": Locator._value_output,
    HEAD_SITE: Locator._value_head,
    "attention_dense_output": lambda model, key: model._hidden(model._attention_out(key)),
    "attention_output": lambda model, key: model._hidden(model._attention(key)),
    "mlp_norm_output": Locator._mlp_norm,
    "mlp_input": lambda model, key: model._hidden(_child(model._block(key), _MLP_IN), True, True),
    "mlp_activation": Locator._activation,
    "mlp_dense_output": lambda model, key: model._hidden(model._mlp_dense(key)),
    "mlp_output": lambda model, key: model._hidden(_child(model._block(key), _MLP)),
    "block_output": lambda model, key: model._hidden(model._block(key)),
    "lm_head_input": Locator._lm_head,
}
