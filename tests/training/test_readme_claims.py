"""The README's section on training, as it is written.

What it says of ReftTrainer is in test_trainer.py, of the plain Trainer in test_plain_trainer.py, of adapters
that don't train in test_slips.py, of heads in test_heads.py, of memory, autocast and torch.compile in
test_step.py, of DDP and FSDP2 in test_distributed.py, of PEFT in test_trainer.py; of rows without an adapter
and of reentrant checkpointing in patch/test_company.py; of the examples' programs in test_examples.py.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.models import batch_of, make_model

import reft_kernels as rk

pytestmark = pytest.mark.models
ROOT = Path(__file__).resolve().parents[2]
SECTION = re.search(r"^## Training\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S).group(1)
WORDS = " ".join(SECTION.split())


def batch() -> dict[str, torch.Tensor]:
    found = batch_of([6, 6])
    labels = found["input_ids"].clone()
    labels[:, :4] = -100
    return {**found, "labels": labels, "use_cache": False}


def loop(model, optimizer, steps: int = 8) -> tuple[float, float]:
    """The first loss and the last."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def base(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def unchanged(model, before) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_snippet(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    code = re.search(r"```python\n(.*?)```", SECTION, re.S).group(1)
    assert code.count('TrainingArguments("out", ...)') == 1
    code = code.replace('TrainingArguments("out", ...)', "arguments")
    monkeypatch.chdir(tmp_path)
    model = make_model(gain=1.0)
    before = base(model)
    arguments = TrainingArguments(
        "out", max_steps=4, save_steps=2, learning_rate=0.02, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": [5, 6, 7, 8, 9 + i], "labels": [-100, -100, -100, 8, 9 + i]} for i in range(8)]
    names = {"rk": rk, "model": model, "tokenizer": None, "rows": rows, "arguments": arguments}
    exec(compile(code, "README.md", "exec"), names | {"TrainingArguments": TrainingArguments})
    assert unchanged(model, before)  # "the base is frozen"
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith("reft"))
    assert {file.name for file in Path("final").iterdir()} == {"reft_config.json", "reft_model.safetensors"}
    checkpoint = {file.name for file in Path("out/checkpoint-4").iterdir()}
    assert "reft_model.safetensors" in checkpoint
    assert not checkpoint & {"model.safetensors", "pytorch_model.bin"}  # "hold the adapter only, too"
    again = make_model(gain=1.0)
    rk.patch(again).load_adapter("final", "mine")
    with torch.no_grad():
        want = model.eval()(**batch()).logits
        torch.testing.assert_close(again(**batch()).logits, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["added", "is_trainable=True", ".trainable = True"])
def test_a_loop_of_ones_own(how, tmp_path):
    model = make_model(gain=1.0).train()
    reft = rk.patch(model)
    before = base(model)
    adapter = reft.add_adapter("name", rk.ReftConfig(r=2, positions="f1+l1"))
    if how != "added":
        reft.save_pretrained(tmp_path, "name")
        reft.delete_adapter("name")
        rk.unpatch(model)
        reft = rk.patch(model)
        adapter = reft.load_adapter(tmp_path, "name", is_trainable=how == "is_trainable=True")
        if how == ".trainable = True":
            reft.adapters["name"].trainable = True
    assert adapter.trainable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, last = loop(model, torch.optim.AdamW(reft.parameters(), lr=0.05))
    assert last < first - 0.1
    assert unchanged(model, before)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("reft"))


def test_the_plain_trainers_checkpoints_hold_the_base_and_no_adapter(tmp_path):
    pytest.importorskip("accelerate")
    from safetensors import safe_open
    from transformers import Trainer, TrainingArguments

    model = make_model(gain=1.0)
    rk.patch(model).add_adapter("a", rk.ReftConfig(r=2))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 8
    Trainer(model, arguments, rk.ReftCollator(pad_token_id=0), train_dataset=rows).train()
    files = {file.name for file in (tmp_path / "checkpoint-1").iterdir()}
    assert "model.safetensors" in files and not any("reft" in name for name in files)
    with safe_open(tmp_path / "checkpoint-1/model.safetensors", "pt") as found:
        assert set(found.keys()) <= set(make_model().state_dict())


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "AdamW with weight decay": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_r_stays_orthonormal_with_any_optimizer_and_without_a_wide_buffer(name, tmp_path):
    """To 1e-6 through training, saving and loading."""
    model = make_model(gain=1.0).train()
    reft = rk.patch(model)
    reft.add_adapter("a", rk.ReftConfig(r=3, positions="f2+l2"))
    optimizer = OPTIMIZERS[name](list(reft.parameters()))
    loop(model, optimizer, 12)
    tensors = [*reft.parameters(), *reft.buffers(), *(p.grad for p in reft.parameters())]
    tensors += [
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
    ]
    assert len(tensors) > 10 and max(t.numel() for t in tensors) < 32 * 32
    reft.save_pretrained(tmp_path)
    for adapter in (reft.adapters["a"], rk.Adapter.from_pretrained(tmp_path)):
        for one in adapter.interventions:
            r = one.materialized()["R"].double()
            assert (r @ r.T - torch.eye(3)).abs().max() < 1e-6


@pytest.mark.parametrize("how", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("head", [False, True])
def test_gradient_checkpointing_as_one_turns_it_on(how, head):
    """The reentrant kind cuts off blocks of which no input wants a gradient: no loss has one then, or (with a
    head that trains) only the head's part of it."""

    def gradients(on: bool) -> list[torch.Tensor]:
        model = make_model(gain=1.0).train()
        torch.manual_seed(5)
        reft = rk.patch(model)
        config = rk.ReftConfig(r=2, positions="f1+l1", modules_to_save=["lm_head"] if head else None)
        reft.add_adapter("a", config)
        if on:
            model.gradient_checkpointing_enable(how)
        model(**batch()).loss.backward()
        return [p.grad for p in reft.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_reft_trainer_needs_the_extra_train():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(one.startswith("accelerate") for one in extras["train"])
    assert (
        "needs accelerate (the extra `train`)" in WORDS and "extra `examples`" in WORDS and extras["examples"]
    )


def test_the_numbers_of_the_examples_are_those_that_were_recorded():
    found = json.loads((ROOT / "examples/results/memorisation.json").read_text())
    by_length = found["bytes before the first error"]
    means = {kind: statistics.mean(who["trained edit"]) for kind, who in by_length["64"].items()}
    assert {len(who["trained edit"]) for who in by_length["64"].values()} == {6}
    others = [
        statistics.mean(counts)
        for kinds in by_length.values()
        for who in kinds.values()
        for name, counts in who.items()
        if name != "trained edit"
    ]
    known, unseen, shuffled = f"{means['known']:.0f}", f"{means['unseen']:.1f}", f"{means['shuffled']:.1f}"
    sentence = [
        f"of 64 bytes {known} come back before the first error where the model was trained on the text,",
        f"{unseen} of text it never saw, {shuffled} of shuffled bytes; of any text at most {max(others):.1f}",
        "from the bare model or from the same edit in a random direction (means of six;",
    ]
    assert " ".join(sentence) in WORDS
    found = json.loads((ROOT / "examples/results/pretrained_encoder.json").read_text())
    seeds = found["seeds"].values()
    mean = {
        who: statistics.mean(s[who]["accuracy"] for s in seeds) for who in ("linear probe", "LoRA", "LoReFT")
    }
    size = {who: next(iter(seeds))[who]["parameters"] for who in mean}
    assert len(seeds) == 3 and max(mean, key=mean.get) == "linear probe"
    assert len({tuple(sorted(mean, key=lambda who: s[who]["accuracy"])) for s in seeds}) > 1
    probe, lora, loreft = (f"{100 * mean[who]:.1f} % ({size[who]:,}" for who in mean)
    assert f"After {found['steps']} steps, three seeds, on files not trained on" in WORDS
    assert f"a linear probe gets {probe} parameters), LoRA {lora}), LoReFT {loreft})" in WORDS
