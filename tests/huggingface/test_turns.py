"""A KV cache that is carried into another turn: what is defined, what differs from no cache, what is said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.adapters import patch_with_mixed, random_adapter
from support.models import VOCABULARY, batch_of, make_model

import reft_kernels as rk

pytestmark = pytest.mark.models
CARRIED = "past_key_values: holds tokens that were edited as another prompt's, and adapter {}"
SPECS = {
    "f": "f2",
    "l": "l1",
    "fl": "f2+l2",
    "prompt": "prompt",
    "generated": "generated",
    "everywhere": "all",
    "front": [0, 3],
    "back": [0, -1],
}
SAME = ("f", "everywhere", "front")


@pytest.fixture(scope="module")
def models():
    model, bare = make_model(), make_model()
    reft = rk.patch(model)
    for seed, (name, positions) in enumerate(SPECS.items()):
        config = rk.ReftConfig(r=2, positions=positions, share_weights=True)
        reft.add_adapter(name, random_adapter(config, 32, scale=0.3, seed=seed))
    return model, bare


def more(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def turn(model, ids, name, cache=None, **kwargs):
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    if name is not None:
        settings["adapter_names"] = [name]
    if cache is not None:
        settings["past_key_values"] = cache
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_logits=True, **settings, **kwargs
    )


def first_logits(out) -> torch.Tensor:
    return out.logits[0][0]


def carried(record) -> list[str]:
    return [str(one.message) for one in record if "past_key_values" in str(one.message)]


def two_turns(model, name, **kwargs):
    """The second turn's answer on the first one's cache, the same without, and what was warned of."""
    one = turn(model, batch_of([6])["input_ids"], name, **kwargs)
    ids = torch.cat([one.sequences, more(4, 7)], dim=1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        with_cache = turn(model, ids, name, copy.deepcopy(one.past_key_values), **kwargs)
    return with_cache, turn(model, ids, name, **kwargs), carried(record)


@pytest.mark.parametrize("name", SPECS)
def test_who_differs_from_no_cache_is_told(models, name):
    """Exactly those whose edits of the first turn are not this prompt's."""
    model = copy.deepcopy(models[0])
    with_cache, without, said = two_turns(model, name)
    close = torch.allclose(first_logits(with_cache), first_logits(without), atol=1e-4)
    assert close == (name in SAME)
    assert [CARRIED.format(repr(name)) in text for text in said] == [True] * (name not in SAME)
    assert not two_turns(model, name)[2]  # once


@pytest.mark.parametrize("name", SPECS)
def test_the_first_turns_prompt_lengths_make_the_two_agree(models, name):
    """In every turn: what came after the first prompt is then no prompt, with a cache and without."""
    model = copy.deepcopy(models[0])
    with_cache, without, said = two_turns(model, name, prompt_lengths=[6])
    assert not said
    torch.testing.assert_close(first_logits(with_cache), first_logits(without), atol=1e-4, rtol=1e-3)
    assert with_cache.sequences.tolist() == without.sequences.tolist()
    ids = torch.cat([with_cache.sequences, more(3, 8)], dim=1)
    third = turn(model, ids, name, with_cache.past_key_values, prompt_lengths=[6])
    plain = turn(model, ids, name, prompt_lengths=[6])
    torch.testing.assert_close(first_logits(third), first_logits(plain), atol=1e-4, rtol=1e-3)


def test_what_the_cache_holds_stays_and_new_columns_are_edited_by_the_whole_prompt(models):
    """The definition, against eager hooks: f2+l2 of 6 tokens, then l2 of all 13."""
    from support import model_oracle as oracle

    model, bare = copy.deepcopy(models[0]), models[1]
    one = turn(model, batch_of([6])["input_ids"], "fl")
    ids = torch.cat([one.sequences, more(4, 7)], dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = first_logits(turn(model, ids, "fl", one.past_key_values))
    handles = []
    for intervention in model.reft.adapters["fl"].interventions:

        def hook(module, args, output, intervention=intervention):
            h = output[0] if isinstance(output, tuple) else output
            index = [0, 1, 4, 5, 11, 12]
            h[:, index] = oracle.formula(intervention, h[:, index].double()).to(h.dtype)

        handles.append(bare.model.layers[intervention.layer].register_forward_hook(hook))
    try:
        with torch.no_grad():
            want = bare(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)


def test_no_false_alarm(models):
    model = copy.deepcopy(models[0])
    ids = batch_of([6])["input_ids"]
    from transformers import DynamicCache

    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        turn(model, ids, "fl", DynamicCache(config=model.config))  # an empty one
        turn(model, ids, "__base__", turn(model, ids[:, :3], "__base__").past_key_values)
        assistant = make_model()
        patch_with_mixed(assistant)
        assistant.reft.set_adapter("untied")  # goes on in its own cache, round by round
        turn(model, ids, "fl", assistant_model=assistant)
        turn(model, ids, "fl", num_beams=2)
    assert not carried(record)
