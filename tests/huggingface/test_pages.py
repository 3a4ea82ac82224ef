"""The README's and the pages' code runs as it stands there, on models of random weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from support.adapters import random_adapter
from support.models import VOCABULARY, batch_of, make_model

import reft_kernels as rk

pytestmark = pytest.mark.models
ROOT = Path(__file__).resolve().parents[2]
WIDTH = 32


def block(page: str, begin: str, kind: str = "python") -> str:
    """The page's block that contains these words."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    (found,) = [code for code in blocks if begin in code]
    return found


def save(folder: Path, name: str, seed: int = 0, **config) -> None:
    random_adapter(rk.ReftConfig(r=2, **config), WIDTH, seed=seed).save_pretrained(folder / name)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pyreft_folder(folder: Path) -> None:
    pyreft = pytest.importorskip("pyreft", exc_type=ImportError)
    one = pyreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2, dtype=torch.float32)
    part = {"component": "model.layers[1].output", "low_rank_dimension": 2, "intervention": one}
    config = pyreft.ReftConfig(representations=[part])
    pyreft.get_reft_model(make_model(), config, set_device=False).save(str(folder / "pyreft_dir"))


def test_in_ten_lines(folder):
    save(folder, "my_adapter", positions="all")
    pyreft_folder(folder)
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    code = block("README.md", "rk.patch(model)                                    # any supported")
    names = {"model": model, "batch": {**batch_of([6, 5, 4]), "max_new_tokens": 2}}
    parts = code.replace("    model(**batch)", "    model(input_ids=batch['input_ids'])")
    exec(parts, names)
    assert not hasattr(model, "reft")
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_one_of_each():
    model = make_model(gain=1.0)
    h, source, R = torch.randn(5, WIDTH), torch.randn(5, WIDTH), torch.linalg.qr(torch.randn(WIDTH, 3))[0].T
    names = {"rk": rk, "reft": rk.patch(model), "model": model, "v": torch.ones(WIDTH)}
    names |= {"batch": {**batch_of([6, 5]), "max_new_tokens": 2}, "h": h, "source": source, "R": R}
    exec(block("README.md", "rk.functional.interchange"), names)
    reft = names["reft"]
    assert list(reft) == ["mine", "calm", "style"]
    torch.testing.assert_close(names["swapped"], h + (source - h) @ R.T @ R)
    assert len(names["both"].interventions) == 2
    again, mask = batch_of([6, 5]), batch_of([6, 5])["attention_mask"].bool()
    with torch.no_grad():
        found = model(**again, adapter_names=["__base__"] * 2).logits[mask]  # "calm" is in the weights
        reft.unmerge_adapter()
        wanted = model(**again, adapter_names=["calm"] * 2).logits[mask]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_modules_by_their_paths():
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
    )
    model = tf.LlamaForCausalLM(config).eval()
    reft = rk.patch(model)
    lines = block("docs/sites.md", "model.norm.output").splitlines()
    for number, line in enumerate(lines):
        one = reft.add_adapter(str(number), eval(line, {"rk": rk}))
        with torch.no_grad():
            one.trainable = False
            for intervention in one.interventions:
                intervention.b += 1
            bare, edited = model(**batch_of([6, 6]), adapter_names=["__base__", str(number)]).logits
        assert not torch.equal(bare, edited) and len(lines) == 3


def test_lists_in_the_call(folder):
    model = make_model()
    reft = rk.patch(model)
    for seed, name in enumerate(("math", "tone")):
        save(folder, name, seed, positions="all")
        reft.load_adapter(name, name)
    names = {"model": model, "batch": {**batch_of([6, 5, 4]), "max_new_tokens": 2}}
    exec("out = " + block("docs/positions.md", "reft_positions", "py"), names)
    assert names["out"].shape == (3, 8)


def test_turns(folder):
    model = make_model()
    save(folder, "a", positions="f2+l2", share_weights=True)
    rk.patch(model).load_adapter("a", "a")
    first = batch_of([6])
    names = {"model": model, "first_length": 6, "turn_one": {**first, "max_new_tokens": 3}}
    one, two = block("docs/turns.md", "one = model").strip().splitlines()
    exec(one, names)
    whole = torch.cat([names["one"].sequences, batch_of([4], seed=2)["input_ids"]], 1)
    said = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "max_new_tokens": 3}
    names["turn_two"] = said
    with pytest.warns(UserWarning, match="past_key_values"):
        exec(two, names)
    assert names["two"].shape[1] == whole.shape[1] + 3
    exec(one + "\n" + block("docs/turns.md", "first_length"), names)
    apart = model.generate(**said, adapter_names=["a"], prompt_lengths=[6])
    assert torch.equal(names["two"], apart)
