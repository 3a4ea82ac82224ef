"""The stack of blocks: shared by two models, compiled, or called by itself."""

from __future__ import annotations

import pytest
import torch
from support.models import batch_of, make_model

import reft_kernels as rk

pytestmark = pytest.mark.models


def test_layers_are_patched_once():
    """Two models with the same layers would both edit them."""
    model = make_model()
    rk.patch(model)
    with pytest.raises(rk.NotPatchable, match="shares its layers"):
        rk.patch(model.model)
    other = make_model(seed=1)
    other.model = model.model
    with pytest.raises(rk.NotPatchable, match="shares its layers"):
        rk.patch(other)
    rk.unpatch(model)
    rk.patch(other)


def test_a_compiled_stack_called_by_itself(model):
    batch = batch_of([6, 4])
    with torch.no_grad():
        want = model.model(**batch, adapter_names=["untied", "everywhere"]).last_hidden_state
        compiled = torch.compile(model.model, backend="aot_eager")
        for _ in range(2):
            got = compiled(**batch, adapter_names=["untied", "everywhere"]).last_hidden_state
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            compiled(**batch, adapter_names=["__base__"] * 2).last_hidden_state,
            make_model().model(**batch).last_hidden_state,
        )


def test_a_stack_called_by_itself_leaves_no_plan(model):
    batch = batch_of([6, 4])
    with torch.no_grad():
        model.model(**batch, adapter_names=["everywhere"] * 2)
        assert model.reft._runtime.plan is None
        broken = model.model.layers[2].register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.model(**batch, adapter_names=["everywhere"] * 2)
        with pytest.raises(ZeroDivisionError):
            model(**batch, adapter_names=["everywhere"] * 2)
    broken.remove()
    assert model.reft._runtime.plan is None and model.reft._runtime.depth == 0
