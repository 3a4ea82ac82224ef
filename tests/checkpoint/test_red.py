"""Files that RED's code writes: the same function as its wrapped layers, and what is refused."""

from __future__ import annotations

import pytest
import torch
from support.models import batch_of, make_model
from support.site_oracle import MODELS
from torch import nn

import reft_kernels as rk
from reft_kernels.checkpoint import CheckpointError

pytestmark = pytest.mark.models
#: Family → the layers that RED edits there, by their paths' ends, and the prefix that its files leave out.
FAMILIES = {
    "llama": (("mlp.down_proj",), ""),
    "gpt2": (("mlp.c_proj", "attn.c_proj"), ""),
    "bert": (("output.dense", "attention.self.query"), "bert."),
}


class Activation(nn.Module):
    """A linear layer whose output is scaled and shifted, with the names that RED's code gives the tensors."""

    def __init__(self, layer: nn.Module, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.update_layer = layer
        width = getattr(layer, "nf", None) or layer.out_features
        drawn = {"activation_scaling": 1 + 0.5 * torch.randn(1, width)} | {
            "activation_bias": 0.5 * torch.randn(1, width)
        }
        self.delta_vector = nn.ParameterDict({kind: nn.Parameter(drawn[kind]) for kind in kinds})

    def forward(self, x):
        out = self.update_layer(x)
        if "activation_scaling" in self.delta_vector:
            out = out * self.delta_vector["activation_scaling"]
        if "activation_bias" in self.delta_vector:
            out = out + self.delta_vector["activation_bias"]
        return out


def wrapped(family: str, kinds=("activation_scaling", "activation_bias")):
    """A model with RED's edits, and what its code would save of it."""
    model = make_model(family, families=MODELS, gain=1.0)
    ends, prefix = FAMILIES[family]
    for path, module in list(model.named_modules()):
        mine = [end for end in ends if path.endswith(f".{end}") and "attention.output" not in path]
        if mine:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Activation(module, kinds))
    state = {key.removeprefix(prefix): t for key, t in model.state_dict().items() if "activation_" in key}
    assert len(state) == 3 * len(ends) * len(kinds)
    return model.double(), state


def saved(folder, state):
    torch.save(state, folder / "delta_vector.pth")
    return folder


@torch.no_grad()
def logits(model, **call):
    with rk.backend("reference"):
        return model(**batch_of([6, 6]), **call).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_function_that_was_trained(tmp_path, family):
    theirs, state = wrapped(family)
    model = make_model(family, families=MODELS, gain=1.0).double()
    adapter = rk.patch(model).load_adapter(saved(tmp_path, state), positions="all")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(model), logits(model, adapter_names=["__base__"] * 2), atol=1e-3)
    stored = {key: t for one in adapter.interventions for key, t in one.named_parameters()}
    assert stored["scaling"].dtype is torch.float32 and set(stored) == {"scaling", "bias"}
    if family == "llama":
        model.reft.merge_adapter()
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["activation_scaling", "activation_bias"])
def test_scalings_or_biases_alone(tmp_path, kind):
    theirs, state = wrapped("llama", (kind,))
    model = make_model("llama", gain=1.0).double()
    rk.patch(model).load_adapter(saved(tmp_path, state), positions="all")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-6, atol=1e-6)


def test_it_becomes_a_native_folder(tmp_path):
    _, state = wrapped("llama")
    state = {key: tensor.bfloat16() for key, tensor in state.items()}
    adapter = rk.Adapter.from_pretrained(saved(tmp_path, state), positions="all")
    adapter.save_pretrained(tmp_path / "native")
    again = rk.Adapter.from_pretrained(tmp_path / "native")
    for one, other in zip(adapter.interventions, again.interventions):
        assert (one.method, one.site, one.layer) == (other.method, other.site, other.layer)
        assert torch.equal(one.scaling, other.scaling) and one.scaling.dtype is torch.bfloat16


def renamed(state, old: str, new: str):
    return {key.replace(old, new): tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (None, {"positions": None}, ("positions", "delta_vector.pth", 'positions="all"')),
        (None, {"act_fn": "relu"}, ("act_fn", "RED", "relu")),
        (None, {"last_position": "length"}, ("last_position", "RED")),
        (lambda s: renamed(s, "activation_bias", "activation_ln"), {}, ("activation_ln", "not supported")),
        (lambda s: renamed(s, ".delta_vector", ""), {}, ("is no key of RED's",)),
        (lambda s: renamed(s, "model.layers.0", "decoder"), {}, ("decoder.mlp.down_proj", "numbered layer")),
        (
            lambda s: renamed(s, "model.layers.0.mlp.down_proj", "encoder.block.0.layer.1.wo"),
            {},
            ("encoder.block.0.layer.1.wo", "encoder-decoder"),
        ),
        (lambda s: {k: t[0] for k, t in s.items()}, {}, ("[1, d]", "down_proj")),
        (lambda s: {}, {}, ("holds no edit",)),
        (lambda s: [s], {}, ("must hold a dict of tensors",)),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, options, words):
    _, state = wrapped("llama")
    folder = saved(tmp_path, state if change is None else change(state))
    with pytest.raises(CheckpointError) as caught:
        rk.Adapter.from_pretrained(folder, **{"positions": "all", **options})
    assert all(word in str(caught.value) for word in words), caught.value


def test_code_in_the_file_is_not_run(tmp_path):
    (tmp_path / "delta_vector.pth").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="could run code"):
        rk.Adapter.from_pretrained(tmp_path, positions="all")
