"""All methods side by side in one batch of a model, each row as its formula says; and in training."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
import transformers as tf
from support import formulas
from support.models import VOCABULARY, batch_of, make_model, row_alone

import reft_kernels as rk
from reft_kernels.adapter import Intervention
from reft_kernels.adapter.method import METHODS
from reft_kernels.adapter.orthonormal import orthonormal_rows
from reft_kernels.sites import HEAD_SITE

pytestmark = pytest.mark.models
WIDTH, HEAD_WIDTH, LAYER = 32, 8, 1
CASES = [
    (name, options) for name in METHODS if name != "folded" for options in formulas.VARIANTS.get(name, [{}])
]
ACT = {"adapter": "gelu", "loreft": "silu"}


def label(name: str, options: dict) -> str:
    return f"{name} {options.get('mode', '')}".strip()


def adapter_of(name: str, options: dict, seed: int = 0) -> rk.Adapter:
    head = 2 if METHODS[name].sites == (HEAD_SITE,) else None
    site, width = ("mlp_output", WIDTH) if head is None else (HEAD_SITE, HEAD_WIDTH)
    tensors = formulas.parameters(name, 2, width, seed=seed, options=options)
    tensors = {key: 0.3 * t if t.dim() == 2 else t for key, t in tensors.items()}
    where = (name, LAYER, site, rk.Positions.parse("all"), tensors)
    return rk.Adapter([Intervention(*where, act_fn=ACT.get(name), head=head, options=options)])


@contextlib.contextmanager
def hooked(model, one: Intervention, p: dict[str, torch.Tensor]):
    """The edit by a plain hook, out of place."""
    act = {None: lambda z: z, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[one.act_fn]

    def edited(h: torch.Tensor) -> torch.Tensor:
        flat = h.reshape(-1, h.shape[-1])
        return formulas.written_out(one.method, p, act, flat, one.options).reshape(h.shape)

    def before(module, args):
        z = args[0].unflatten(-1, (-1, HEAD_WIDTH))
        heads = [edited(z[..., i, :]) if i == one.head else z[..., i, :] for i in range(z.shape[-2])]
        return (torch.stack(heads, -2).flatten(-2),)

    layer = model.model.layers[LAYER]
    if one.head is None:
        handle = layer.mlp.register_forward_hook(lambda module, args, output: edited(output))
    else:
        handle = layer.self_attn.o_proj.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def test_all_of_them_in_one_batch(tmp_path) -> None:
    """Saved and loaded first. In float64; the last row is the bare model's."""
    model = make_model("llama").double()
    names = [label(*case) for case in CASES]
    lengths = [4 + row % 3 for row in range(len(names) + 1)]
    batch = batch_of(lengths, "right")
    wanted = []
    with torch.no_grad():
        for row, case in enumerate(CASES):
            made = adapter_of(*case, seed=row)
            made.save_pretrained(tmp_path / names[row])
            p = {name: getattr(made.interventions[0], name) for name in made.interventions[0].names}
            with hooked(model, made.interventions[0], p):
                wanted.append(model(**row_alone(batch, row)).logits[0])
        wanted.append(model(**row_alone(batch, len(names))).logits[0])
        reft = rk.patch(model)
        for name in names:
            reft.load_adapter(tmp_path / name, name)
        with rk.backend("reference"):
            found = model(**batch, adapter_names=[*names, "__base__"]).logits
            bare = model(**batch, adapter_names=["__base__"] * len(lengths)).logits
    for row, want in enumerate(wanted):
        torch.testing.assert_close(found[row, : len(want)], want, rtol=1e-8, atol=1e-8)
        if row < len(names):
            assert not torch.allclose(found[row, 0], bare[row, 0], atol=1e-3), names[row]


def test_all_of_them_train_in_one_batch() -> None:
    """Gradients of one batch against those of each row through its formula."""
    model = make_model("llama").double()
    cases = [case for case in CASES if METHODS[case[0]].trainable]
    adapters = {label(*case): adapter_of(*case, seed=row) for row, case in enumerate(cases)}
    batch = batch_of([4 + row % 3 for row in range(len(cases))], "right")
    model.requires_grad_(False)
    wanted = []
    for row, adapter in enumerate(adapters.values()):
        one = adapter.interventions[0]
        if one.spec.orthonormal:
            one.R.data = orthonormal_rows(one.R)
        p = {name: getattr(one, name).detach().clone() for name in one.names}
        leaves = {n: t.requires_grad_() for n, t in p.items() if n not in one.spec.fixed}
        rows = {n: orthonormal_rows(t) for n, t in leaves.items() if n in one.spec.orthonormal}
        with hooked(model, one, {**p, **rows}):
            model(**row_alone(batch, row)).logits.square().sum().backward()
        wanted.append({name: leaf.grad for name, leaf in leaves.items()})
    reft = rk.patch(model)
    for name, adapter in adapters.items():
        adapter.trainable = True
        reft.add_adapter(name, adapter)
    seen = batch["attention_mask"].bool()
    with rk.backend("reference"):
        model(**batch, adapter_names=list(adapters)).logits[seen].square().sum().backward()
    for name, adapter, grads in zip(adapters, adapters.values(), wanted):
        one = adapter.interventions[0]
        assert {key for key, _ in one.named_parameters()} == set(grads), name
        for key, grad in grads.items():
            torch.testing.assert_close(getattr(one, key).grad, grad, rtol=1e-6, atol=1e-7 * grad.abs().max())


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].trainable])
def test_a_fresh_one_trains(name: str) -> None:
    """As a config makes it: after three steps the loss has fallen, and only its parameters have moved."""
    model = make_model("llama", gain=1.0)
    reft = rk.patch(model)
    site = {"site": HEAD_SITE, "heads": [0, 3]} if METHODS[name].sites == (HEAD_SITE,) else {}
    adapter = reft.add_adapter("mine", rk.ReftConfig(method=name, positions="all", **site))
    batch = batch_of([6, 6])
    optimizer = torch.optim.Adam(reft.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(**batch, labels=batch["input_ids"]).loss + adapter.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.requires_grad == key.startswith("reft.") for key, p in model.named_parameters())


def test_the_pages_examples_run() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=24,
            num_attention_heads=4,
            pad_token_id=0,
        )
    ).eval()
    batch = batch_of([6, 5, 4])
    names = {"rk": rk, "torch": torch, "d": 32, "model": model, "reft": rk.patch(model), "batch": batch}
    before = {name: p.clone() for name, p in model.named_parameters()}
    for heading in ("## Examples", "## Several at once", "## Subspaces", "## Merging"):
        code = page.partition(heading)[2].partition("```python\n")[2].partition("```")[0]
        exec(code, names)
    reft = names["reft"]
    assert list(reft) == ["mine", "loud", "happy", "plain", "calm"]
    assert reft.adapters["loud"].interventions[0].target.item() == 8
    assert len(names["front"].interventions) == 5 and len(names["plain"].interventions) == 8
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
