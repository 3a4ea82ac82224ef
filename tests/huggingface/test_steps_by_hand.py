"""A decode loop of one's own: its steps are planned once, and again as soon as anything is different."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from support.models import LAYERS, batch_of

import reft_kernels as rk

pytestmark = pytest.mark.models

SAME = ["untied", "generated"]


def steps(
    model, names_of_step: Sequence[Sequence[str]], before: Callable[[int], None] = lambda step: None
) -> list[torch.Tensor]:
    """Logits of the prompt's last token and of each step; `before` is called with the step's number."""
    batch = batch_of([7, 5])
    ids, mask, cache, found = batch["input_ids"], batch["attention_mask"], None, []
    with torch.no_grad():
        for step, names in enumerate(names_of_step):
            before(step)
            out = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, adapter_names=names
            )
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            found.append(out.logits[:, -1])
    return found


@pytest.fixture
def planned(model, monkeypatch) -> list[tuple]:
    """The plans that were made so far."""
    made: list[tuple] = []
    reader = type(model.reft._reader)
    plan = reader._plan
    monkeypatch.setattr(reader, "_plan", lambda self, *args: made.append(args) or plan(self, *args))
    return made


def test_steps_of_the_same_names_are_planned_once(model, planned):
    steps(model, [SAME] * 6)
    assert len(planned) == 2  # the prompt's, and that of all steps


def test_other_names_are_planned_anew(model):
    mixed = [SAME, SAME, ["generated", "untied"], SAME, ["generated", "__base__"], ["__base__"] * 2]

    def forget(_: int) -> None:
        model.reft._reader._step = None

    for got, want in zip(steps(model, mixed), steps(model, mixed, forget)):
        assert torch.equal(got, want)


def test_a_step_with_padding_is_planned_by_its_mask(model, planned):
    batch = batch_of([7, 5])
    with torch.no_grad():
        cache = model(**batch, use_cache=True, adapter_names=SAME).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.tensor([[1], [0]])], dim=1)
        one = {"input_ids": torch.tensor([[5], [0]]), "use_cache": True, "adapter_names": SAME}
        model(**one, attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        model(**one, attention_mask=mask, past_key_values=cache)
    assert len(planned) == 3


def test_the_cache_of_another_prompt_is_no_obstacle(model, planned):
    steps(model, [SAME] * 3)
    steps(model, [SAME] * 3)
    assert len(planned) == 3  # each prompt's, and one for all steps of both


def test_an_adapter_that_was_replaced_is_the_new_one(model):
    config = rk.ReftConfig(r=3, layers=[0], positions="generated")
    twin = rk.Adapter.from_config(config, LAYERS, model.config.hidden_size)
    torch.nn.init.constant_(twin.interventions[0].b, 2.0)
    twin.trainable = False

    def replace(step: int, patched: torch.nn.Module = model) -> None:
        if step == 3:
            patched.reft.delete_adapter("generated")
            patched.reft.add_adapter("generated", twin)

    other = copy.deepcopy(model)

    def replace_and_forget(step: int) -> None:
        replace(step, other)
        other.reft._reader._step = None

    names = ["generated", "generated"]
    before, after = steps(model, [names] * 5), steps(model, [names] * 5, replace)
    assert not torch.equal(before[3], after[3])
    for got, want in zip(after, steps(other, [names] * 5, replace_and_forget)):
        assert torch.equal(got, want)


def test_an_adapter_that_trains_is_folded_anew_each_step(model):
    """Nothing tells that its parameters changed."""
    config = rk.ReftConfig(r=2, layers="all", positions="all")
    adapter = rk.Adapter.from_config(config, LAYERS, model.config.hidden_size)
    model.reft.add_adapter("trains", adapter)
    assert adapter.trainable

    def train(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                for one in adapter.interventions:
                    one.b += 3.0

    names = ["trains", "trains"]
    before, after = steps(model, [names] * 4), steps(model, [names] * 4, train)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[2], after[2])


def test_prompt_lengths_are_still_read_and_checked(model):
    steps(model, [SAME] * 3)
    batch = batch_of([7, 5])
    with torch.no_grad():
        cache = model(**batch, use_cache=True, adapter_names=SAME).past_key_values
        one = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache, "adapter_names": SAME}
        with pytest.raises(ValueError, match="prompt_lengths"):
            model(**one, prompt_lengths=[99, 3])
