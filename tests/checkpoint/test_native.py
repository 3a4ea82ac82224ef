"""The native format: lossless, atomic, and clear about everything that is wrong with a file."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reft_kernels.adapter import Adapter, Intervention
from reft_kernels.adapter.config import ReftConfig
from reft_kernels.adapter.methods import METHODS
from reft_kernels.checkpoint import CheckpointError, native
from reft_kernels.ops.schema import NO_PRODUCT, Act
from reft_kernels.positions import Positions

D = 8
load = Adapter.from_pretrained


def fresh(seed: int = 0, **fields) -> Adapter:
    fields = {"layers": [0, 2], "r": 2} | fields
    adapter = Adapter.from_config(ReftConfig(**fields), 4, D, generator=torch.Generator().manual_seed(seed))
    adapter.trainable = False
    return adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fresh(act_fn="relu", dropout=0.1).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def same(a: Adapter, b: Adapter) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype is right[name].dtype
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name
    assert (a.config, a.n_layers, a.width, a.groups) == (b.config, b.n_layers, b.width, b.groups)
    for x, y in zip(a.interventions, b.interventions):
        for field in ("method", "layer", "site", "head", "positions", "act_fn", "dropout", "group"):
            assert getattr(x, field) == getattr(y, field)


@st.composite
def interventions(draw) -> list[Intervention]:
    """Interventions of any method and dtype at layers of their own, with raw bits as values."""
    made = []
    for layer in draw(st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True)):
        method = draw(st.sampled_from(list(METHODS)))
        spec, rank = METHODS[method], draw(st.integers(1, 3))
        tensors = {}
        for name in spec.shapes:
            if name in spec.optional:
                # The modes of concept say which of its own there are.
                wanted = spec.has(name, spec.resolve(None)) if method == "concept" else draw(st.booleans())
                if not wanted:
                    continue
            shape = spec.shape(name, rank, D)
            dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
            tensors[name] = torch.randn(shape, dtype=torch.float64).to(dtype)
            if name == "kind":
                codes = st.sampled_from([Act.NONE, Act.GELU, NO_PRODUCT, NO_PRODUCT | Act.SILU])
                tensors[name] = torch.tensor([draw(codes) for _ in range(rank)], dtype=torch.int32)
        act_fn = draw(st.sampled_from([None, "relu", "gelu_new"])) if spec.takes_activation else None
        spec_of_positions = draw(st.sampled_from(["f3", "l2", "f1+l1", "all", "generated", [0, -1]]))
        positions = Positions.parse(spec_of_positions, draw(st.sampled_from(["length", "length-1"])))
        places = [("block_output", None), ("head_attention_value_output", 3)]
        site, head = draw(st.sampled_from([at for at in places if at[0] in (spec.sites or (at[0],))]))
        dropout = draw(st.floats(0, 1, exclude_max=True))
        made.append(
            Intervention(method, layer, site, positions, tensors, act_fn=act_fn, dropout=dropout, head=head)
        )
    return made


@given(made=interventions(), depth=st.sampled_from([None, 41]))
def test_a_round_trip_keeps_every_bit(tmp_path_factory, made, depth) -> None:
    path = tmp_path_factory.mktemp("native")
    adapter = Adapter(made, n_layers=depth)
    adapter.save_pretrained(path)
    same(adapter, Adapter.from_pretrained(path))


def test_a_config_survives(folder: Path) -> None:
    again = load(folder)
    same(fresh(act_fn="relu", dropout=0.1), again)
    assert again.config is not None and not again.trainable


def test_a_scale_is_saved_and_takes_version_3(folder: Path, tmp_path: Path) -> None:
    plain, strong = load(folder), load(folder, scale=-2.5)
    for one, other in zip(plain.folds(), strong.folds()):
        assert torch.equal(other.up, -2.5 * one.up) and torch.equal(other.down, one.down)
    strong.save_pretrained(tmp_path / "strong")
    assert json.loads((tmp_path / "strong" / native.CONFIG).read_text())["format_version"] == 3
    assert json.loads((folder / native.CONFIG).read_text())["format_version"] == 1
    again = load(tmp_path / "strong")
    assert all(torch.equal(a, b) for x, y in zip(strong.folds(), again.folds()) for a, b in zip(x, y))
    part = again.select_subspace([1])
    assert torch.equal(part.folds()[0].up[0], again.folds()[0].up[1])
    assert load(tmp_path / "strong", scale=1.0).interventions[0].scale == 1
    for wrong in (float("nan"), "2", True):
        with pytest.raises(ValueError, match="^scale: must be a finite number"):
            load(folder, scale=wrong)


def test_two_saves_are_equal_bytes(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "b")
    for name in (native.CONFIG, native.WEIGHTS):
        assert (folder / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_trainable_adapter_is_saved_as_it_folds(tmp_path: Path) -> None:
    adapter = fresh()
    adapter.trainable = True
    with torch.no_grad():
        for one in adapter.interventions:
            one.R += 0.3 * torch.randn_like(one.R)
    adapter.save_pretrained(tmp_path)
    for a, b in zip(adapter.folds(), load(tmp_path).folds()):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    shared = torch.randn(2, D)
    one = {"R": shared, "W": shared, "b": shared[:, 0]}
    Adapter([Intervention("loreft", 0, "block_output", Positions.parse("all"), one)]).save_pretrained(
        tmp_path
    )
    assert torch.equal(load(tmp_path).interventions[0].W, shared)


@pytest.mark.parametrize("fails", ["first write", "second write", "first rename"])
def test_a_failed_save_leaves_the_previous_files_whole(folder: Path, monkeypatch, fails: str) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    calls = iter(range(10))

    def full(*_) -> None:
        if next(calls) == (fails == "second write"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native.os, "replace" if fails == "first rename" else "fsync", full)
    with pytest.raises(OSError, match="No space"):
        fresh(seed=1).save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_weights_of_another_save_are_noticed(folder: Path, tmp_path: Path) -> None:
    fresh(seed=1, act_fn="relu", dropout=0.1).save_pretrained(tmp_path / "b")
    os.replace(tmp_path / "b" / native.WEIGHTS, folder / native.WEIGHTS)
    with pytest.raises(CheckpointError, match="reft_model.safetensors.*SHA-256.*weights_sha256"):
        load(folder)
    rewrite(folder, lambda c: c.pop("weights_sha256"))
    load(folder)


def rewrite(folder: Path, change) -> None:
    file = folder / native.CONFIG
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def first(change):
    return lambda config: change(config["interventions"][0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format_version=4), ("format version 4", "newer")),
        (lambda c: c.pop("format_version"), ("format_version", "missing")),
        (lambda c: c.pop("interventions"), ("interventions", "missing")),
        (lambda c: c.update(interventions=None), ("interventions", "None")),
        (lambda c: c.update(interventions=[]), ("no", "name")),
        (lambda c: c["interventions"].pop(), ("does not name", "interventions.3.W")),
        (lambda c: c["interventions"].append(3), ("interventions[4]", "object")),
        (lambda c: c.pop("width"), ("width", "missing")),
        (lambda c: c.update(width=9), ("width", "9", "8")),
        (lambda c: c.update(n_layers=1), ("layer 2", "1")),
        (lambda c: c.update(n_layers="4"), ("n_layers", "'4'")),
        (lambda c: c.update(config=[1]), ("config",)),
        (lambda c: c["config"].update(rank=4), ("config", "rank")),
        (lambda c: c.update(base_model="llama"), ("'base_model' must be an object", "'llama'")),
        (lambda c: c.update(base_model={"model_type": "llama"}), ("base_model", "'fingerprint' is missing")),
        (lambda c: c.update(base_model={"model_type": 3}), ("base_model", "'model_type' must be text", "3")),
        (lambda c: c["config"].update(r=0), ("r:", "0")),
        (first(lambda e: e.update(method="lora")), ("interventions[0]", "lora", "loreft")),
        (first(lambda e: e.pop("layer")), ("interventions[0]", "layer", "missing")),
        (first(lambda e: e.update(layer="0")), ("interventions[0]", "layer", "'0'")),
        (first(lambda e: e.update(layer=-1)), ("interventions[0]", "layer", "-1")),
        (first(lambda e: e.update(layer=2)), ("block_output of layer 2", "f3")),
        (first(lambda e: e.update(site="here")), ("interventions[0]", "site", "here")),
        (first(lambda e: e.update(head=1)), ("interventions[0]", "head")),
        (first(lambda e: e.update(positions="q3")), ("interventions[0]", "positions", "q3")),
        (first(lambda e: e.update(positions=[0, "1"])), ("interventions[0]", "positions")),
        (first(lambda e: e.update(last_position="end")), ("interventions[0]", "last_position", "end")),
        (first(lambda e: e.update(act_fn="mish")), ("interventions[0]", "act_fn", "mish")),
        (first(lambda e: e.update(act_fn=1)), ("interventions[0]", "act_fn", "1")),
        (first(lambda e: e.update(dropout=1.5)), ("interventions[0]", "dropout", "1.5")),
        (first(lambda e: e.update(dropout=True)), ("interventions[0]", "dropout", "True")),
        (first(lambda e: e.update(rank=3)), ("interventions[0]", "rank", "3", "2")),
        (first(lambda e: e.update(parameters=["R", "W"])), ("interventions[0]", "missing: b")),
        (first(lambda e: e["parameters"].append("V")), ("safetensors", "interventions.0.V", "missing")),
        (first(lambda e: e["parameters"].append("R")), ("safetensors", "interventions.0.R", "missing")),
        (first(lambda e: e["parameters"].append([])), ("safetensors", "missing")),
    ],
)
def test_a_mistyped_config_is_named(folder: Path, change, words: tuple[str, ...]) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null", b"[" * 100_000, b'{"format_version": 1}']
)
def test_garbage_for_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / native.CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError, match=native.CONFIG):
        load(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    rewrite(folder, lambda c: c.pop("weights_sha256"))
    whole = (folder / native.WEIGHTS).read_bytes()
    for keep in (*range(0, len(whole), 37), len(whole) - 1):
        (folder / native.WEIGHTS).write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=native.WEIGHTS):
            load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("interventions.1.R"), ("interventions.1.R", "missing")),
        (lambda t: t.update(extra=torch.zeros(1)), ("extra", "does not name")),
        (lambda t: t.update({"interventions.0.W": torch.zeros(3, D)}), ("interventions[0]", "W:", "[3, 8]")),
        (
            lambda t: t.update({"interventions.0.b": torch.zeros(2).int()}),
            ("interventions[0]", "b:", "int32"),
        ),
        (
            lambda t: t.update({f"interventions.1.{n}": t[f"interventions.1.{n}"][..., :4] for n in "RW"}),
            ("width",),
        ),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change, words: tuple[str, ...]) -> None:
    rewrite(folder, lambda c: c.pop("weights_sha256"))
    tensors = load_file(folder / native.WEIGHTS)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / native.WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)


def test_missing_weights(folder: Path) -> None:
    (folder / native.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="reft_model.safetensors: there is no such file"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_warn(tmp_path: Path, value: float) -> None:
    adapter = fresh()
    adapter.interventions[1].W.data[0, 3] = value
    adapter.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="interventions.1.W.*NaN or Inf"):
        same(adapter, load(tmp_path))


def test_a_native_folder_says_its_positions_itself(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="^positions: .*native"):
        load(folder, positions="f3")
    with pytest.raises(CheckpointError, match="^dropout: .*native"):
        load(folder, dropout=0.0)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder.*no hub id"):
        load(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="is a file"):
        fresh().save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load(tmp_path)


def test_a_hub_id_is_downloaded_without_a_models_weights(folder: Path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    same(load("some-one/an.adapter"), load(folder))
    assert asked["repo_id"] == "some-one/an.adapter"
    assert "pytorch_model.bin" not in asked["allow_patterns"]


def test_a_hub_that_does_not_answer_is_a_clear_error(monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(*_, **__) -> str:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="some-one/adapter: is no local folder.*no route"):
        load("some-one/adapter")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    weights = folder / "reft_model.safetensors"
    tensors = load_file(weights)
    tensors["interventions.0.W"] = tensors["interventions.0.W"].to(dtype)
    save_file(tensors, weights)
    config = json.loads((folder / "reft_config.json").read_text())
    del config["weights_sha256"]
    (folder / "reft_config.json").write_text(json.dumps(config))
    message = rf"reft_model.safetensors: 'interventions.0.W' is {dtype}; an adapter's tensors must be"
    with pytest.raises(CheckpointError, match=message):
        Adapter.from_pretrained(folder)


def test_a_folder_of_adapters_names_them(folder: Path, tmp_path: Path) -> None:
    """As a checkpoint of several trained adapters is."""
    several = tmp_path / "checkpoint-60"
    for name in ("b", "a", "empty"):
        (several / name).mkdir(parents=True)
    for name in ("a", "b"):
        shutil.copytree(folder, several / name, dirs_exist_ok=True)
    with pytest.raises(CheckpointError) as caught:
        Adapter.from_pretrained(several)
    assert str(caught.value).startswith(f"{several}: holds no adapter")
    assert str(caught.value).endswith(f"; these do: {several / 'a'}, {several / 'b'}")
    for number in range(10):
        shutil.copytree(folder, several / f"c{number}")
    with pytest.raises(CheckpointError, match="c7 and 2 more$"):
        Adapter.from_pretrained(several)
