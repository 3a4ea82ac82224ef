"""Gradients of mixed batches, under gradient checkpointing, between evaluations, beside other calls."""

from __future__ import annotations

import copy

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import random_adapter
from support.models import batch_of, make_model, row_alone

import reft_kernels as rk

pytestmark = pytest.mark.models
NAMES = ["everywhere", "untied"]
WIDTH = 32


def training_model():
    model = make_model()
    reft = rk.patch(model)
    torch.manual_seed(3)
    reft.add_adapter("a", rk.ReftConfig(r=2, positions="f2+l1"))
    reft.add_adapter("b", rk.ReftConfig(method="direft", r=3, layers=[0, 2], positions="all", act_fn="relu"))
    return model.train()


def gradients(model, batch, names):
    model.zero_grad()
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    model(**batch, labels=labels, adapter_names=names, use_cache=False).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.reft.named_parameters()}


def dense_gradients(model, batch, names):
    """The same through eager hooks out of place: nothing of ours but the parameters."""
    model.zero_grad()
    bare = model.reft._runtime.blocks.layers
    adapters = [model.reft.adapters[name] for name in names]
    handles = []
    for layer, block in enumerate(bare):

        def hook(module, args, output, layer=layer):
            h = output[0] if isinstance(output, tuple) else output
            rows = []
            for row, adapter in enumerate(adapters):
                x = h[row]
                for intervention in adapter.interventions:
                    if intervention.layer == layer:
                        fold = intervention.fold()
                        index = oracle.columns(intervention.positions, 3, x.shape[0])
                        z = x @ fold.down.T + fold.bias
                        v = torch.where(fold.kind == 1, torch.relu(z), z)
                        some = torch.zeros(x.shape[0], 1)
                        some[index] = 1
                        x = x + some * (v @ fold.up)
                rows.append(x)
            h = torch.stack(rows)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append(block.register_forward_hook(hook))
    with model.reft.disable_adapter():
        got = gradients(model, batch, ["__base__"] * len(names))
    for handle in handles:
        handle.remove()
    return got


def test_training_gradients_of_a_mixed_batch():
    model = training_model()
    batch = batch_of([6, 6, 6])
    want = dense_gradients(model, batch, ["a", "b", "a"])
    got = gradients(model, batch, ["a", "b", "a"])
    assert all(p.grad is None for n, p in model.named_parameters() if "reft" not in n)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-3, msg=name)
    alone = gradients(model, batch, ["a", "a", "a"])
    used = {id(p) for p in model.reft.adapters["a"].parameters()}
    for name, parameter in model.reft.named_parameters():
        assert (alone[name] is not None) == (id(parameter) in used), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = training_model()
    batch = batch_of([6, 6])
    want = gradients(model, batch, ["a", "b"])
    model.enable_input_require_grads()
    for _ in range(2):  # enabled again, it must be wrapped again
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = gradients(model, batch, ["a", "b"])
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-5, msg=name)
    # Another forward between forward and backward: the recomputation still has its own plan.
    model.zero_grad()
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    loss = model(**batch, labels=labels, adapter_names=["a", "b"], use_cache=False).loss
    with torch.no_grad():
        model(**batch_of([3]), adapter_names=["b"], use_cache=False)
    loss.backward()
    for name, parameter in model.reft.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], atol=1e-6, rtol=1e-5, msg=name)


def logits(model, batch, names=NAMES, **kwargs):
    with torch.no_grad():
        return model(**batch, adapter_names=names, **kwargs).logits


@pytest.mark.parametrize("fused", [False, True])  # fused steps don't count a tensor's versions up
def test_evaluation_in_the_middle_of_training_sees_the_new_weights(fused):
    model = training_model()
    batch = batch_of([6, 6])
    optimizer = torch.optim.AdamW(model.reft.parameters(), lr=0.1, fused=fused)
    model.eval()
    before = logits(model, batch, ["a", "b"])
    gradients(model, batch, ["a", "b"])
    optimizer.step()
    after = logits(model, batch, ["a", "b"])
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    bare = make_model()
    for row, name in enumerate(("a", "b")):
        adapter = copy.deepcopy(model.reft.adapters[name])
        adapter.trainable = False
        want = oracle.forward(bare, row_alone(batch, row), adapter)
        torch.testing.assert_close(after[row], want, atol=2e-4, rtol=1e-4)


def test_unpatch_gives_requires_grad_back():
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    rk.patch(model).add_adapter("a", rk.ReftConfig())
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith("reft"))
    rk.unpatch(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_dropout_falls_on_edited_rows_in_training_only():
    model = make_model()
    reft = rk.patch(model)
    reft.add_adapter("a", rk.ReftConfig(r=1, layers=[1], positions="f1", dropout=0.5))
    batch = batch_of([6])
    seen = []
    model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o.detach().clone()))
    model.eval()
    with torch.no_grad():
        model(**batch)
    model.train()
    model(**batch)
    kept, dropped = seen[0][0], seen[1][0]
    torch.testing.assert_close(dropped[1:], kept[1:])
    zero = dropped[0] == 0
    assert 0 < zero.sum() < WIDTH
    torch.testing.assert_close(dropped[0][~zero], 2 * kept[0][~zero])


@pytest.mark.parametrize("trainable", [False, True])
def test_inputs_embeds_of_the_caller_are_not_written_with_gradients_on(trainable):
    model = make_model()
    config = rk.ReftConfig(r=2, layers=[0], site="block_input", positions="all")
    rk.patch(model).add_adapter("a", config if trainable else random_adapter(config, WIDTH))
    embeds = model.get_input_embeddings()(batch_of([5])["input_ids"]).detach()
    kept = embeds.clone()
    edited = model(inputs_embeds=embeds).logits
    assert torch.equal(embeds, kept)
    assert not torch.equal(edited, make_model()(inputs_embeds=embeds).logits)


def test_adapters_added_in_inference_mode_train_later():
    model = make_model()
    with torch.inference_mode():
        rk.patch(model).add_adapter("a", rk.ReftConfig(r=1, positions="all"))
        model(**batch_of([4]))
    model(**batch_of([4])).logits.sum().backward()
    assert all(p.grad is not None for p in model.reft.adapters["a"].parameters())


def test_backward_does_not_mind_what_happens_to_the_pool_before_it():
    """A frozen adapter above a trained layer: loads, evaluations and other forwards come before backward."""

    def gradients(disturb):
        model = make_model()
        reft = rk.patch(model)
        reft.add_adapter("frozen", random_adapter(rk.ReftConfig(r=2, positions="all"), WIDTH, scale=0.3))
        torch.manual_seed(0)
        reft.add_adapter("trained", rk.ReftConfig(r=1, positions="all", layers=[0]))
        model.model.embed_tokens.weight.requires_grad_(True)
        batch = batch_of([5, 5])
        loss = model(**batch, adapter_names=["frozen", "trained"]).logits.square().mean()
        if disturb:
            logits(model, batch, ["trained", "frozen"])
            reft.delete_adapter("frozen")
            reft.add_adapter("new", random_adapter(rk.ReftConfig(r=9, positions="all"), WIDTH, seed=3))
            model(**batch, adapter_names=["new", "trained"])
        loss.backward()
        return model.model.embed_tokens.weight.grad

    torch.testing.assert_close(gradients(True), gradients(False))
