"""A training step: what it keeps for backward, autocast, torch.compile, orthonormal R, optimizers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from support.models import batch_of, make_model
from torch import nn

import reft_kernels as rk

pytestmark = pytest.mark.models


def model_of(**config) -> nn.Module:
    model = make_model()
    torch.manual_seed(3)
    rk.patch(model).add_adapter("a", rk.ReftConfig(**{"r": 2, "positions": "f2+l1"} | config))
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    found = batch_of([6, 6])
    labels = found["input_ids"].clone()
    labels[:, :3] = -100
    return {**found, "labels": labels, "use_cache": False}


def gradients(model: nn.Module, run=None) -> list[torch.Tensor]:
    model.zero_grad()
    (run or model)(**batch()).loss.backward()
    return [p.grad.clone() for p in model.reft.parameters()]


@pytest.mark.parametrize("positions, rows", [("f1+l1", 2), ("all", 16)])
def test_backward_keeps_the_selected_rows_and_nothing_wider(positions, rows):
    """Beside what the frozen model keeps: for each layer the selected rows of h, and tensors as large as the
    adapter's parameters; nothing d×d, no second h."""
    width, rank, layers = 256, 2, 3
    config = tf.LlamaConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).train()
    ids = torch.randint(3, 50, (2, 16))
    labels = ids.clone()
    labels[:, :8] = -100

    def kept() -> dict[tuple, int]:
        """Storage → bytes, of all that autograd holds after a forward."""
        held = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = (storage.nbytes(), tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del loss
        return {pointer: size for pointer, (size, _) in held.items() if pointer not in own}

    # The same start of autograd for both: what enters the first block wants a gradient.
    model.requires_grad_(False)
    vector = nn.Parameter(torch.zeros(width))
    handle = model.model.layers[0].register_forward_hook(
        lambda m, a, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
    )
    frozen = sum(kept().values())
    handle.remove()
    config = rk.ReftConfig(r=rank, positions=positions, share_weights=True)
    adapter = rk.patch(model).add_adapter("a", config)
    mine = kept()
    parameters = sum(p.numel() for p in adapter.parameters()) * 4
    rows_kept = layers * 2 * rows * width * 4
    # The fold, and R in float64 inside the orthonormal map: a few times the parameters, whatever d is.
    assert sum(mine.values()) - frozen <= rows_kept + 4 * parameters + 2048
    assert 4 * parameters < width * width * 4 > max(mine.values())


def test_autocast_trains():
    model = model_of()
    want = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    got = [p.grad for p in model.reft.parameters()]
    assert all(g.dtype is torch.float32 for g in got)
    error = sum((a - b).square().sum() for a, b in zip(got, want)).sqrt()
    assert error < 0.1 * sum(b.square().sum() for b in want).sqrt()


@pytest.mark.parametrize("method", ["loreft", "direft"])
def test_r_stays_orthonormal(method, tmp_path):
    """Through steps, a save, a load and more steps."""
    model = model_of(method=method)
    reft = model.reft

    def steps():
        optimizer = torch.optim.AdamW(reft.parameters(), lr=0.3)
        for _ in range(15):
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()
        for one in reft.adapters["a"].interventions:
            r = one.materialized()["R"].double()
            assert (r @ r.T - torch.eye(2)).abs().max() < 1e-6

    steps()
    reft.save_pretrained(tmp_path, "a")
    reft.delete_adapter("a")
    reft.load_adapter(tmp_path, "a", is_trainable=True)
    reft.set_adapter("a")
    steps()


@pytest.mark.parametrize("positions", ["f2+l1", "all"])
def test_a_compiled_model_trains_alike(positions):
    """Over steps, with prompts that move: nothing of the first step may be baked in."""
    torch._dynamo.reset()
    eager, compiled = model_of(positions=positions, r=3), model_of(positions=positions, r=3)
    run = torch.compile(compiled, backend="aot_eager")
    optimizers = [torch.optim.AdamW(m.reft.parameters(), lr=0.05) for m in (eager, compiled)]
    for step in range(3):
        losses = []
        for call, optimizer in zip((eager, run), optimizers):
            inputs = batch()
            inputs["labels"][:, : 3 + step] = -100
            optimizer.zero_grad()
            loss = call(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
        for a, b in zip(compiled.reft.parameters(), eager.reft.parameters()):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)
        for optimizer in optimizers:
            optimizer.step()
    torch._dynamo.reset()
