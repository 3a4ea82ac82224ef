"""Adapters that follow one another, on a model: on every way that an edit may take."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapters import patch_with_mixed
from support.models import batch_of, make_model
from support.runs import LENGTHS, check_rows_are_as_among_their_like, logits, recorded_steps, tokens

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32
NAMES = [
    rk.Sequence("everywhere", "red"),
    "red",
    None,
    rk.Sequence("red", "everywhere", "kept"),
    "tied",
    "kept",
]


def patched(dtype: torch.dtype = torch.float32, **options):
    model = make_model().to(dtype)
    reft = patch_with_mixed(model, **options)
    drawn = torch.randn(3, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    v = {layer: drawn[layer, 0] for layer in (0, 2)}
    reft.add_adapter("kept", rk.Adapter.from_tensors("vector", v, options={"keep_norm": True}))
    scales = {layer: {"scaling": 1 + 0.3 * drawn[layer, 1], "bias": drawn[layer, 2]} for layer in range(3)}
    reft.add_adapter("red", rk.Adapter.from_tensors("red", scales))
    reft.set_adapter(None)
    return model


@pytest.mark.parametrize("fuse_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_to_the_bit_what_it_is_among_its_like(dtype, fuse_norm):
    model = patched(dtype, fuse_norm=fuse_norm)
    found = check_rows_are_as_among_their_like(model, NAMES)
    assert torch.equal(found[2], logits(model, None)[2])
    turned = logits(model, [rk.Sequence("red", "everywhere")] * 6)
    assert not torch.allclose(turned[0], found[0], atol=1e-3)


def test_blocks_apply_one_after_another():
    """Two adapters at one block, against the first in the model and the second's formula on its output."""
    model, seen = patched(), []
    model.model.layers[2].register_forward_hook(
        lambda _, args, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    v, h = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5)), None
    reft = model.reft
    reft.add_adapter("first", rk.Adapter.from_tensors("ablation", {2: v[0]}))
    reft.add_adapter("second", rk.Adapter.from_tensors("red", {2: {"scaling": v[1], "bias": v[0]}}))
    logits(model, ["first"] * 6)
    logits(model, [rk.Sequence("first", "second")] * 6)
    mask = batch_of(LENGTHS)["attention_mask"].bool()
    h, edited = (it[mask] for it in seen)
    torch.testing.assert_close(edited, v[1] * h + v[0])


@pytest.mark.parametrize("fuse_norm", [False, True])
def test_compiled_steps(fuse_norm):
    torch._dynamo.reset()
    model, (compiled, graphs) = patched(fuse_norm=fuse_norm, capacity=200), recorded_steps()
    # A form in a turn in which none was before is a stage more, and compiled for anew.
    more = [rk.Sequence("kept", "tied", "red")] * 6
    for names, count in ((NAMES, 1), (NAMES[::-1], 1), (["kept"] * 6, 1), (more, 2), (NAMES, 2)):
        got = tokens(model, names, **compiled)
        assert torch.equal(got, tokens(model, names)), names
        assert len(graphs) == count, names


def test_generate_with_beams_numbers_and_copies():
    model = patched()
    want = tokens(model, NAMES, num_beams=2, scale=[[1.0, 0.5], 1.0, 1.0, 2.0, 1.0, 1.0])
    twin = copy.deepcopy(model)
    again = tokens(twin, NAMES, num_beams=2, scale=[[1.0, 0.5], 1.0, 1.0, [2.0] * 3, 1.0, 1.0])
    assert torch.equal(want, again)
    assert torch.equal(tokens(model, ["tied"] * 6), tokens(patched(), ["tied"] * 6))


def test_gradients_reach_both():
    model = patched()
    reft = model.reft
    for name in ("one", "two"):
        reft.add_adapter(name, rk.ReftConfig(r=2, layers=[1], positions="all"))
    batch = batch_of(LENGTHS)
    rows = [rk.Sequence("one", "two")] * 6
    model(**batch, labels=batch["input_ids"], adapter_names=rows).loss.backward()
    for name in ("one", "two"):
        assert all(bool(p.grad.any()) for p in reft.adapters[name].parameters() if p.requires_grad), name
