"""`reft_positions`: the tokens that each row's adapter edits, said in the call."""

from __future__ import annotations

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import random_adapter
from support.models import batch_of, make_model, row_alone

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32


@pytest.fixture(scope="module")
def bare():
    return make_model()


@pytest.fixture(scope="module")
def model():
    model = make_model()
    reft = rk.patch(model)
    for seed, (name, positions) in enumerate({"tied": "f2+l2", "untied": "f2+l2", "all": "all"}.items()):
        config = rk.ReftConfig(r=2, layers=[0, 2], positions=positions, share_weights=name != "untied")
        reft.add_adapter(name, random_adapter(config, WIDTH, seed=seed))
    return model


def hooked(bare, row, adapter, lists):
    """Logits [tokens, vocabulary] of one unpadded row, with a list of tokens for each intervention."""
    blocks, handles = bare.model.layers, []
    for one, index in zip(adapter.interventions, lists):

        def edit(module, args, output, one=one, index=index):
            output[:, index] = oracle.formula(one, output[:, index].double()).to(output.dtype)

        handles.append(blocks[one.layer].register_forward_hook(edit))
    try:
        with torch.no_grad():
            return bare(input_ids=row["input_ids"], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_list_a_row(model, bare, side):
    batch = batch_of([7, 4, 5, 6, 5], side)
    lists = [[0, 3], [-1, 1, 1], None, [], None]
    names = ["tied", "all", "all", "all", "__base__"]
    with torch.no_grad():
        got = model(**batch, adapter_names=names, reft_positions=lists).logits
    for row, wanted in enumerate([[0, 3], [1, 3], range(5), [], []]):
        adapter = model.reft.adapters["tied" if row == 0 else "all"]
        want = hooked(bare, row_alone(batch, row), adapter, [list(wanted)] * 2)
        torch.testing.assert_close(got[row][batch["attention_mask"][row].bool()], want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["dict", "base", "list", "tensor"])
def test_pyrefts_unit_locations_as_they_are(model, bare, form):
    """Columns of the padded batch, a list for each intervention: f for the first two, l for the others."""
    batch = batch_of([7, 5], "left")
    first, last = [[0, 1], [2, 3]], [[5, 6], [5, 6]]
    locations = [first, first, last, last]
    given = {
        "dict": {"sources->base": (None, locations)},
        "base": {"base": locations},
        "list": locations,
        "tensor": torch.tensor(locations),
    }[form]
    with torch.no_grad():
        got = model(**batch, adapter_names=["untied"] * 2, reft_positions=given).logits
    for row, begin in enumerate([0, 2]):
        lists = [[column - begin for column in one[row]] for one in locations]
        want = hooked(bare, row_alone(batch, row), model.reft.adapters["untied"], lists)
        torch.testing.assert_close(got[row, begin:], want, atol=2e-4, rtol=1e-4)


def test_the_live_pyrefts_locations(model):
    """What pyreft's own function lists for f2+l2 gives what the adapter itself says."""
    pyreft = pytest.importorskip("pyreft")
    batch = batch_of([8, 8])
    options = {"num_interventions": 4, "positions": "f2+l2", "share_weights": False}
    one = pyreft.get_intervention_locations(last_position=8, **options)
    locations = {"sources->base": (None, [[one[i]] * 2 for i in range(4)])}
    names = ["untied"] * 2
    with torch.no_grad():
        told = model(**batch, adapter_names=names, reft_positions=locations).logits
        assert torch.equal(told, model(**batch, adapter_names=names).logits)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_edits_the_prompt_only(model, beams):
    batch = batch_of([6, 4])
    options = {"adapter_names": ["all", "all"], "max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    prompt = rk.ReftConfig(r=2, layers=[0, 2], positions="prompt")
    other = make_model()
    rk.patch(other).add_adapter("all", random_adapter(prompt, WIDTH, seed=2))
    want = other.generate(**batch, **options)
    told = [list(range(6)), list(range(4))]
    assert torch.equal(model.generate(**batch, **options, reft_positions=told), want)
    assert not torch.equal(model.generate(**batch, **options), want)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([[0]], "has 1 entries for a batch of 2 rows"),
        (7, "must be a list with one entry a row"),
        ([[0], [4]], r"row 1 has 4 tokens, and \[4\] has an index outside"),
        ([[0], [-5]], r"row 1 has 4 tokens, and \[-5\]"),
        ([[0], [1.5]], r"row 1: must be None or a list of integers, was \[1.5\]"),
        ([[0], "l1"], "row 1: must be None or a list of integers, was 'l1'"),
        ([[[0], [0]]] * 3, "has lists for 3 interventions; adapter 'all' of row 0 has 2"),
        ([[[0]], [[0]]], "intervention 0: must have one list a row, 2"),
        ([[[0], [0]], [[1], [0]]], "must be given the same tokens"),
        ([[[0], [6]]], "row 1 has no column 6"),
        ([[[-1], [0]]], "row 0 has no column -1"),
        ({"sources->base": ([[0]], [[0]])}, "of pyreft's unit_locations only"),
        ({"sources": 1}, "of pyreft's unit_locations only"),
    ],
)
def test_bad_lists_are_refused_before_anything_runs(model, given, match):
    batch = batch_of([6, 4])
    seen = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *args: seen.append(args))
    try:
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=f"reft_positions: .*{match}"):
                call(**batch, adapter_names=["all", "all"], reft_positions=given)
    finally:
        handle.remove()
    assert not seen and model.reft._runtime.plan is None


def test_rows_that_can_take_no_list(model):
    batch = batch_of([6, 4])
    with pytest.raises(ValueError, match="reft_positions: row 1 runs the bare model"):
        model(**batch, adapter_names=["all", "__base__"], reft_positions=[[0], [0]])
    with pytest.raises(ValueError, match=r"row 0: adapter 'untied' has parameters of their own for f2, l2"):
        model(**batch, adapter_names=["untied", "all"], reft_positions=[[0], [0]])
    with pytest.raises(ValueError, match="two interventions of adapter 'untied' would edit the same token"):
        model(**batch, adapter_names=["untied", "untied"], reft_positions=[[[0], [0]]])
    with pytest.raises(ValueError, match="unit_locations: is no argument of forward; reft_positions is"):
        model(**batch, unit_locations={"base": [[0], [0]]})
