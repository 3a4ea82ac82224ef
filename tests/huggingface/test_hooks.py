"""Other people's hooks, accelerate's among them: they run, see the edit, and stay."""

from __future__ import annotations

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import patch_with_mixed, patched, random_adapter
from support.models import batch_of, make_model, row_alone

import reft_kernels as rk

pytestmark = pytest.mark.models
NAMES = ["everywhere", "untied"]
WIDTH = 32


def logits(model, batch, names=NAMES, **kwargs):
    with torch.no_grad():
        return model(**batch, adapter_names=names, **kwargs).logits


def test_hooks_of_others_see_the_edit_and_stay(batch):
    """pyvene deletes them; here they run, before and after ours, and are there after unpatch."""
    model = make_model()
    seen = {}
    early = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.__setitem__("early", o))
    patch_with_mixed(model)
    late = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.__setitem__("late", o.clone()))
    out = logits(model, batch)
    with torch.no_grad():
        hidden = model(**batch, adapter_names=NAMES, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen["late"], hidden[2])
    assert torch.equal(out, logits(model, batch))
    rk.unpatch(model)
    assert early.id in model.model.layers[1]._forward_hooks
    assert late.id in model.model.layers[1]._forward_hooks


def test_output_hidden_states_hold_the_edited_states(model, batch):
    """On every layer, whatever order transformers collects them in."""
    bare = make_model()
    with torch.no_grad():
        hidden = model(**batch, adapter_names=["everywhere"] * 2, output_hidden_states=True).hidden_states
    adapter = model.reft.adapters["everywhere"]
    states = {}
    handles = []
    with oracle.eager_hooks(bare, adapter, 6), torch.no_grad():
        for layer, block in enumerate(bare.model.layers):
            hook = block.register_forward_hook(
                lambda m, a, o, layer=layer: states.__setitem__(layer, o.clone())
            )
            handles.append(hook)
        bare(**row_alone(batch, 0))
    for layer in (0, 1):  # the last one comes after the final norm
        torch.testing.assert_close(hidden[layer + 1][0], states[layer][0], atol=1e-4, rtol=1e-4)


def test_accelerates_offload_hooks(batch, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    want = logits(patched(), batch)
    model = make_model()
    accelerate.cpu_offload(model, execution_device="cpu")
    patch_with_mixed(model)
    torch.testing.assert_close(logits(model, batch), want)
    rk.unpatch(model)
    torch.testing.assert_close(model(**batch).logits, make_model()(**batch).logits)


def test_accelerates_hooks_taken_off_after_the_patch(batch):
    """It sets each module's own forward on the instance again, past what was put there since."""
    hooks = pytest.importorskip("accelerate.hooks")
    import accelerate

    names = ["block_output", "head_attention_value_output", "mlp_output"]

    def patched_at_many_sites(model):
        reft = rk.patch(model)
        for site in names:
            heads = [1] if site.startswith("head") else None
            config = rk.ReftConfig(r=2, layers="all", positions="all", site=site, heads=heads)
            reft.add_adapter(site, random_adapter(config, WIDTH // 4 if heads else WIDTH))
        return model

    small = batch_of([5, 4, 3])
    want = logits(patched_at_many_sites(make_model()), small, names)
    model = make_model()
    bare = logits(patched_at_many_sites(make_model()), small, ["__base__"] * 3)
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in zip(want, bare))
    accelerate.cpu_offload(model, execution_device="cpu")
    patched_at_many_sites(model)
    torch.testing.assert_close(logits(model, small, names), want)
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(logits(model, small, names), want)
    rk.unpatch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**small).logits, make_model()(**small).logits)
