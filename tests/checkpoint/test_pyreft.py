"""Folders that the live pyreft saves: read to the same function, and refused where that can't be."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reft_kernels.adapter import Adapter, convert
from reft_kernels.adapter.config import ReftConfig
from reft_kernels.adapter.methods import METHODS
from reft_kernels.checkpoint import CheckpointError
from reft_kernels.checkpoint.pyreft import _CLASSES
from reft_kernels.ops.reference import activate
from reft_kernels.ops.schema import NO_PRODUCT
from reft_kernels.positions import Positions

pyreft = pytest.importorskip(
    "pyreft", reason="pyreft, the reference library, can't be imported here", exc_type=ImportError
)
pytestmark = pytest.mark.models

D, R, LAYERS = 32, 4, 4
load = Adapter.from_pretrained
CLASSES = ("Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft")
WITH_ACT = ("Loreft", "Noreft", "Direft", "Nodireft")


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,
    )
    return LlamaForCausalLM(config)


def intervention(cls: str, *, rank: int = R, add_bias: bool = True, dtype=torch.float32, **more):
    """An intervention of pyreft's as after training: every parameter has moved."""
    made = getattr(pyreft.interventions, f"{cls}Intervention")(
        embed_dim=D, low_rank_dimension=rank, dtype=dtype, add_bias=add_bias, **more
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("original"):
                # Only what lies below the diagonal; the signs on it get no gradient.
                parameter += 0.1 * torch.randn_like(parameter).tril(-1)
            else:
                parameter += 0.3 * torch.randn_like(parameter)
    return made


def saved(model, folder: Path, interventions: dict | list, **more) -> Path:
    """Saves (place, intervention) pairs through pyreft: a place is a layer at block_output, or a path."""
    representations = []
    for place, one in interventions:
        where = (
            {"component": place} if isinstance(place, str) else {"layer": place, "component": "block_output"}
        )
        representations.append({**where, "low_rank_dimension": R, "intervention": one})
    wrapped = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    wrapped.save(str(folder), **more)
    return folder


def folded(adapter: Adapter, index: int, h: Tensor) -> Tensor:
    fold = adapter.interventions[index].fold()
    h = h.double()
    z = h @ fold.down.double().T + fold.bias.double()
    z = torch.where((fold.kind & NO_PRODUCT) != 0, fold.bias.double(), z)
    return (h + activate(z, fold.kind) @ fold.up.double()).float()


def same_function(adapter: Adapter, index: int, theirs) -> None:
    h = torch.randn(6, D)
    with torch.no_grad():
        torch.testing.assert_close(folded(adapter, index, h), theirs.eval()(h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("add_bias", [True, False])
@pytest.mark.parametrize(
    ("cls", "act_fn"),
    [(cls, None) for cls in CLASSES] + [(cls, act) for cls in WITH_ACT for act in ("relu", "gelu_new")],
)
def test_each_class_is_read_to_its_function(model, tmp_path, cls: str, act_fn, add_bias: bool) -> None:
    theirs = intervention(cls, add_bias=add_bias, act_fn=act_fn)
    adapter = load(saved(model, tmp_path / "a", [(2, theirs)]), positions="all", act_fn=act_fn)
    one = adapter.interventions[0]
    assert (one.method, one.layer, one.site) == (cls.lower(), 2, "block_output")
    assert (one.rank, one.width, one.act_fn) == (R, D, act_fn)
    same_function(adapter, 0, theirs)


def test_the_table_of_classes_agrees_with_the_methods() -> None:
    for one in _CLASSES.values():
        method = METHODS[one.method]
        assert one.takes_act_fn == method.takes_activation
        assert {*one.parameters, *one.optional} == set(method.shapes)
        assert method.shapes[next(iter(one.parameters))] == "rd"


@pytest.mark.parametrize("cls", CLASSES)
def test_conversion_is_lossless(model, tmp_path, cls: str) -> None:
    folder = saved(model, tmp_path / "a", [(0, intervention(cls)), (3, intervention(cls))])
    before = convert(folder, tmp_path / "b", positions="f2", last_position="length-1", dropout=0.05)
    after = load(tmp_path / "b")
    assert {name: t.tolist() for name, t in before.state_dict().items()} == {
        name: t.tolist() for name, t in after.state_dict().items()
    }
    assert (
        after.config
        == before.config
        == ReftConfig(
            method=cls.lower(), r=R, layers=[0, 3], positions="f2", dropout=0.05, last_position="length-1"
        )
    )


def test_stored_dtypes_stay(model, tmp_path) -> None:
    """W and b in bfloat16 beside an R in float32 is what pyreft does unless told otherwise."""
    theirs = intervention("Loreft", dtype=torch.bfloat16)
    one = load(saved(model, tmp_path / "a", [(0, theirs)]), positions="l1").interventions[0]
    assert (one.R.dtype, one.W.dtype, one.b.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert torch.equal(one.W, theirs.learned_source.weight)
    assert torch.equal(one.R, theirs.rotate_layer.weight.T)


@pytest.mark.parametrize("cls", ["Consreft", "Lobireft", "Direft"])
def test_the_rotation_is_rebuilt_to_the_bit(model, tmp_path, cls: str) -> None:
    theirs = intervention(cls)
    one = load(saved(model, tmp_path / "a", [(0, theirs)]), positions="all").interventions[0]
    torch.testing.assert_close(one.R, theirs.rotate_layer.weight.T, rtol=0, atol=1e-7)


def test_a_square_rotation_is_a_matrix_exponential(model, tmp_path) -> None:
    theirs = intervention("Direft", rank=D)
    adapter = load(saved(model, tmp_path / "a", [(0, theirs)]), positions="all")
    same_function(adapter, 0, theirs)


def test_a_sign_that_weight_decay_shrank_counts_as_zero(model, tmp_path) -> None:
    theirs = intervention("Direft")
    with torch.no_grad():
        theirs.rotate_layer.parametrizations.weight.original.diagonal()[1] *= 0.999
    adapter = load(saved(model, tmp_path / "a", [(0, theirs)]), positions="all")
    assert not theirs.rotate_layer.weight[:, 1].any()
    same_function(adapter, 0, theirs)


def test_a_loreft_that_lost_orthonormality_keeps_its_function(model, tmp_path) -> None:
    theirs = intervention("Loreft")
    theirs.rotate_layer.parametrizations.weight[0].base.mul_(1.3)
    adapter = load(saved(model, tmp_path / "a", [(0, theirs)]), positions="all")
    same_function(adapter, 0, theirs)
    with pytest.warns(UserWarning, match="not orthonormal"):
        adapter.trainable = True


def test_untied_interventions_take_f_and_l(model, tmp_path) -> None:
    places = [1, 3, 1, 3]
    theirs = [intervention("Loreft") for _ in places]
    folder = saved(model, tmp_path / "a", list(zip(places, theirs)))
    adapter = load(folder, positions="f3+l2", last_position="length-1")
    first, last = Positions.parse("f3", "length-1"), Positions.parse("l2", "length-1")
    assert [(i.layer, i.positions) for i in adapter.interventions] == [
        (1, first),
        (3, first),
        (1, last),
        (3, last),
    ]
    assert adapter.groups == (first, last)
    assert adapter.config == ReftConfig(r=R, layers=[1, 3], positions="f3+l2", last_position="length-1")
    for index, one in enumerate(theirs):
        same_function(adapter, index, one)


def test_tied_interventions_take_both(model, tmp_path) -> None:
    adapter = load(saved(model, tmp_path / "a", [(1, intervention("Loreft"))]), positions="f3+l2")
    assert adapter.groups == (Positions(first=3, last=2),)
    assert adapter.config.share_weights


def test_untied_interventions_need_both_positions(model, tmp_path) -> None:
    folder = saved(model, tmp_path / "a", [(1, intervention("Loreft")), (1, intervention("Loreft"))])
    with pytest.raises(CheckpointError, match=r"^positions: .*f3\+l3.*was .f5"):
        load(folder, positions="f5")


@pytest.mark.parametrize("layers", [[1, 1, 1], [1, 1, 2]])
def test_other_numbers_of_interventions_are_refused(model, tmp_path, layers: list[int]) -> None:
    folder = saved(model, tmp_path / "a", [(layer, intervention("Loreft")) for layer in layers])
    with pytest.raises(CheckpointError, match="interventions at a layer"):
        load(folder, positions="f3+l3")


@pytest.mark.parametrize(
    ("component", "layer", "site"),
    [
        ("model.layers[2].output", 2, "block_output"),
        ("model.layers.2.output", 2, "block_output"),
        ("model.layers[1].input", 1, "block_input"),
        ("model.layers[3].mlp.output", 3, "mlp_output"),
        ("model.layers[0].self_attn.output", 0, "attention_output"),
        ("model.layers[1].self_attn.o_proj.input", 1, "*.self_attn.o_proj.input"),
    ],
)
def test_components_given_as_paths(model, tmp_path, component: str, layer: int, site: str) -> None:
    theirs = intervention("Consreft")
    adapter = load(saved(model, tmp_path / "a", [(component, theirs)]), positions="all")
    assert [(i.layer, i.site) for i in adapter.interventions] == [(layer, site)]
    same_function(adapter, 0, theirs)


def rewrite(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("component", "stem", "layer"),
    [
        ("roberta.encoder.layer[11].output", "roberta_encoder_layer[11]_output", 11),
        ("transformer.h[3].output", "transformer_h[3]_output", 3),
        ("base_model.model.model.layers[5].output", "base_model_model_model_layers[5]_output", 5),
    ],
)
def test_paths_of_other_families(model, tmp_path, component: str, stem: str, layer: int) -> None:
    """Saved from a Llama and renamed by pyvene's rule, as the files are all that a reader sees."""
    folder = saved(model, tmp_path / "a", [(0, intervention("Loreft"))])
    rewrite(folder, lambda c: c["representations"][0].__setitem__(1, component))
    (file,) = folder.glob("intkey_*.bin")
    file.rename(folder / f"intkey_comp_{stem}_unit_pos_nunit_1#0.bin")
    assert load(folder, positions="l1").interventions[0].layer == layer


@pytest.fixture
def folder(model, tmp_path) -> Path:
    return saved(model, tmp_path / "a", [(1, intervention("Loreft"))])


def test_a_models_weights_beside_it_are_not_read(model, tmp_path) -> None:
    model.lm_head.weight.requires_grad_(True)
    folder = saved(model, tmp_path / "a", [(1, intervention("Loreft"))], include_model=True)
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    load(folder, positions="all")


def test_positions_are_asked_for(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="^positions: needed.*does not store"):
        load(folder)


def test_bad_arguments_are_named(folder: Path, model, tmp_path) -> None:
    for name, value in (("act_fn", "mish"), ("dropout", 1.5), ("last_position", "end"), ("positions", "q")):
        with pytest.raises(ValueError, match=name):
            load(folder, **({"positions": "all"} | {name: value}))
    cons = saved(model, tmp_path / "cons", [(1, intervention("Consreft"))])
    with pytest.raises(CheckpointError, match="act_fn: consreft takes none, was 'relu'"):
        load(cons, positions="all", act_fn="relu")


def represent(index: int, value):
    return lambda c: c["representations"][0].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (represent(1, "cell_input"), ("cell_input", "block_output")),
        (represent(1, "head_attention_value_output"), ("head_attention_value_output", "block_output")),
        (represent(1, "encoder.block[1].layer[0].output"), ("encoder.block[1].layer[0].output",)),
        (represent(1, "model.layers[1].self_attn.q_proj.weight"), ("q_proj",)),
        (represent(1, 3), ("component", "3")),
        (represent(0, "1"), ("layer", "'1'")),
        (represent(0, 2), ("intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin", "missing")),
        (represent(2, "h.pos"), ("h.pos",)),
        (represent(3, 2), ("2 units",)),
        (lambda c: c["representations"].__setitem__(0, [1]), ("representations[0]",)),
        (lambda c: c["representations"].append([]), ("intervention_types",)),
        (lambda c: c.update(representations=[], intervention_types=[]), ("at least one",)),
        (lambda c: c.pop("representations"), ("representations",)),
        (lambda c: c.update(representations=1), ("representations", "1")),
        (
            lambda c: c.update(
                intervention_types=["<class 'pyvene.models.interventions.VanillaIntervention'>"]
            ),
            ("VanillaIntervention", "LoreftIntervention"),
        ),
        (
            lambda c: c.update(intervention_types=["<class 'pyreft.interventions.DireftIntervention'>"]),
            ("intkey_", "rotate_layer.parametrizations.weight.original", "missing", "direft"),
        ),
    ],
)
def test_an_unsupported_config_is_named(folder: Path, change, words: tuple[str, ...]) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load(folder, positions="all")
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_a_trainers_checkpoint_says_what_to_do(folder: Path, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "checkpoint-9" / "intervenable_model")
    (tmp_path / "checkpoint-9" / "intervenable_model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="holds no adapter.*intervenable_model"):
        load(tmp_path / "checkpoint-9", positions="all")
    with pytest.raises(CheckpointError, match="no config.json.*copy the config.json"):
        load(tmp_path / "checkpoint-9" / "intervenable_model", positions="all")


class Hostile:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_before_it_does(folder: Path, tmp_path, zipped: bool) -> None:
    (file,) = folder.glob("intkey_*.bin")
    state = torch.load(file, weights_only=True) | {"bias": Hostile(tmp_path / "ran")}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="intkey_.*could run code"):
        load(folder, positions="all")
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps([1], 2), b"\x80\x02K\x01.", bytes(99)])
def test_damaged_files_are_refused(folder: Path, content: bytes) -> None:
    (file,) = folder.glob("intkey_*.bin")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="intkey_"):
        load(folder, positions="all")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(folder: Path, keep: float) -> None:
    (file,) = folder.glob("intkey_*.bin")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(CheckpointError, match="intkey_"):
        load(folder, positions="all")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("rotate_layer"), ("rotate_layer", "missing")),
        (lambda s: s.update(more=torch.zeros(1)), ("more",)),
        (lambda s: s.update(weight=torch.zeros(R, D - 1)), ("W:", f"[{R}, {D - 1}]")),
        (lambda s: s.update(weight=torch.zeros(R, D).long()), ("W:", "int64")),
        (lambda s: s.update(weight=[1.0]), ("dict of tensors",)),
        (lambda s: s.update(rotate_layer=torch.zeros(R)), ("R: must be [r, d], was [4]",)),
        (lambda s: s.update(rotate_layer=torch.tensor(1.0)), ("R: must be [r, d], was []",)),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change, words: tuple[str, ...]) -> None:
    (file,) = folder.glob("intkey_*.bin")
    state = dict(torch.load(file, weights_only=True))
    change(state)
    torch.save(state, file)
    with pytest.raises(CheckpointError) as caught:
        load(folder, positions="all")
    for word in (str(file), *words):
        assert word in str(caught.value)


def test_a_rotation_of_the_wrong_shape_is_named(model, tmp_path) -> None:
    folder = saved(model, tmp_path / "a", [(0, intervention("Consreft"))])
    (file,) = folder.glob("intkey_*.bin")
    state = dict(torch.load(file, weights_only=True))
    state["rotate_layer.parametrizations.weight.0.base"] = torch.zeros(D, D - 1)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"base \[d, d\], were"):
        load(folder, positions="all")


def test_values_that_are_not_finite_warn(folder: Path) -> None:
    (file,) = folder.glob("intkey_*.bin")
    state = dict(torch.load(file, weights_only=True))
    state["weight"][1, 2] = float("nan")
    torch.save(state, file)
    with pytest.warns(UserWarning, match="intkey_.*'weight' holds NaN"):
        load(folder, positions="all")


def test_float8_is_refused_by_name(folder: Path) -> None:
    (file,) = folder.glob("intkey_*.bin")
    state = dict(torch.load(file, weights_only=True))
    state["weight"] = state["weight"].to(torch.float8_e4m3fn)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="intkey_.*'weight' is torch.float8_e4m3fn; an adapter's"):
        load(folder, positions="all")


def test_a_folder_of_pyreft_folders_names_them(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "several" / "mine")
    with pytest.raises(CheckpointError, match="holds no adapter.*; these do: .*several/mine$"):
        load(tmp_path / "several", positions="all")
