"""Names, the active adapter, prompt lengths, labels; and bad input, refused before anything changes."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings

import pytest
import torch
import transformers
from support import model_oracle as oracle
from support.adapters import random_adapter
from support.models import LAYERS, batch_of, make_model, row_alone

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32


@pytest.fixture(scope="module")
def bare():
    return make_model()


def logits(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs).logits


def test_the_first_adapter_is_active_and_later_ones_wait(model, batch):
    assert model.reft.active_adapter == "tied"
    assert torch.equal(logits(model, batch), logits(model, batch, adapter_names=["tied"] * 2))


def test_set_disable_and_delete(model, bare, batch):
    plain = bare(**batch).logits
    reft = model.reft
    reft.set_adapter("everywhere")
    edited = logits(model, batch)
    assert torch.equal(edited, logits(model, batch, adapter_names=["everywhere"] * 2))
    with reft.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
        assert torch.equal(logits(model, batch, adapter_names=["everywhere"] * 2), edited)
    assert torch.equal(logits(model, batch), edited)
    reft.set_adapter(None)
    assert torch.equal(logits(model, batch), plain)
    reft.set_adapter("everywhere")
    reft.delete_adapter("everywhere")
    assert reft.active_adapter is None and "everywhere" not in reft.adapters
    assert torch.equal(logits(model, batch), plain)


def test_only_modules_that_an_adapter_edits_are_touched(model):
    def touched():
        return ["forward" in layer.__dict__ for layer in model.model.layers]

    assert touched() == [True, True, True]
    for name in ("everywhere", "untied", "generated"):
        model.reft.delete_adapter(name)
    assert touched() == [True, False, True]


def test_reft_adapter_names_is_the_same_and_wins(model, batch):
    want = logits(model, batch, adapter_names=["everywhere", "__base__"])
    assert torch.equal(logits(model, batch, reft_adapter_names=["everywhere", "__base__"]), want)


def test_positional_arguments(model, batch):
    with torch.no_grad():
        got = model(batch["input_ids"], batch["attention_mask"], adapter_names=["untied", "tied"]).logits
    assert torch.equal(got, logits(model, batch, adapter_names=["untied", "tied"]))


def test_the_stack_called_by_itself(model, batch):
    """Without the language-model head: model.model(...) is edited too."""
    with torch.no_grad():
        whole = model(**batch, adapter_names=["untied", "tied"], output_hidden_states=True).hidden_states[-1]
        stack = model.model(**batch, adapter_names=["untied", "tied"]).last_hidden_state
    assert torch.equal(whole, stack)


def test_a_decode_loop_by_hand(model, bare):
    """Forward with an empty cache: its tokens are the prompt. With a filled one: they are generated."""
    row = batch_of([7])
    names = ["generated"]
    ids, cache, tokens = row["input_ids"], None, []
    with torch.no_grad():
        for _ in range(5):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, adapter_names=names)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    want, _ = oracle.greedy(bare, row, model.reft.adapters["generated"], 5)
    assert tokens == want.tolist()


def test_prompt_lengths_and_labels_say_what_the_prompt_is(model, bare):
    batch = batch_of([9, 7])
    lengths = [5, 4]
    labels = batch["input_ids"].clone()
    for row, length in enumerate(lengths):
        begin = 9 - [9, 7][row]
        labels[row, : begin + length] = -100
    names = ["untied", "generated"]
    by_length = logits(model, batch, adapter_names=names, prompt_lengths=lengths)
    by_label = logits(model, batch, adapter_names=names, labels=labels)
    torch.testing.assert_close(by_length, by_label)
    for row, name in enumerate(names):
        alone = row_alone(batch, row)
        with torch.no_grad(), oracle.eager_hooks(bare, model.reft.adapters[name], lengths[row]):
            want = bare(input_ids=alone["input_ids"], use_cache=False).logits[0]
        got = by_length[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_prompt_lengths_in_generate(model, bare):
    """Tokens beyond the given length count as generated."""
    batch = batch_of([8])
    got = model.generate(
        **batch, adapter_names=["generated"], prompt_lengths=[5], max_new_tokens=3, do_sample=False
    )[0, 8:]
    ids = batch["input_ids"]
    for _ in range(3):
        with torch.no_grad(), oracle.eager_hooks(bare, model.reft.adapters["generated"], 5):
            ids = torch.cat([ids, bare(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)[None]], 1)
    assert got.tolist() == ids[0, 8:].tolist()


@pytest.mark.parametrize("positions", [[0, 2, -1], [1], "f3", "l2", "prompt", "f2+l2"])
@pytest.mark.parametrize("last", ["length", "length-1"])
def test_positions(bare, positions, last):
    config = rk.ReftConfig(r=2, positions=positions, last_position=last, share_weights=True)
    model = make_model()
    rk.patch(model).add_adapter("a", random_adapter(config, WIDTH))
    batch = batch_of([7, 4, 9])
    got = logits(model, batch)
    for row in range(3):
        want = oracle.forward(bare, row_alone(batch, row), model.reft.adapters["a"])
        seen = batch["attention_mask"][row].bool()
        torch.testing.assert_close(got[row][seen], want, atol=2e-4, rtol=1e-4)


def test_the_mask_is_inferred_from_pad_tokens_as_generate_does(model):
    batch = batch_of([6, 3])
    with_mask = model.generate(**batch, adapter_names=["untied", "untied"], max_new_tokens=3, do_sample=False)
    without = model.generate(
        batch["input_ids"], adapter_names=["untied", "untied"], max_new_tokens=3, do_sample=False
    )
    assert torch.equal(with_mask, without)


# Bad input ------------------------------------------------------------------------------------------------


def refuses(model, batch, match, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
        logits(model, batch, **kwargs)
    assert model.reft._runtime.plan is None and model.reft._runtime.depth == 0


def test_bad_names(model, batch):
    refuses(model, batch, r"adapter_names: there is no adapter 'nobody'", adapter_names=["nobody", "tied"])
    refuses(model, batch, r"adapter_names: has 3 names for a batch of 2 rows", adapter_names=["tied"] * 3)
    refuses(model, batch, r"adapter_names: must be a list", adapter_names="tied")
    with pytest.raises(ValueError, match="there is no adapter 'nobody'"):
        model.generate(**batch, adapter_names=["nobody", "tied"])
    with pytest.raises(ValueError, match="has 1 names for a batch of 2"):
        model.generate(**batch, adapter_names=["tied"])


def test_bad_prompts(model, batch):
    reft = model.reft
    reft.add_adapter("indices", random_adapter(rk.ReftConfig(r=1, positions=[0, 5]), WIDTH))
    refuses(
        model, batch, r"row 1, adapter 'indices'.*outside a prompt of 4 tokens", adapter_names=["indices"] * 2
    )
    refuses(model, batch, r"prompt_lengths: has 1 entries for a batch of 2", prompt_lengths=[3])
    refuses(model, batch, r"row 1 has 4 tokens, but its prompt length was 5", prompt_lengths=[3, 5])
    refuses(model, batch, r"row 0 has an empty prompt", prompt_lengths=[0, 3])
    refuses(model, batch, r"row 0 has an empty prompt", labels=batch["input_ids"])
    empty = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    refuses(model, empty, r"row 0 has an empty prompt")
    full = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    refuses(model, {**batch, "attention_mask": full}, r"attention_mask: must be 2-D")
    packed = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    whole = batch_of([6, 6])
    refuses(model, whole, r"position_ids: restart inside a row", position_ids=packed)


def test_labels_without_a_prompt_are_fine_where_positions_need_none(model, batch):
    logits(model, batch, labels=batch["input_ids"], adapter_names=["everywhere"] * 2)


def test_adapters_that_do_not_fit_leave_those_that_were_there(model, batch):
    reft = model.reft
    before, names = logits(model, batch), list(reft.adapters)
    config = rk.ReftConfig(r=1, layers=[0])
    for adapter, match in (
        (random_adapter(config, 16), "width 16"),
        (random_adapter(config, WIDTH, n_layers=LAYERS + 1), f"model of {LAYERS + 1} layers"),
        (random_adapter(rk.ReftConfig(r=1, layers=[7]), WIDTH, n_layers=8), "8 layers"),
        (rk.ReftConfig(r=1, layers=[9]), "no layer 9"),
        (rk.ReftConfig(r=WIDTH + 1), "r: "),
        ("tied", "must be a ReftConfig"),
    ):
        with pytest.raises(ValueError, match=match):
            reft.add_adapter("new", adapter)
    with pytest.raises(ValueError, match="there is an adapter 'tied' already"):
        reft.add_adapter("tied", config)
    with pytest.raises(ValueError, match="name: "):
        reft.add_adapter("__base__", config)
    with pytest.raises(ValueError):
        reft.load_adapter("no/such/folder/here", "new", positions="f1")
    for call in (reft.delete_adapter, reft.set_adapter):
        with pytest.raises(ValueError, match="there is no adapter 'nobody'"):
            call("nobody")
    assert list(reft.adapters) == names and torch.equal(logits(model, batch), before)


def test_a_full_pool_is_an_error_and_changes_nothing(batch):
    model = make_model()
    reft = rk.patch(model, capacity=8)
    reft.add_adapter("fits", random_adapter(rk.ReftConfig(r=2, positions="all"), WIDTH))
    before = logits(model, batch)
    pool = next(iter(reft._store.pools.values()))
    address = pool.down.data_ptr()
    with pytest.raises(rk.PoolFull, match="capacity"):
        reft.add_adapter("does not", random_adapter(rk.ReftConfig(r=1, positions="all"), WIDTH))
    assert pool.used == 6 and list(reft.adapters) == ["fits"] and torch.equal(logits(model, batch), before)
    reft.delete_adapter("fits")
    reft.add_adapter("now", random_adapter(rk.ReftConfig(r=2, positions="all"), WIDTH))
    assert pool.down.data_ptr() == address


def test_patching_twice_or_what_has_no_layers():
    model = make_model()
    rk.patch(model)
    with pytest.raises(rk.NotPatchable, match="patched already"):
        rk.patch(model)
    rk.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        rk.unpatch(model)
    with pytest.raises(rk.NotPatchable, match="config"):
        rk.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="capacity"):
        rk.patch(model, capacity=0)
    with pytest.raises(ValueError, match="pool_dtype"):
        rk.patch(model, pool_dtype=torch.int8)
    import transformers as tf

    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    )
    with pytest.raises(rk.NotPatchable, match="encoder-decoder"):
        rk.patch(t5)
    assert not hasattr(t5, "reft")


def test_bad_values_warn_with_the_tensors_name(model):
    adapter = random_adapter(rk.ReftConfig(r=1, layers=[1]), WIDTH)
    adapter.interventions[0].W.data[0, 3] = float("nan")
    with pytest.warns(UserWarning, match=r"'bad': interventions\.0\.W holds NaN"):
        model.reft.add_adapter("bad", adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.reft.add_adapter("good", random_adapter(rk.ReftConfig(r=1), WIDTH))


def test_unknown_keywords_still_raise_in_generate(model, batch):
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**batch, speed=["tied"], max_new_tokens=1)
    # In forward's signature, by which generate tells: with the other name it would go from step to step.
    with pytest.raises(ValueError, match="adapter_names: is not used by the model"):
        model.generate(**batch, reft_adapter_names=["tied"] * 2, adapter_names=["tied"] * 2, max_new_tokens=1)


@pytest.mark.parametrize(
    "slip, meant",
    [
        ("adapter_name", "adapter_names"),
        ("adapters", "adapter_names"),
        ("adapter", "adapter_names"),
        ("Adapter_names", "adapter_names"),
        ("reft_adapter_name", "reft_adapter_names"),
        ("reft_adapter", "reft_adapter_names"),
        ("prompt_length", "prompt_lengths"),
        ("prompt_lens", "prompt_lengths"),
    ],
)
def test_a_slip_in_a_keyword_is_an_error(model, batch, slip, meant):
    """Llama's forward takes any keyword, and would run the active adapter on every row."""
    message = rf"{slip}: is no argument of \w+; {meant} is"
    for _ in range(2):  # what was let through once must not be let through for good
        logits(model, batch, some_flag_of_the_models=1)
        for call in (model, model.model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**batch, **{slip: ["tied"] * 2})


def test_a_keyword_that_the_models_forward_has_is_no_slip(batch):
    class Own(transformers.LlamaForCausalLM):
        def forward(self, *args, adapter_name=None, prompt_lengths=None, **kwargs):
            self.seen = adapter_name
            return super().forward(*args, **kwargs)

    model = Own(make_model().config)
    rk.patch(model)
    logits(model, batch, adapter_name="theirs")
    assert model.seen == "theirs"
    signature = inspect.signature(model.forward)
    assert list(signature.parameters) == [
        "args", "adapter_name", "prompt_lengths", "reft_adapter_names", "adapter_names", "reft_positions",
        "reft_scale", "kwargs",
    ]  # fmt: skip


def test_no_keyword_of_transformers_looks_like_a_slip():
    """Of generate's settings, and of the forwards of all language models."""
    from transformers.models.auto import modeling_auto

    from reft_kernels.huggingface.slips import OURS, meant_by

    found = {*vars(transformers.GenerationConfig()), *inspect.signature(make_model().generate).parameters}
    for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        model = getattr(transformers, name, None)
        if model is not None and hasattr(model, "forward"):
            found |= set(inspect.signature(model.forward).parameters)
    assert len(found) > 100
    assert not [name for name in found - set(OURS) if meant_by(name)]


def test_forwards_signature_shows_what_is_ours(model):
    bare = make_model()
    ours = ["reft_adapter_names", "adapter_names", "prompt_lengths", "reft_positions", "reft_scale"]
    own = list(inspect.signature(bare.forward).parameters)
    got = inspect.signature(model.forward)
    assert list(got.parameters) == [*own[:-1], *ours, own[-1]]
    assert all(got.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours)
    for there in (copy.deepcopy(model), functools.wraps(model.forward)(lambda *a, **k: None)):
        assert inspect.signature(getattr(there, "forward", there)) == got
    rk.unpatch(model)
    assert inspect.signature(model.forward) == inspect.signature(bare.forward)
