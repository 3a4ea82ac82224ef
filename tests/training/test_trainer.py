"""Hugging Face's Trainer: what checkpoints hold, resuming to the bit, evaluation, collation, bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from support.models import make_model
from torch.utils.data import Dataset

import reft_kernels as rk
from reft_kernels.checkpoint import CheckpointError

pytestmark = pytest.mark.models
pytest.importorskip("accelerate")


class Rows(Dataset):
    """Prompts of several lengths, each answered by a token that depends on its first one."""

    def __init__(self, count: int = 12, names: list[str] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for index in range(count):
            prompt = torch.randint(3, 97, (4 + index % 3,), generator=generator).tolist()
            answer = [3 + prompt[0] % 5, 9]
            row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
            if names is not None:
                row["adapter_names"] = names[index % len(names)]
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def model_of(names=("a",), **config):
    model = make_model(gain=1.0)
    reft = rk.patch(model)
    torch.manual_seed(4)
    for name in names:
        reft.add_adapter(name, rk.ReftConfig(**{"r": 2, "positions": "f1+l1", "dropout": 0.1} | config))
    return model


def trainer_of(model, folder, rows=None, eval_rows=None, **arguments):
    from transformers import TrainingArguments

    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    } | arguments
    return rk.ReftTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **arguments),
        rk.ReftCollator(pad_token_id=0),
        train_dataset=Rows() if rows is None else rows,
        eval_dataset=eval_rows,
    )


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.reft.named_parameters()}


def same(a, b) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_checkpoints_hold_the_adapter_and_resume_to_the_bit(tmp_path):
    whole = model_of()
    trainer_of(whole, tmp_path / "whole").train()
    first = model_of()
    trainer_of(first, tmp_path / "run", save_strategy="steps", save_steps=3).train()
    same(parameters(first), parameters(whole))
    folder = tmp_path / "run/checkpoint-3"
    files = {file.name for file in folder.iterdir()}
    assert {"reft_config.json", "reft_model.safetensors", "optimizer.pt", "rng_state.pth"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin", "config.json"}
    resumed = model_of()
    trainer_of(resumed, tmp_path / "run").train(resume_from_checkpoint=str(folder))
    same(parameters(resumed), parameters(whole))
    raw = rk.Adapter.from_pretrained(folder).interventions[0].R
    torch.testing.assert_close(raw @ raw.T, torch.eye(2), atol=1e-6, rtol=0)


def test_a_checkpoint_is_an_adapter_to_load(tmp_path):
    model = model_of()
    trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    batch = trainer.data_collator([Rows()[0], Rows()[1]])
    model.eval()
    with torch.no_grad():
        want = model(**batch).logits
    again = make_model(gain=1.0)
    rk.patch(again).load_adapter(tmp_path / "checkpoint-6", "a")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, want)


def test_several_adapters_in_one_batch(tmp_path):
    rows = Rows(names=["a", "b/.", "__base__"])
    whole, first, resumed = (model_of(("a", "b/.", "unused")) for _ in range(3))
    before = parameters(whole)
    trainer_of(whole, tmp_path / "whole", rows).train()
    unused = {id(p) for p in whole.reft.adapters["unused"].parameters()}
    moved = {id(p) for n, p in whole.reft.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not moved & unused
    trainer_of(first, tmp_path / "run", rows, save_strategy="steps", save_steps=2).train()
    trainer_of(resumed, tmp_path / "run", rows).train(resume_from_checkpoint=True)
    trainer = trainer_of(resumed, tmp_path / "run", rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    same(parameters(resumed), parameters(whole))
    rk.Adapter.from_pretrained(tmp_path / "run/checkpoint-4/b%2F%2E")


def test_best_model_and_evaluation_in_the_middle(tmp_path):
    model = model_of()
    trainer = trainer_of(
        model,
        tmp_path,
        eval_rows=Rows(5),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst one, so that reloading it changes something
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(losses)) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-6)
    assert losses[-1] < losses[0]


def test_trains_heads_too(tmp_path):
    def run(folder, **arguments):
        model = model_of(modules_to_save=["lm_head"])
        return model, trainer_of(model, tmp_path / folder, **arguments)

    whole, trainer = run("whole")
    trainer.train()
    first, trainer = run("run", save_strategy="steps", save_steps=3)
    trainer.train()
    resumed, trainer = run("run")
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    same(parameters(resumed), parameters(whole))
    assert torch.equal(whole.lm_head.weight, make_model(gain=1.0).lm_head.weight)


def test_with_a_lora_on_the_same_model(tmp_path):
    peft = pytest.importorskip("peft")

    def make():
        model = model_of()
        torch.manual_seed(6)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        for adapter in model.get_base_model().reft.adapters.values():
            with pytest.raises(ValueError, match="'a' is to train, but somebody froze"):
                trainer_of(model, tmp_path).train()
            adapter.trainable = True
        return model

    def state(model):
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    whole, first, resumed = make(), make(), make()
    trainer_of(whole, tmp_path / "whole").train()
    trainer_of(first, tmp_path / "run", save_strategy="steps", save_steps=3).train()
    trainer_of(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert any("lora" in name for name in state(whole)) and any("reft" in name for name in state(whole))
    same(state(resumed), state(whole))
    assert (tmp_path / "run/checkpoint-3/adapter_model.safetensors").exists()


def test_columns_reach_the_model_without_remove_unused_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**Rows()[i], "prompt_lengths": 2, "adapter_names": "a", "comment": "dropped"} for i in range(4)]
    trainer = trainer_of(model_of(), tmp_path, datasets.Dataset.from_list(rows))
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "prompt_lengths", "adapter_names"}
    assert batch["adapter_names"] == ["a"] * 4 and batch["prompt_lengths"].tolist() == [2] * 4


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator(side):
    collate = rk.ReftCollator(pad_token_id=0, padding_side=side)
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, -100]}]
    )
    assert batch["prompt_lengths"].tolist() == [1, 2]
    assert batch["input_ids"].tolist()[1] == ([8, 9, 0] if side == "right" else [0, 8, 9])
    assert batch["attention_mask"].tolist()[1] == ([1, 1, 0] if side == "right" else [0, 1, 1])
    assert batch["labels"].tolist()[1] == [-100] * 3
    with torch.no_grad():
        model_of()(**batch)
    assert collate([{"input_ids": [5], "labels": 2}])["labels"].tolist() == [2]
    assert "prompt_lengths" not in collate([{"input_ids": [5]}])
    types = collate(
        [{"input_ids": [5, 6], "token_type_ids": [0, 1]}, {"input_ids": [5], "token_type_ids": [1]}]
    )
    assert types["token_type_ids"].tolist() == [[0, 1], [1, 0] if side == "right" else [0, 1]]


def test_collator_refuses():
    collate = rk.ReftCollator()
    for rows, words in [
        ([{"input_ids": [5, 6], "labels": [5, 6]}], "row 0 .*no prompt"),
        ([{"input_ids": [5, 6]}, {"input_ids": [5]}], "pad_token_id"),
        ([{"input_ids": [5], "labels": [-100]}, {"input_ids": [5]}], "rows 0 and 1 .*labels"),
        ([{"input_ids": [5, 6], "labels": [6]}], "labels: row 0 has 1 entries for 2"),
        ([{"labels": [6]}], "input_ids"),
        ([], "empty"),
        ([[5, 6]], "features: row 0 must be a mapping"),
        ([{"input_ids": [5]}, {"input_ids": "ab"}], "input_ids: row 1 must be a list of integers, was 'ab'"),
        ([{"input_ids": [[5, 6]]}], "input_ids: row 0 must"),
        ([{"input_ids": []}], "input_ids: row 0 must"),
        ([{"input_ids": [5.5]}], "input_ids: row 0 must"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], "attention_mask: row 0 has 1 entries for 2"),
        ([{"input_ids": [5], "labels": 1}, {"input_ids": [5], "labels": [1]}], "labels: rows 0 and 1 differ"),
        ([{"input_ids": [5, 6], "prompt_lengths": 3}], "prompt_lengths: row 0 has 2 tokens.*was 3"),
        ([{"input_ids": [5, 6], "prompt_lengths": -1}], "prompt_lengths: row 0 .*was -1"),
        ([{"input_ids": [5, 6], "prompt_lengths": 1.5}], "prompt_lengths: must be an integer a row"),
        ([{"input_ids": [5, 6], "comment": "x"}], "comment: must be numbers"),
    ]:
        with pytest.raises(ValueError, match=words):
            collate(rows)
    with pytest.raises(ValueError, match="padding_side"):
        rk.ReftCollator(padding_side="up")
    with pytest.raises(ValueError, match="pad_token_id"):
        rk.ReftCollator(pad_token_id="<pad>")


def test_what_would_train_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not patched"):
        trainer_of(make_model(), tmp_path)
    model = model_of()
    trainer = trainer_of(model, tmp_path)
    model.reft.set_adapter(None)
    with pytest.raises(RuntimeError, match="active adapter is None"):
        trainer.train()
    model.reft.set_adapter("a")
    with model.reft.disable_adapter(), pytest.raises(RuntimeError, match="active adapter is None"):
        trainer.train()
    model.reft.delete_adapter("a")
    with pytest.raises(ValueError, match="none of its adapters .none. trains"):
        trainer.train()
    model = model_of()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="lm_head.weight requires a gradient.*modules_to_save"):
        trainer_of(model, tmp_path).train()


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    model = model_of()
    trainer_of(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = str(tmp_path / "checkpoint-1")
    for config, word in [
        ({"r": 3}, "rank 2"),
        ({"positions": "f2+l1"}, "positions f1"),
        ({"layers": [1]}, "6 inter"),
    ]:
        other = model_of(**config)
        before = parameters(other)
        with pytest.raises(CheckpointError, match=f"{word}.*another config"):
            trainer_of(other, tmp_path).train(resume_from_checkpoint=folder)
        same(parameters(other), before)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        trainer_of(model_of(("a", "b")), tmp_path).train(resume_from_checkpoint=folder)
    model.reft.save_pretrained(tmp_path / "final/checkpoint-1", "a")
    state = Path(folder) / "trainer_state.json"
    (tmp_path / "final/checkpoint-1/trainer_state.json").write_text(state.read_text())
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "final/checkpoint-1"))


def test_a_save_that_fails_half_way_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    from safetensors import torch as safetensors

    model = model_of()
    trainer = trainer_of(model, tmp_path)
    trainer.save_model(str(tmp_path / "a"))
    names = ("reft_config.json", "reft_model.safetensors")
    before = [(tmp_path / "a" / name).read_bytes() for name in names]
    trainer.train()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    def fail_once_at_the_second(*paths, calls=[], replace=os.replace):  # noqa: B006
        calls.append(paths)
        if len(calls) == 2:
            fail()
        replace(*paths)

    files = set((tmp_path / "a").iterdir())
    for name, function in (("fsync", fail), ("replace", fail_once_at_the_second)):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, function)
            with pytest.raises(OSError, match="No space"):
                trainer.save_model(str(tmp_path / "a"))
        assert [(tmp_path / "a" / name).read_bytes() for name in names] == before
        assert set((tmp_path / "a").iterdir()) == files
    trainer.save_model(str(tmp_path / "a"))
    saved = safetensors.load_file(tmp_path / "a/reft_model.safetensors")
    assert torch.equal(saved["interventions.0.R"], model.reft.adapters["a"].interventions[0].R)
    assert json.loads((tmp_path / "a/reft_config.json").read_text())["raw"] is True
