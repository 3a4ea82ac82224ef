"""What people read and type: names of adapters, `repr`, completion, errors that say what there is."""

from __future__ import annotations

import copy

import pytest
import torch
from support.adapters import random_adapter
from support.models import batch_of, make_model

import reft_kernels as rk

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def crowded():
    """A model with 200 adapters."""
    model = make_model()
    reft = rk.patch(model)
    adapter = random_adapter(rk.ReftConfig(r=1, layers=[0]), 32)
    for number in range(200):
        reft.add_adapter(f"customer-{number:03}", copy.deepcopy(adapter))
    return model


def test_repr_is_a_line_for_each_adapter(model) -> None:
    model.reft.adapters["untied"].trainable = True
    assert repr(model.reft).splitlines() == [
        "Reft(4 adapters, active='tied'",
        "  'tied': loreft, rank 2, layers 0,2, block_output, positions f2+l2, 1.0 KiB",
        "  'untied': loreft, rank 3, layer 1, block_output, positions f2 and l1, 1.5 KiB, trainable",
        "  'everywhere': direft, rank 5, layers 0-2, block_output, positions all, 3.8 KiB",
        "  'generated': loreft, rank 1, layers 1-2, block_output, positions generated, 520 bytes",
        ")",
    ]
    model.reft.set_adapter(None)
    for name in list(model.reft):
        model.reft.delete_adapter(name)
    assert repr(model.reft) == "Reft(0 adapters, active=None)"


def test_repr_of_many_adapters_is_short(crowded) -> None:
    lines = repr(crowded.reft).splitlines()
    assert len(lines) == 13 and lines[0] == "Reft(200 adapters, active='customer-000'"
    assert lines[10].startswith("  'customer-009': loreft, rank 1, layer 0") and lines[11] == "  and 190 more"
    bare = repr(make_model())
    assert len(repr(crowded)) < len(bare) + 1500
    assert repr(crowded).startswith(bare.rsplit("\n)", 1)[0])


def test_a_wrong_name_is_answered_with_the_closest(crowded, model) -> None:
    batch = batch_of([4])
    calls = [
        (lambda name: crowded.reft.set_adapter(name), "name", "loaded are 200"),
        (lambda name: crowded.reft.delete_adapter(name), "name", "loaded are 200"),
        (lambda name: crowded(**batch, adapter_names=[name]), "adapter_names", "known are 201"),
    ]
    for call, argument, count in calls:
        with pytest.raises(ValueError) as caught:
            call("custmer-017")
        assert str(caught.value).startswith(
            f"{argument}: there is no adapter 'custmer-017'; {count}, the closest "
        )
        assert "'customer-017'" in str(caught.value) and len(str(caught.value)) < 150
        with pytest.raises(ValueError, match=f"there is no adapter '§'; {count}$"):
            call("§")
    few = "there is no adapter 'tide'; loaded are 'tied', 'untied', 'everywhere', 'generated'"
    with pytest.raises(ValueError, match=few):
        model.reft.set_adapter("tide")
    with pytest.raises(ValueError, match="known are 'tied', 'untied', 'everywhere', 'generated', '__base__'"):
        model(**batch, adapter_names=["tide"])


def test_base_is_the_bare_model(model) -> None:
    batch = batch_of([6, 4])
    with torch.no_grad():
        plain = model(**batch, adapter_names=["__base__"] * 2).logits
        model.reft.set_adapter("__base__")
        assert model.reft.active_adapter is None
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("name", [["tied"], {"tied"}, 3, b"tied"])
def test_what_is_no_name(model, name: object) -> None:
    for call in (model.reft.set_adapter, model.reft.delete_adapter):
        with pytest.raises(ValueError, match="name: must be one adapter's name, was"):
            call(name)
    with pytest.raises(ValueError, match="adapter_names: "):
        model(**batch_of([4]), adapter_names=[[name]])  # (a list of names is what a row may have)
    assert model.reft.active_adapter == "tied" and len(model.reft) == 4


def test_a_reft_is_a_container_of_names(model) -> None:
    reft = model.reft
    assert len(reft) == 4 and list(reft) == ["tied", "untied", "everywhere", "generated"]
    assert "tied" in reft and "tide" not in reft and ["tied"] not in reft
    for name in reft:
        reft.delete_adapter(name)
    assert len(reft) == 0 and list(reft) == [] and bool(reft)
    assert not list(rk.patch(make_model()))


def test_completion_shows_what_there_is() -> None:
    shown = dir(rk)
    assert {"ReftTrainer", "ReftCollator", "patch", "functional", "__version__", *rk.__all__} <= set(shown)
    assert not {"TYPE_CHECKING", "Any"} & set(shown)
    assert all(hasattr(rk, name) for name in shown)
