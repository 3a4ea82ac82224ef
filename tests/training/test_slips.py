"""Training that runs without a word and trains something else than was meant: warned of, or made right."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from support.models import batch_of, make_model

import reft_kernels as rk

pytestmark = pytest.mark.models
FROZEN = "no adapter of the batch trains: 'a'.*is_trainable=True"
UNNAMED = r"adapter_names: the batch has none.*'a', 'b' are trainable"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(2)
    rk.Adapter.from_config(rk.ReftConfig(r=2, positions="f2+l1"), 3, 32).save_pretrained(path)
    return path


@pytest.fixture
def model():
    model = make_model(gain=1.0).train()
    rk.patch(model)
    return model


def batch() -> dict[str, torch.Tensor]:
    found = batch_of([6, 6])
    labels = found["input_ids"].clone()
    labels[:, :3] = -100
    return {**found, "labels": labels, "use_cache": False}


def said(model, **more) -> list[str]:
    """What a step of training warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model(**batch(), **more)
    return [str(one.message) for one in found]


# Adapters that don't train ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["parameters", "named_parameters"])
def test_a_loop_on_a_frozen_adapter_is_told_once(model, folder, how):
    """The base requires gradients, so backward runs and the loss stays where it is."""
    model.reft.load_adapter(folder, "a")
    found = [p if how == "parameters" else p[1] for p in getattr(model.reft, how)()]
    optimizer = torch.optim.AdamW(found, lr=0.1)
    with pytest.warns(UserWarning, match=FROZEN) as heard:
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()
    assert len(heard) == 1


def test_a_loss_without_any_gradient_is_told(model, folder):
    model.requires_grad_(False)
    model.reft.load_adapter(folder, "a")
    with pytest.warns(UserWarning, match=FROZEN):
        model(**batch())


def test_an_adapter_that_get_peft_model_froze_is_told(model):
    peft = pytest.importorskip("peft")
    model.reft.add_adapter("a", rk.ReftConfig(r=2))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    with pytest.warns(UserWarning, match=r"reft\.adapters\['a'\]\.trainable = True"):
        wrapped(**batch())
    model.reft.adapters["a"].trainable = True
    assert not said(wrapped)


def test_no_false_alarm(model, folder):
    """Each of these is meant as it is."""
    reft = model.reft
    assert not said(model)
    reft.load_adapter(folder, "a")
    assert not said(model)  # the base trains under a frozen adapter
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert not said(model)  # only its head does
    model.requires_grad_(False)
    embeds = model.model.embed_tokens(batch()["input_ids"]).requires_grad_()
    model(inputs_embeds=embeds, labels=batch()["labels"])  # as prompt tuning
    list(reft.parameters())
    with torch.no_grad():
        assert not said(model)  # evaluation in training mode
    model.eval()
    assert not said(model)
    model.train()
    assert not said(model, adapter_names=["__base__"] * 2)
    reft.add_adapter("b", rk.ReftConfig(r=1))
    assert not said(model, adapter_names=["a", "b"])  # one of them trains
    assert any("no adapter of the batch trains: 'a'" in text for text in said(model, adapter_names=["a"] * 2))


def test_no_false_alarm_with_a_lora_that_trains(model, folder):
    peft = pytest.importorskip("peft")
    model.reft.load_adapter(folder, "a")
    assert not said(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train())


def test_no_false_alarm_of_the_trainer(model, folder, tmp_path):
    """Which looks at the parameters as well."""
    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    model.reft.load_adapter(folder, "frozen")
    model.reft.add_adapter("a", rk.ReftConfig(r=2))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    model.reft.adapters["a"].trainable = True
    from transformers import TrainingArguments

    rk.ReftTrainer(
        wrapped, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]), rk.ReftCollator(pad_token_id=0)
    )._check_trainable()
    assert not said(wrapped, reft_adapter_names=["frozen"] * 2)


# Rows that name no adapter ---------------------------------------------------------------------------------


def test_rows_without_names_while_several_adapters_train_are_told_once(model):
    for name in ("a", "b"):
        model.reft.add_adapter(name, rk.ReftConfig(r=2))
    assert not said(model, adapter_names=["a", "b"])
    with pytest.warns(UserWarning, match=UNNAMED):
        model(**batch())
    assert not said(model)


def test_rows_without_names_are_fine_where_somebody_chose(model, folder):
    model.reft.add_adapter("a", rk.ReftConfig(r=2))
    model.reft.load_adapter(folder, "frozen")
    assert not said(model)  # only one trains
    model.reft.add_adapter("b", rk.ReftConfig(r=2))
    model.reft.set_adapter("b")
    assert not said(model)


# trainable = True ------------------------------------------------------------------------------------------


def unfrozen(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and "reft" not in name]


def test_making_a_loaded_adapter_trainable_freezes_the_base(model, folder):
    adapter = model.reft.load_adapter(folder, "a")
    assert unfrozen(model)
    adapter.trainable = True
    assert not unfrozen(model) and all(p.requires_grad for p in adapter.parameters())
    rk.unpatch(model)
    assert unfrozen(model) == [name for name, _ in make_model().named_parameters()]
    adapter.trainable = False
    adapter.trainable = True  # an adapter of no model
    assert unfrozen(model)


def _reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _reloaded],
    ids=["copy", "pickle", "save"],
)
def test_copies_freeze_themselves(model, folder, copied):
    adapter = model.reft.load_adapter(folder, "a")
    twin = copied(model)
    twin.reft.adapters["a"].trainable = True
    assert not unfrozen(twin) and unfrozen(model) and not adapter.trainable
    modules = [name for name, _ in twin.named_modules()]
    assert len(modules) == len(set(modules)) == len(list(model.modules()))


def test_a_copied_adapter_brings_no_model_along(model, folder):
    adapter = model.reft.load_adapter(folder, "a")
    for one in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        one.trainable = True
        assert unfrozen(model)
    assert len(pickle.dumps(adapter)) < 3 * sum(p.numel() * 4 for p in adapter.parameters()) + 20_000
    model.reft.delete_adapter("a")
    adapter.trainable = True
    assert unfrozen(model)
    other = make_model()
    rk.patch(other).add_adapter("a", adapter)
    assert not unfrozen(other)
