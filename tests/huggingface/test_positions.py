"""Positions beyond pyreft's, in a model: slices of prompt and answer, unions, token ids."""

from __future__ import annotations

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import random_adapter
from support.models import batch_of, make_model, row_alone

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32
SPECS = {
    "slice": "prompt[1:-1:2]",
    "window": "prompt[-1:]+generated[:3]",
    "stride": "generated[::3]",
    "one": "generated[0]",
    "untied": "f2+generated[2:]",
    "all but": "all-prompt[:1]",
    "by id": None,  # the ids that occur are known once the model has answered
}
LENGTHS = [7, 3, 5, 2, 6, 4, 7]


def configured(spec: str, name: str) -> rk.ReftConfig:
    return rk.ReftConfig(r=2, positions=spec, share_weights=False if name == "untied" else None)


@pytest.fixture(scope="module")
def bare():
    return make_model()


@pytest.fixture(scope="module")
def model(bare):
    model = make_model()
    reft = rk.patch(model)
    row = row_alone(batch_of(LENGTHS), 6)
    answer, _ = oracle.greedy(bare, row, None, 8)
    ids = [int(row["input_ids"][0, 2]), *answer.tolist()[1:7:2]]
    for seed, (name, spec) in enumerate(SPECS.items()):
        config = configured(spec or f"token({','.join(map(str, ids))})", name)
        reft.add_adapter(name, random_adapter(config, WIDTH, seed=seed))
    return model


@pytest.mark.parametrize("cache", ["dynamic", "static", "chunked"])
def test_generate_equals_each_row_alone(model, bare, cache):
    batch = batch_of(LENGTHS)
    options = {"static": {"cache_implementation": "static"}, "chunked": {"prefill_chunk_size": 3}}
    lengths = LENGTHS
    if cache == "chunked":  # transformers 4 ignores padding in chunks
        lengths = [6] * len(SPECS)
        batch = batch_of(lengths)
    out = model.generate(
        **batch,
        adapter_names=list(SPECS),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options.get(cache, {}),
    )
    logits = torch.stack(out.logits, dim=1)
    for row, name in enumerate(SPECS):
        adapter = model.reft.adapters[name]
        tokens, want = oracle.greedy(bare, row_alone(batch, row), adapter, 8)
        assert out.sequences[row, -8:].tolist() == tokens.tolist(), name
        torch.testing.assert_close(logits[row], want, atol=1e-3, rtol=1e-3)
        # (A row of six random tokens need not hold one of the ids.)
        _, plain = oracle.greedy(bare, row_alone(batch, row), None, 8)
        assert cache == "chunked" or not torch.allclose(want, plain, atol=1e-2), f"{name} edits nothing"


def test_beams_are_told_apart_by_their_ids():
    """Each beam has tokens of its own, and is edited where they say so."""
    model = make_model()
    config = rk.ReftConfig(r=2, positions=f"token({','.join(map(str, range(1, 97, 2)))})")
    rk.patch(model).add_adapter("by id", random_adapter(config, WIDTH))
    batch = batch_of([7])
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    beams = model.generate(**batch, adapter_names=["by id"], **options)
    without = model.generate(**batch, adapter_names=["by id"], use_cache=False, **options)
    assert torch.equal(beams, without)
    assert not torch.equal(beams, model.generate(**batch, adapter_names=["__base__"], **options))


def test_labels_say_where_the_answer_begins(model, bare):
    batch = batch_of([9, 7], "right")
    labels = batch["input_ids"].clone()
    lengths = [5, 4]
    for row, length in enumerate(lengths):
        labels[row, :length] = -100
    labels[1, 7:] = -100
    names = ["window", "stride"]
    with torch.no_grad():
        got = model(**batch, labels=labels, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = row_alone(batch, row)
        with torch.no_grad(), oracle.eager_hooks(bare, model.reft.adapters[name], lengths[row]):
            want = bare(input_ids=alone["input_ids"], use_cache=False).logits[0]
        torch.testing.assert_close(got[row, : len(want)], want, atol=2e-4, rtol=1e-4)


def test_a_decode_loop_by_hand_says_where_the_prompt_ended(model, bare):
    row = batch_of([7])
    ids, cache, tokens = row["input_ids"], None, []
    with torch.no_grad():
        for step in range(6):
            kwargs = {"past_key_values": cache, "use_cache": True, "adapter_names": ["stride"]}
            if step == 1:
                with pytest.raises(ValueError, match="give prompt_lengths"):
                    model(input_ids=ids, **kwargs)
            out = model(input_ids=ids, prompt_lengths=[7], **kwargs)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    want, _ = oracle.greedy(bare, row, model.reft.adapters["stride"], 6)
    assert tokens == want.tolist()


def test_ids_are_needed_where_ids_tell(model):
    batch = batch_of([5])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with pytest.raises(ValueError, match="input_ids: needed by adapters with positions by token id"):
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], adapter_names=["by id"])
    model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], adapter_names=["slice"])


def test_a_folder_keeps_them(model, tmp_path):
    adapter = model.reft.adapters["untied"]
    adapter.save_pretrained(tmp_path)
    again = rk.Adapter.from_pretrained(tmp_path)
    assert again.groups == adapter.groups and list(map(str, again.groups)) == ["f2", "generated[2:]"]
    assert again.config == adapter.config


def test_one_set_of_parameters_for_a_union_unless_it_is_said(model):
    def groups(spec, **options):
        return [str(one) for one in rk.ReftConfig(positions=spec, **options).position_groups()]

    assert groups("prompt[-1:]+generated") == ["prompt[-1:]+generated"]
    assert groups("prompt[-1:]+generated", share_weights=False) == ["prompt[-1:]", "generated"]
    assert groups("f3+l3") == ["f3", "l3"] and groups("f3+l3", share_weights=True) == ["f3+l3"]
    # A token that both terms name belongs to the first.
    assert groups("prompt[:3]+prompt", share_weights=False) == ["prompt[:3]", "prompt-prompt[:3]"]
    config = rk.ReftConfig(r=1, positions="prompt[:3]+prompt", share_weights=False)
    assert len(rk.Adapter.from_config(config, 2, 8).interventions) == 4
