"""Calls that generate makes beside its own, and what it makes up: guidance, nested calls, masks."""

from __future__ import annotations

import pytest
import torch
from support.adapters import random_adapter
from support.models import batch_of
from transformers import GenerationConfig

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32


def test_the_mask_is_inferred_with_another_generation_config(model):
    batch = batch_of([7, 3])
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    names = ["untied", "untied"]
    want = model.generate(**batch, generation_config=config, adapter_names=names)
    assert torch.equal(
        model.generate(batch["input_ids"], generation_config=config, adapter_names=names), want
    )
    assert torch.equal(model.generate(batch["input_ids"], config, adapter_names=names), want)


def tokens(model, batch, steps=5, **kwargs):
    out = model.generate(**batch, max_new_tokens=steps, do_sample=False, **kwargs)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("cache", [True, False])
def test_guidance_keeps_its_prompt_without_a_cache(model, cache):
    batch, negative = batch_of([7]), batch_of([4], seed=5)["input_ids"]
    model.reft.add_adapter("l2", random_adapter(rk.ReftConfig(r=2, positions="l2"), WIDTH, scale=0.3))
    found = [
        tokens(
            model,
            batch,
            adapter_names=["l2"],
            guidance_scale=1.7,
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=torch.ones_like(negative),
            use_cache=use_cache,
        )
        for use_cache in (True, cache)
    ]
    assert found[0] == found[1]


def test_a_generate_of_another_prompt_inside_generate(model):
    """In a stopping criterion, say: it has a prompt of its own, not the outer one's columns."""
    other = batch_of([5], seed=8)
    model.reft.set_adapter("untied")
    want = tokens(model, other)
    found = []

    def criterion(ids, scores, **kwargs):
        found.append(tokens(model, other))
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    outer = batch_of([8])
    alone = tokens(model, outer, adapter_names=["everywhere"])
    from transformers import StoppingCriteriaList

    criteria = StoppingCriteriaList([criterion])
    assert tokens(model, outer, adapter_names=["everywhere"], stopping_criteria=criteria) == alone
    assert found and all(one == want for one in found)


def logits(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs).logits


def test_a_backend_that_cannot_run_is_said_before_anything_runs(model, monkeypatch):
    from reft_kernels.ops import dispatch, native

    monkeypatch.setattr(native, "cpu_missing", "taken away for this test")
    monkeypatch.setattr(dispatch, "_resolved", {})
    with rk.backend("native"), pytest.raises(rk.BackendUnavailable, match="taken away"):
        logits(model, batch_of([5]))
