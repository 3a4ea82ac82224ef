"""Caches: handed on to another adapter, sliding windows, packed into continuous batches."""

from __future__ import annotations

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import patch_with_mixed
from support.models import batch_of, make_model, row_alone

pytestmark = pytest.mark.models


def test_a_cache_goes_on_under_another_adapter(model):
    """Only the new tokens run under the new adapter; what is cached stays as it was made."""
    first = batch_of([6])
    with torch.no_grad():
        one = model(**first, use_cache=True, adapter_names=["untied"])
        cache, step = one.past_key_values, one.logits[:, -1:].argmax(-1)
        got = model(input_ids=step, past_key_values=cache, adapter_names=["everywhere"]).logits[0, -1]
        ids = torch.cat([first["input_ids"], step], dim=1)
        bare = make_model()
        handles = []
        for layer, block in enumerate(bare.model.layers):

            def hook(module, args, output, layer=layer):
                for name, where in (("untied", None), ("everywhere", [6])):
                    for one in model.reft.adapters[name].interventions:
                        if one.layer == layer:
                            index = oracle.columns(one.positions, 6, 6) if where is None else where
                            output[:, index] = oracle.formula(one, output[:, index].double()).to(output.dtype)

            handles.append(block.register_forward_hook(hook))
        want = bare(input_ids=ids, use_cache=False).logits[0, -1]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def tokens(model, batch, steps=5, **kwargs):
    out = model.generate(**batch, max_new_tokens=steps, do_sample=False, **kwargs)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sliding_windows(family, cache):
    model, bare = make_model(family), make_model(family)
    for one in (model, bare):
        one.config.sliding_window = 4
        for module in one.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = 4
    reft = patch_with_mixed(model)
    batch = batch_of([9, 6])
    names = ["untied", "everywhere"]
    got = tokens(model, batch, adapter_names=names, cache_implementation=cache)
    for row, name in enumerate(names):
        want, _ = oracle.greedy(bare, row_alone(batch, row), reft.adapters[name], 5)
        assert got[row] == want.tolist()
