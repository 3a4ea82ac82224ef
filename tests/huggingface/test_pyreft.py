"""Conformance with the live pyreft on whole models: what it trains and saves runs the same here.

For every family, and on Llama for every class: logits within 1e-5 in float32, the same greedy tokens, with
left padding and with prompts too short for all positions.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import FAMILIES, batch_of, make_model, row_alone

import reft_kernels as rk

pyreft = pytest.importorskip(
    "pyreft", reason="pyreft, the reference library, can't be imported here", exc_type=ImportError
)
pytestmark = pytest.mark.models

WIDTH, RANK, LAYERS = 32, 3, (0, 2)
CLASSES = ("Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft")
PATHS = {"gpt2": "transformer.h[{}].output", "gpt_neox": "gpt_neox.layers[{}].output"}
CASES = [(family, "Loreft") for family in FAMILIES] + [("llama", name) for name in CLASSES[1:]]


def small_model(family):
    """Weights as they are initialised: at this scale float32 leaves 1e-5 room."""
    return make_model(family, gain=1.0)


def interventions(name: str, count: int, **more):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        cls = getattr(pyreft.interventions, f"{name}Intervention")
        made.append(
            cls(embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32, add_bias=True, **more).eval()
        )
        with torch.no_grad():
            for parameter_name, parameter in made[-1].named_parameters():
                if not parameter_name.endswith("original"):
                    parameter += 0.3 * torch.randn_like(parameter)
    return made


def theirs(family: str, name: str, untied: bool, folder, **more):
    """(pyreft's model, the folder that it saved): untied weights double the list of layers, as there."""
    path = PATHS.get(family, "model.layers[{}].output")
    layers = LAYERS * 2 if untied else LAYERS
    made = interventions(name, len(layers), **more)
    config = pyreft.ReftConfig(
        representations=[
            {"component": path.format(layer), "low_rank_dimension": RANK, "intervention": one}
            for layer, one in zip(layers, made)
        ]
    )
    wrapped = pyreft.get_reft_model(small_model(family), config)
    wrapped.save(str(folder))
    return wrapped


def locations(spec: str, lengths: list[int], pads: list[int], untied: bool, count: int):
    """pyreft's own positions, shifted by each row's padding: [intervention][row][position]."""
    rows = []
    for length, pad in zip(lengths, pads):
        found = pyreft.get_intervention_locations(
            positions=spec,
            last_position=length,
            num_interventions=count,
            share_weights=not untied,
        )
        rows.append([[p + pad for p in positions if p >= 0] for positions in found])
    return [[row[index] for row in rows] for index in range(count)]


def ours(family: str, folder, spec: str, **more):
    model = small_model(family)
    rk.patch(model).load_adapter(folder, "theirs", positions=spec, **more)
    return model


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_logits_and_greedy_tokens(family, name, untied, tmp_path):
    spec, lengths = "f2+l2", [9, 6, 7]
    wrapped = theirs(family, name, untied, tmp_path / "saved")
    model = ours(family, tmp_path / "saved", spec)
    batch = batch_of(lengths, "left")
    pads = [9 - length for length in lengths]
    where = locations(spec, lengths, pads, untied, len(LAYERS) * (1 + untied))
    units = {"sources->base": (None, where)}
    places = {"position_ids": batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)}
    with torch.no_grad():
        plain, edited = wrapped({**batch, **places}, unit_locations=units, output_original_output=True)
        got = model(**batch, **places).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(got[seen], edited.logits[seen], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain.logits[seen], edited.logits[seen], atol=1e-3)
    _, want = wrapped.generate(
        batch,
        unit_locations=units,
        intervene_on_prompt=True,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=10**6,
    )
    tokens = model.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=10**6)
    assert tokens.tolist() == want.tolist()


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_short_prompts(untied, tmp_path):
    """Counts are clamped to half the prompt's length, so a prompt of one token is not edited."""
    spec = "f3+l3"
    wrapped = theirs("llama", "Loreft", untied, tmp_path / "saved")
    model = ours("llama", tmp_path / "saved", spec)
    lengths = [8, 5, 4, 2, 1]
    batch = batch_of(lengths, "left")
    with torch.no_grad():
        got = model(**batch).logits
    for row, length in enumerate(lengths):
        alone = row_alone(batch, row)
        where = locations(spec, [length], [0], untied, len(LAYERS) * (1 + untied))
        with torch.no_grad():
            if length == 1:
                want = wrapped.model(**alone).logits
            else:
                _, out = wrapped(alone, unit_locations={"sources->base": (None, where)})
                want = out.logits
        torch.testing.assert_close(got[row, -length:], want[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act_fn", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("name", ["Loreft", "Noreft", "Direft", "Nodireft"])
def test_activations(name, act_fn, tmp_path):
    wrapped = theirs("llama", name, False, tmp_path / "saved", act_fn=act_fn)
    model = ours("llama", tmp_path / "saved", "f2+l2", act_fn=act_fn)
    batch = batch_of([7])
    units = {"sources->base": (None, locations("f2+l2", [7], [0], False, len(LAYERS)))}
    with torch.no_grad():
        want = wrapped(batch, unit_locations=units)[1].logits
        torch.testing.assert_close(model(**batch).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("spec", "on_prompt"), [("all", True), ("generated", False), ("f2+l2", True)])
def test_generation_everywhere_and_after_the_prompt(spec, on_prompt, tmp_path):
    """pyreft's three ways to generate: all tokens, the decode steps only, the prompt's locations only."""
    wrapped = theirs("llama", "Loreft", False, tmp_path / "saved")
    model = ours("llama", tmp_path / "saved", spec)
    batch = batch_of([6])
    places = locations("f2+l2", [6], [0], False, len(LAYERS)) if spec == "f2+l2" else None
    _, want = wrapped.generate(
        batch,
        unit_locations={"sources->base": (None, places)} if places else None,
        intervene_on_prompt=on_prompt,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=10**6,
    )
    got = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=10**6)
    assert got.tolist() == want.tolist()


def test_a_batch_of_adapters_that_pyreft_saved(tmp_path):
    """What pyreft can't do: its adapters side by side in one batch, each row as pyreft runs it alone."""
    names = ["Loreft", "Noreft", "Lobireft"]
    model = small_model("llama")
    reft = rk.patch(model)
    batch = batch_of([8, 6, 7, 5])
    with torch.no_grad():
        plain = copy.deepcopy(model)(**row_alone(batch, 3), adapter_names=["__base__"]).logits[0]
    wants = []
    for row, name in enumerate(names):
        wrapped = theirs("llama", name, False, tmp_path / name)
        reft.load_adapter(tmp_path / name, name, positions="f2+l2")
        length = [8, 6, 7][row]
        units = {"sources->base": (None, locations("f2+l2", [length], [0], False, len(LAYERS)))}
        with torch.no_grad():
            wants.append(wrapped(row_alone(batch, row), unit_locations=units)[1].logits[0])
    with torch.no_grad():
        got = model(**batch, adapter_names=[*names, "__base__"]).logits
    for row, want in enumerate([*wants, plain]):
        torch.testing.assert_close(got[row, -len(want) :], want, atol=1e-5, rtol=1e-5)
