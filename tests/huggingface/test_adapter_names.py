"""Names of adapters: any will do, one adapter has one, and the active one may be deleted."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapters import random_adapter
from support.models import batch_of

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32


def logits(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs).logits


@pytest.mark.parametrize("name", ["training", "_modules", "a.b/c d", "forward"])
def test_any_name_will_do(model, name):
    batch = batch_of([5])
    adapter = random_adapter(rk.ReftConfig(r=1, positions="all"), WIDTH)
    model.reft.add_adapter(name, adapter)
    assert not torch.equal(
        logits(model, batch, adapter_names=[name]), logits(model, batch, adapter_names=["__base__"])
    )
    model.reft.delete_adapter(name)
    assert name not in model.reft.adapters


def test_deleting_the_active_adapter_while_it_is_disabled(model):
    with model.reft.disable_adapter():
        model.reft.delete_adapter("tied")
    assert model.reft.active_adapter is None
    logits(model, batch_of([5]))


def test_one_adapter_under_two_names_is_refused(model):
    with pytest.raises(ValueError, match="another name already"):
        model.reft.add_adapter("twice", model.reft.adapters["tied"])
    model.reft.add_adapter("twice", copy.deepcopy(model.reft.adapters["tied"]))


def test_name_is_called_adapter_name_too_as_in_peft(model, tmp_path):
    reft = model.reft
    reft.set_adapter(adapter_name="tied")
    assert reft.active_adapter == "tied"
    reft.save_pretrained(tmp_path, adapter_name="untied")
    reft.load_adapter(tmp_path, adapter_name="again")
    reft.add_adapter(adapter_name="new", adapter=rk.ReftConfig(r=1))
    reft.delete_adapter(adapter_name="tied")
    assert set(reft) >= {"again", "new"} and "tied" not in reft
    with pytest.raises(TypeError, match="name and adapter_name are the same"):
        reft.set_adapter(name="new", adapter_name="again")
