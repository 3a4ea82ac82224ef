"""A LoRA of PEFT's on the same model, and PEFT's wrapper around it."""

from __future__ import annotations

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import mixed_adapters, patch_with_mixed, patched
from support.models import batch_of, make_model, row_alone

import reft_kernels as rk

pytestmark = pytest.mark.models
NAMES = ["everywhere", "untied"]
WIDTH = 32


@pytest.mark.parametrize("order", ["patch first", "PEFT first"])
def test_lora_on_the_same_model(order, batch):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    bare = peft.get_peft_model(make_model(), config)
    weights = peft.get_peft_model_state_dict(bare)
    if order == "patch first":
        inner = patched()
        model = peft.get_peft_model(inner, config)
    else:
        inner = make_model()
        model = peft.get_peft_model(inner, config)
        patch_with_mixed(inner)
    peft.set_peft_model_state_dict(model, weights)
    model.eval(), bare.eval()
    with torch.no_grad():
        got = model(**batch, reft_adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        adapter = inner.reft.adapters[name]
        want = oracle.forward(bare.get_base_model(), row_alone(batch, row), adapter)
        torch.testing.assert_close(got[row][batch["attention_mask"][row].bool()], want, atol=2e-4, rtol=1e-4)
    out = model.generate(**batch, reft_adapter_names=NAMES, max_new_tokens=3, do_sample=False)
    tokens, _ = oracle.greedy(bare.get_base_model(), row_alone(batch, 1), inner.reft.adapters["untied"], 3)
    assert out[1, -3:].tolist() == tokens.tolist()
    mixed = model(**batch, adapter_names=["default", "__base__"], reft_adapter_names=NAMES).logits
    assert not torch.equal(mixed[1], got[1])  # PEFT took its names, ours took ours
    merged = model.merge_and_unload()
    with torch.no_grad():
        again = merged(**batch, adapter_names=NAMES).logits
    torch.testing.assert_close(again, got, atol=2e-4, rtol=1e-4)


def tokens(model, batch, steps=5, **kwargs):
    out = model.generate(**batch, max_new_tokens=steps, do_sample=False, **kwargs)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}])
def test_patching_pefts_wrapper_patches_the_model_inside(more):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapper = peft.get_peft_model(make_model(), config).eval()
    reft = rk.patch(wrapper)
    assert wrapper.reft is reft and wrapper.get_base_model().reft is reft
    reft.add_adapter("a", mixed_adapters(WIDTH)["untied"])
    batch = batch_of([6])
    want, _ = oracle.greedy(make_model(), batch, reft.adapters["a"], 5)
    assert tokens(wrapper, batch, **more) == [want.tolist()]
    with pytest.raises(rk.NotPatchable):
        rk.patch(wrapper)
    rk.unpatch(wrapper)
    assert not hasattr(wrapper, "reft") and not hasattr(wrapper.get_base_model(), "reft")
