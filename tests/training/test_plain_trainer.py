"""Hugging Face's own Trainer on a patched model: what it reads in forward's signature, and its collators."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers as tf
from support.models import make_model

import reft_kernels as rk

pytestmark = pytest.mark.models
pytest.importorskip("accelerate")


def rows(names=("a", "b"), width: int | None = None) -> list[dict]:
    """Each answered by a token that depends on its first one; of several lengths, or all `width` long."""
    found = []
    for index in range(8):
        prompt = [5 + index, 6, 7, 8, 9][: (3 + index % 2) if width is None else width - 2]
        answer = [3 + index % 5, 9]
        row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        found.append({**row, "adapter_names": names[index % len(names)]} if names else row)
    return found


def model_of(names=("a", "b")):
    model = make_model(gain=1.0)
    reft = rk.patch(model)
    torch.manual_seed(4)
    for name in names:
        reft.add_adapter(name, rk.ReftConfig(r=2, positions="f1+l1"))
    return model


def train(model, folder, data, collator, trainer=tf.Trainer, **arguments) -> tf.Trainer:
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    } | arguments
    settings = tf.TrainingArguments(output_dir=str(folder), **arguments)
    made = trainer(model, settings, data_collator=collator, train_dataset=data)
    made.train()
    return made


def parameters(model, name: str) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.reft.adapters[name].parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models

    words = models.WordLevel({f"t{index}": index for index in range(97)}, unk_token="t1")
    return tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="t0")


@pytest.mark.parametrize(
    "column, as_dataset", [("adapter_names", False), ("adapter_names", True), ("reft_adapter_names", False)]
)
def test_trains_each_rows_adapter_as_ours_does(column, as_dataset, tmp_path):
    """Trainer drops the columns that forward's signature lacks: every row then trained the active adapter."""
    data = [{column if key == "adapter_names" else key: v for key, v in row.items()} for row in rows()]
    data = [{**row, "comment": "dropped"} for row in data]
    if as_dataset:
        data = pytest.importorskip("datasets").Dataset.from_list(data)
    start, theirs, ours = model_of(), model_of(), model_of()
    train(theirs, tmp_path, data, rk.ReftCollator(pad_token_id=0))
    train(ours, tmp_path, data, rk.ReftCollator(pad_token_id=0), rk.ReftTrainer)
    for name in ("a", "b"):
        assert not same(parameters(theirs, name), parameters(start, name))
        assert same(parameters(theirs, name), parameters(ours, name))


def test_under_peft(tmp_path):
    """get_peft_model's forward takes anything; Trainer asks the model inside."""
    peft = pytest.importorskip("peft")
    model = model_of()
    before = {name: parameters(model, name) for name in "ab"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for adapter in model.reft.adapters.values():
        adapter.trainable = True
    data = [
        {"reft_adapter_names" if k == "adapter_names" else k: v for k, v in row.items()} for row in rows()
    ]
    train(wrapped, tmp_path, data, rk.ReftCollator(pad_token_id=0))
    assert not any(same(parameters(model, name), before[name]) for name in "ab")
    assert any("lora_B" in name and bool(p.any()) for name, p in wrapped.named_parameters())


def test_prompt_lengths_reach_the_model(tmp_path):
    data = [{**row, "prompt_lengths": 2} for row in rows(None)]
    told, untold = model_of(["a"]), model_of(["a"])
    train(told, tmp_path, data, rk.ReftCollator(pad_token_id=0))
    train(untold, tmp_path, rows(None), rk.ReftCollator(pad_token_id=0))
    assert not same(parameters(told, "a"), parameters(untold, "a"))


def test_collators_of_transformers_without_names(tokenizer, tmp_path):
    """One adapter trains as with ours: the patch reads the prompts off the labels."""
    ours, theirs = model_of(["a"]), model_of(["a"])
    train(ours, tmp_path, rows(None), rk.ReftCollator(tokenizer))
    train(theirs, tmp_path, rows(None), tf.DataCollatorForSeq2Seq(tokenizer))
    for a, b in zip(parameters(ours, "a"), parameters(theirs, "a")):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("collator", [tf.DataCollatorForSeq2Seq, tf.DataCollatorWithPadding])
def test_collators_that_pad_refuse_names(collator, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`adapter_names` in this case"):
        train(model_of(), tmp_path, rows(width=5), collator(tokenizer))


@pytest.mark.parametrize("collator", [None, tf.default_data_collator])
def test_collators_that_drop_names_are_told_of(collator, tmp_path):
    with pytest.warns(UserWarning, match="the batch has none, so every row trains the active adapter"):
        train(model_of(), tmp_path, rows(width=5), collator)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_is_normalised_as_without_a_patch(family, tmp_path):
    """Trainer asks forward's signature whether the loss takes num_items_in_batch."""
    model, bare = make_model(family), make_model(family)
    rk.patch(model).add_adapter("a", rk.ReftConfig(r=2))
    settings = tf.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    asked = [tf.Trainer(one, settings).model_accepts_loss_kwargs for one in (model, bare)]
    assert asked[0] == asked[1]
    kinds = [[p.kind for p in inspect.signature(m.forward).parameters.values()] for m in (model, bare)]
    variadic = inspect.Parameter.VAR_KEYWORD
    assert (variadic in kinds[0]) == (variadic in kinds[1])


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path):
    whole, parts = model_of(["a"]), model_of(["a"])
    settings = {"max_steps": 1, "max_grad_norm": 0.0}
    train(
        whole,
        tmp_path,
        rows(None),
        rk.ReftCollator(pad_token_id=0),
        per_device_train_batch_size=8,
        **settings,
    )
    train(
        parts,
        tmp_path,
        rows(None),
        rk.ReftCollator(pad_token_id=0),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **settings,
    )
    for a, b in zip(parameters(whole, "a"), parameters(parts, "a")):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
