"""Every family, mixed adapters in one batch: forward and generate against eager hooks row by row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import patch_with_mixed
from support.models import FAMILIES, batch_of, make_model, row_alone

import reft_kernels as rk

pytestmark = pytest.mark.models
LENGTHS = [9, 4, 7, 1, 6, 9]
NAMES = ["tied", "untied", "everywhere", "tied", "__base__", "generated"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def patched(family):
    """(a patched model with adapters, the same model bare)."""
    model, bare = make_model(family), make_model(family)
    patch_with_mixed(model)
    return model, bare


def adapter_of(model, name):
    return model.reft.adapters.get(name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_equals_each_row_alone(patched, side):
    model, bare = patched
    batch = batch_of(LENGTHS, side)
    places = batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)  # GPT-2 needs them with left padding
    with torch.no_grad():
        logits = model(**batch, position_ids=places, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        want = oracle.forward(bare, row_alone(batch, row), adapter_of(model, name))
        got = logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(
            got, want, atol=2e-4, rtol=1e-4, msg=partial("row {}, {}: {}".format, row, name)
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_equals_each_row_alone(patched, cache):
    model, bare = patched
    batch = batch_of(LENGTHS, "left")
    out = model.generate(
        **batch,
        adapter_names=NAMES,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **({"cache_implementation": "static"} if cache == "static" else {}),
    )
    logits = torch.stack(out.logits, dim=1)
    for row, name in enumerate(NAMES):
        tokens, want = oracle.greedy(bare, row_alone(batch, row), adapter_of(model, name), 6)
        assert out.sequences[row, -6:].tolist() == tokens.tolist(), f"row {row}, {name}"
        torch.testing.assert_close(logits[row], want, atol=1e-3, rtol=1e-3)


def test_the_edits_matter(patched):
    """What the tests above compare differs from the bare model, or they would prove nothing."""
    model, _ = patched
    batch = batch_of(LENGTHS, "left")
    with torch.no_grad():
        bare = model(**batch, adapter_names=["__base__"] * len(NAMES)).logits
        edited = model(**batch, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        seen = batch["attention_mask"][row].bool()
        changed = not torch.equal(bare[row][seen], edited[row][seen])
        edits_prompt = name in ("untied", "everywhere") or (name == "tied" and LENGTHS[row] > 1)
        assert changed == edits_prompt, f"row {row}, {name}"


def contents(model):
    """What every module holds, and how many hooks."""
    return {
        name: ({key: id(value) for key, value in module.__dict__.items()}, len(module._forward_hooks))
        for name, module in model.named_modules()
    }


def test_unpatch_gives_the_model_back(family):
    model = make_model(family)
    batch = batch_of([5, 3])
    before = contents(model)
    with torch.no_grad():
        want = model(**batch).logits
    patch_with_mixed(model)
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, want)
    rk.unpatch(model)
    assert contents(model) == before
    assert not hasattr(model, "reft") and not any("reft" in name for name, _ in model.named_modules())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, want)
    with pytest.raises((ValueError, TypeError)):
        model.generate(**batch, adapter_names=["tied", "tied"], max_new_tokens=1)
