"""`patch` and `unpatch`."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import NotPatchable, find_blocks
from .calls import StackForward
from .reft import Reft

_POOL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def patch(
    model: nn.Module,
    capacity: int | None = None,
    pool_dtype: torch.dtype | None = None,
    fuse_norm: bool = False,
) -> Reft:
    """Lets a Hugging Face model run ReFT adapters, by changes to this instance alone.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).eval()
    >>> reft = patch(model)
    >>> adapter = reft.add_adapter("mine", ReftConfig(r=4, layers=[1], positions="l1"))
    >>> ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    >>> bare, edited = (model(ids, adapter_names=[name] * 2).logits for name in ("__base__", "mine"))
    >>> (bare == edited).all(dim=-1).tolist()  # the last token of each prompt is edited
    [[True, True, False], [True, True, False]]
    >>> reft
    Reft(1 adapter, active='mine'
      'mine': loreft, rank 4, layer 1, block_output, positions l1, 1.0 KiB, trainable
    )
    >>> unpatch(model) is model
    True

    The model keeps its class, weights and API. Its `forward` and `generate` take `adapter_names` (one name a
    row of the batch, "__base__" for the bare model; under PEFT `reft_adapter_names`), `prompt_lengths`,
    `reft_positions` (for each row the tokens to edit, docs/positions.md) and `scale` (what edits are
    multiplied by). A row may have a list of names, whose edits add up (docs/methods.md).

    Args:
        model: a transformers model with decoder (or encoder) layers. Of PEFT's wrapper the model inside is
            patched; `reft` is found on both.
        capacity: pool rows; fixed, so that addresses stay, and a full pool is an error. None: grows.
        pool_dtype: dtype of folded adapters; None for the model's. torch.float32 is nearer to a pyreft that
            keeps R in float32.
        fuse_norm: computes each norm that reads a block's output together with the edit of that output, in
            one pass, for edited rows and others alike. For inference; off by itself where it does not agree
            with the model's own norm within rounding, in training, and where a hook of somebody else's or
            an edit of the next block's input comes in between.

    Returns:
        The model's `Reft`, also `model.reft`.

    Raises:
        NotPatchable: (a ValueError) no layers were found, or the model is patched already.
    """
    if not isinstance(model, nn.Module):
        raise NotPatchable(f"model: must be a transformers model, was {type(model).__name__}")
    if isinstance(getattr(model, "reft", None), Reft):
        raise NotPatchable("model: is patched already; its adapters are at model.reft (unpatch it first)")
    if hasattr(model, "reft"):
        raise NotPatchable(f"model: has an attribute 'reft' of its own, a {type(model.reft).__name__}")
    if pool_dtype is not None and pool_dtype not in _POOL_DTYPES:
        raise ValueError(f"pool_dtype: must be a floating dtype, was {pool_dtype}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity: must be at least 1 pool row or None, was {capacity}")
    if hasattr(model, "get_base_model"):
        # PEFT's wrapper: its generate runs the model inside, so that is the one to patch.
        return patch(model.get_base_model(), capacity, pool_dtype, fuse_norm)  # type: ignore[operator]
    blocks = find_blocks(model)
    if any(isinstance(module, Reft) for module in model.modules()) or isinstance(
        blocks.stack.__dict__.get("forward"), StackForward
    ):
        raise NotPatchable(
            "model: shares its layers with a model that is patched already; unpatch that first"
        )
    reft = Reft(model, blocks, capacity, pool_dtype)
    model.add_module("reft", reft)
    reft._attach(fuse_norm)
    return reft


def unpatch(model: nn.Module) -> nn.Module:
    """Takes everything off that `patch` put on: the model is bit for bit what it was. Returns the model.

    `patch` has an example.

    Raises ValueError for a model that is not patched.
    """
    reft = getattr(model, "reft", None)
    if not isinstance(reft, Reft):
        raise ValueError("model: is not patched")
    reft._detach()
    del reft.model.reft
    return model
