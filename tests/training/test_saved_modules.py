"""modules_to_save: modules (heads, mostly) that an adapter trains a copy of, with encoders and decoders."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import reft_kernels as rk
from reft_kernels.checkpoint import CheckpointError

pytestmark = pytest.mark.models

_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
}
FAMILIES = {
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SHAPE)), "classifier"),
    "roberta": (lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_SHAPE)), "classifier"),
    "llama": (
        lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**_SHAPE, num_key_value_heads=2)),
        "score",
    ),
}
CONFIG = {"r": 2, "positions": "f1", "layers": [0, 2]}


def make(family: str = "bert") -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def batch_of(rows: int = 4, tokens: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def trained(family: str, steps: int = 3) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with an adapter "a" that was trained for some steps."""
    model = make(family)
    reft = rk.patch(model)
    torch.manual_seed(1)
    reft.add_adapter("a", rk.ReftConfig(**CONFIG, modules_to_save=[FAMILIES[family][1]]))
    batch = batch_of()
    labels = torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model, batch


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    return model(**batch, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_saves_restores_and_leaves_the_models_own_head(family, tmp_path):
    bare = make(family)
    model, batch = trained(family)
    got = logits(model, batch)
    assert not torch.allclose(got, logits(bare, batch), atol=1e-3)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("reft.") for name in trainable)
    assert any("saved_modules" in name for name in trainable)
    assert list(model.state_dict()) == list(bare.state_dict())
    model.reft.save_pretrained(tmp_path / "a", "a")

    again = make(family)
    rk.patch(again).load_adapter(tmp_path / "a", "again")
    torch.testing.assert_close(logits(again, batch), got, atol=1e-6, rtol=1e-5)
    loaded = rk.Adapter.from_pretrained(tmp_path / "a")
    for path, tensors in model.reft.adapters["a"].saved_modules.tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(loaded.saved_modules.tensors()[path][name], tensor)
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/reft_config.json").read_bytes() == (tmp_path / "b/reft_config.json").read_bytes()

    rk.unpatch(model)
    assert torch.equal(logits(model, batch), logits(bare, batch))
    for name, tensor in bare.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_several_heads(family):
    """Each row through its adapter's head; adapters without rows keep grad=None, heads included."""
    model, batch = trained(family)
    reft = model.reft
    torch.manual_seed(2)
    reft.add_adapter("b", rk.ReftConfig(**CONFIG, modules_to_save=[FAMILIES[family][1]]))
    reft.add_adapter("plain", rk.ReftConfig(r=3, positions="all"))
    names = ["b", "a", "__base__", "plain"]
    mixed = logits(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(
            mixed[row : row + 1], logits(model, alone, adapter_names=[name]), atol=1e-5, rtol=1e-4
        )
    model.zero_grad()
    model(**batch, labels=torch.tensor([0, 1, 2, 0]), adapter_names=["b", "__base__"] * 2).loss.backward()
    for name, adapter in reft.adapters.items():
        for parameter in adapter.parameters():
            if name != "b":
                assert parameter.grad is None
    assert all(p.grad is not None for p in reft.adapters["b"].saved_modules.parameters())


def test_deepcopy_and_delete():
    model, batch = trained("bert")
    want = logits(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.reft.adapters["a"].saved_modules.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, batch), want)
    assert not torch.equal(logits(model, batch), want)
    model.reft.delete_adapter("a")
    assert torch.equal(logits(model, batch), logits(make("bert"), batch))


def test_a_language_models_head_stays_through_decode_steps():
    """Positions in the prompt only: a decode step edits nothing, but still has the adapter's head."""
    torch.manual_seed(0)
    shape = {key: value for key, value in _SHAPE.items() if key != "num_labels"}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape, bos_token_id=1, eos_token_id=2)).eval()
    model.generation_config.eos_token_id = None
    reft = rk.patch(model)
    adapter = reft.add_adapter("a", rk.ReftConfig(**CONFIG, modules_to_save=["lm_head"]))
    head = adapter.saved_modules.modules_by_path["lm_head"]
    with torch.no_grad():
        head.weight.zero_()
        head.weight[7] = 1.0
        head.weight[8] = -1.0
    out = model.generate(**batch_of(2), adapter_names=["a", "__base__"], max_new_tokens=4, do_sample=False)
    assert set(out[0, -4:].tolist()) <= {7, 8}
    reft.set_adapter(None)
    assert torch.equal(
        out[1:],
        model.generate(**{k: v[1:] for k, v in batch_of(2).items()}, max_new_tokens=4, do_sample=False),
    )


def test_a_half_precision_model_keeps_the_head_in_float32():
    model, batch = trained("bert")
    exact = logits(model, batch)
    model.to(torch.bfloat16)
    assert next(model.reft.adapters["a"].saved_modules.parameters()).dtype is torch.float32
    assert (logits(model, batch).float() - exact).norm() < 0.1 * exact.norm()


def test_bad_input(tmp_path):
    for bad in ("classifier", [], [3], ["a", "a"]):
        with pytest.raises(ValueError, match="modules_to_save"):
            rk.ReftConfig(modules_to_save=bad)
    model, _ = trained("bert", steps=1)
    reft = model.reft
    with pytest.raises(ValueError, match="no module called 'score'"):
        reft.add_adapter("b", rk.ReftConfig(**CONFIG, modules_to_save=["score"]))
    assert list(reft.adapters) == ["a"]
    reft.save_pretrained(tmp_path / "a", "a")
    other = tf.BertForSequenceClassification(tf.BertConfig(**{**_SHAPE, "num_labels": 5}))
    with pytest.raises(ValueError, match=r"weight \[3, 32\].*weight \[5, 32\]"):
        rk.patch(other).load_adapter(tmp_path / "a", "a")
    with pytest.raises(ValueError, match="modules_to_save"):
        rk.Adapter.compose([reft.adapters["a"], reft.adapters["a"]])
    file = tmp_path / "a/reft_config.json"
    file.write_text(file.read_text().replace('"bias"\n', '"offset"\n'))
    with pytest.raises(CheckpointError, match="offset"):
        rk.Adapter.from_pretrained(tmp_path / "a")
