"""The places in a layer where an adapter edits."""

from __future__ import annotations

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import patch_with_mixed, random_adapter
from support.models import batch_of, make_model

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32


def patched(seed=0):
    model = make_model(seed=seed)
    patch_with_mixed(model)
    return model


@pytest.fixture
def model():
    return patched()


@pytest.fixture
def batch():
    return batch_of([6, 4])


@pytest.mark.parametrize(
    "site", ["block_output", "block_input", "mlp_output", "attention_output", "head_attention_value_output"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_sites(site, family):
    """Against a plain hook at the module that pyvene's component name means."""
    model, bare = make_model(family), make_model(family)
    heads = [1, 3] if site == "head_attention_value_output" else None
    width = 8 if heads else WIDTH
    config = rk.ReftConfig(r=2, layers=[0, 2], site=site, positions="f2", share_weights=True, heads=heads)
    adapter = random_adapter(config, width)
    rk.patch(model).add_adapter("a", adapter)
    batch = batch_of([5])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    kept = embeds.clone()
    with torch.no_grad():
        got = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(embeds, kept)  # block_input of layer 0 must not write into the caller's tensor
    from reft_kernels.huggingface.blocks import find_blocks, site_module

    layers = find_blocks(bare).layers

    def edited(h, intervention):
        h = h.clone()
        if intervention.head is None:
            h[:, :2] = oracle.formula(intervention, h[:, :2].double()).to(h.dtype)
        else:
            part = h.view(*h.shape[:-1], -1, 8)
            x = part[:, :2, intervention.head].double()
            part[:, :2, intervention.head] = oracle.formula(intervention, x).to(h.dtype)
        return h

    for intervention in adapter.interventions:
        module = site_module(layers[intervention.layer], site)
        if site in ("block_input", "head_attention_value_output"):

            def pre(m, args, kwargs, intervention=intervention):
                if args:
                    return (edited(args[0], intervention), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"], intervention)}

            module.register_forward_pre_hook(pre, with_kwargs=True)
        else:

            def post(m, args, out, intervention=intervention):
                if isinstance(out, tuple):
                    return (edited(out[0], intervention), *out[1:])
                return edited(out, intervention)

            module.register_forward_hook(post)
    with torch.no_grad():
        want = bare(**batch).logits
        plain = make_model(family)(**batch).logits
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(want, plain, atol=1e-3)


def test_a_head_that_the_model_lacks_is_refused(model):
    site = "head_attention_value_output"
    config = rk.ReftConfig(r=1, layers=[0], site=site, positions="f1", heads=[4], share_weights=True)
    with pytest.raises(ValueError, match="head 4; the model has 4 heads"):
        model.reft.add_adapter("a", random_adapter(config, 8))
    assert "a" not in model.reft.adapters
