"""The model that an adapter is for: kept in its folder, and compared where it is loaded."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import transformers as tf
from support.models import FAMILIES, make_model
from torch import nn

import reft_kernels as rk
from reft_kernels.adapter import BaseModel
from reft_kernels.huggingface.base_model import base_model
from reft_kernels.training import checkpoints

pytestmark = pytest.mark.models

CONFIG = rk.ReftConfig(r=2, layers=[0], positions="l1")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


class Bare(nn.Module):
    """All that a fingerprint needs of a model."""

    def __init__(self, config: tf.PretrainedConfig) -> None:
        super().__init__()
        self.config = config


def llama(**fields: object) -> BaseModel:
    return base_model(Bare(tf.LlamaConfig(**SHAPE | fields)))


# Written down, so that every version of transformers that runs this must come to the same.
FINGERPRINTS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"), "1-319f3b21f5579608"),
    "gpt2": "1-793365dce1cd179c",
    "gpt_neox": "1-790a7096000d4c3f",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprints_do_not_depend_on_the_version_of_transformers(family: str) -> None:
    assert base_model(make_model(family)).fingerprint == FINGERPRINTS[family]


@pytest.mark.parametrize(
    ("make", "fingerprint"),
    [
        (tf.BertConfig, "1-0208251fdecd7bc7"),
        (tf.MixtralConfig, "1-f74efe2577e6f6b2"),
        (tf.Qwen3MoeConfig, "1-9aca803bc51ee3cc"),
        (tf.Gemma3TextConfig, "1-6765b8c3488b269e"),
        (tf.LlavaConfig, "1-abf2ff272b43f34a"),
    ],
)
def test_of_configs_with_experts_several_embeddings_or_parts(make, fingerprint: str) -> None:
    assert base_model(Bare(make())).fingerprint == fingerprint


@pytest.mark.parametrize("change", [{name: SHAPE[name] * 2} for name in SHAPE] + [{"rope_theta": 5e5}])
def test_a_model_of_another_shape_has_another_fingerprint(change: dict) -> None:
    if "rope_theta" in change and tf.__version__ >= "5":
        change = {"rope_parameters": {"rope_type": "default", **change}}
    assert llama(**change).fingerprint != llama().fingerprint
    assert not llama(**change).matches(llama())


def test_what_is_set_when_loading_does_not_count() -> None:
    config = tf.LlamaConfig(**SHAPE, use_cache=False, num_labels=7, pad_token_id=3)
    config._name_or_path = "somewhere/else"
    config._attn_implementation = "eager"
    config.dtype, config.transformers_version = "bfloat16", "4.0"
    other = base_model(Bare(config))
    assert other.matches(llama()) and other != llama() and other.name == "somewhere/else"


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_files_of_both_versions_of_transformers_agree(tmp_path: Path, rope: dict) -> None:
    """transformers 4 writes rope_theta, 5 rope_parameters."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, **rope}))
    found = base_model(Bare(tf.AutoConfig.from_pretrained(tmp_path)))
    assert found.fingerprint == "1-a8b7181aa35b54a1"


def test_a_model_survives_saving(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    again = base_model(tf.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert again.matches(base_model(model)) and again.name == str(tmp_path)


def test_fields_that_differ_by_layer_are_passed_by() -> None:
    """transformers 5 has configs that raise errors of their own where a field has no single value."""

    class Config(tf.LlamaConfig):
        @property
        def max_position_embeddings(self) -> int:
            raise RuntimeError("differs from layer to layer")

        @max_position_embeddings.setter
        def max_position_embeddings(self, value: int) -> None:
            pass

    shape = {name: value for name, value in SHAPE.items() if name != "max_position_embeddings"}
    assert base_model(Bare(Config(**shape))).model_type == "llama"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make_model()
    model.config._name_or_path, model.config._commit_hash = "some-one/llama", "0123abcd"
    reft = rk.patch(model)
    reft.add_adapter("a", CONFIG)
    reft.save_pretrained(tmp_path / "a", "a")
    return tmp_path / "a"


def said(model: nn.Module, adapter: Path | rk.Adapter, **options: object) -> list[str]:
    """The warnings with which `model` takes an adapter."""
    reft = rk.patch(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(adapter, rk.Adapter):
            reft.add_adapter("a", adapter)
        else:
            reft.load_adapter(adapter, "a", **options)
    return [str(one.message) for one in caught]


def test_an_adapter_of_a_model_keeps_it(folder: Path) -> None:
    adapter = rk.Adapter.from_pretrained(folder)
    fingerprint = base_model(make_model()).fingerprint
    assert adapter.base == BaseModel("llama", fingerprint, "some-one/llama", "0123abcd")
    found = json.loads((folder / "reft_config.json").read_text())
    assert found["format_version"] == 1  # readers of before pass the key by
    assert set(found["base_model"]) == {"model_type", "fingerprint", "name", "revision"}
    assert adapter.select_subspace([0]).base == adapter.base
    assert rk.Adapter.from_config(CONFIG, 3, 32).base is None


def test_the_same_model_by_another_name_is_taken_without_a_word(folder: Path) -> None:
    model = make_model(seed=5)
    model.config._name_or_path = "some-one/llama-instruct"
    assert said(model, folder) == []


@pytest.mark.parametrize("added", [False, True])
def test_another_model_of_the_same_shape_is_named(folder: Path, added: bool) -> None:
    model = make_model("mistral")
    model.config._name_or_path = "some-one/mistral"
    (message,) = said(model, rk.Adapter.from_pretrained(folder) if added else folder)
    assert "adapter 'a'" in message and "'some-one/llama' at 0123abcd (type 'llama'" in message
    assert "this model is 'some-one/mistral' (type 'mistral'" in message


def test_the_same_type_of_another_shape_is_named(folder: Path) -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE | {"vocab_size": 61, "pad_token_id": 0}))
    (message,) = said(model, folder)
    assert "a model without a name (type 'llama'" in message


def test_a_folder_that_does_not_say_is_taken_without_a_word(folder: Path) -> None:
    file = folder / "reft_config.json"
    found = json.loads(file.read_text())
    del found["base_model"]
    file.write_text(json.dumps(found))
    assert said(make_model("mistral"), folder) == []
    assert rk.Adapter.from_pretrained(folder).base is None


def test_fingerprints_of_another_scheme_are_not_compared(folder: Path) -> None:
    file = folder / "reft_config.json"
    found = json.loads(file.read_text())
    found["base_model"]["fingerprint"] = "0-1234"
    file.write_text(json.dumps(found))
    assert said(make_model(), folder) == []
    assert len(said(make_model("mistral"), folder)) == 1


def test_what_trains_on_is_the_new_models(folder: Path) -> None:
    model = make_model("mistral")
    assert len(said(model, folder, is_trainable=True)) == 1
    assert model.reft.adapters["a"].base == base_model(model)
    model.reft.save_pretrained(folder, "a")
    assert said(make_model("mistral"), folder) == []


def test_a_training_that_goes_on_with_another_model_is_warned_of(tmp_path: Path) -> None:
    llama, mistral = (rk.patch(make_model(family)) for family in ("llama", "mistral"))
    for reft in (llama, mistral):
        reft.add_adapter("a", CONFIG)
    checkpoints.save(llama, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.restore(llama, tmp_path)
    with pytest.warns(UserWarning, match="was made for .*'llama'.*this model is .*'mistral'"):
        checkpoints.restore(mistral, tmp_path)


def test_compositions_keep_the_model_that_their_parts_share(folder: Path) -> None:
    one, other = rk.Adapter.from_pretrained(folder), rk.Adapter.from_pretrained(folder)
    assert rk.Adapter.compose([rk.Adapter.from_config(CONFIG, 3, 32), one, other]).base == one.base
    other.base = base_model(make_model("mistral"))
    with pytest.warns(UserWarning, match="adapters: were made for 'some-one/llama'.*type 'mistral'"):
        assert rk.Adapter.compose([one, other]).base is None
