"""Ways to generate: each must give every row what it gets alone, edits and all."""

from __future__ import annotations

import copy

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import elementwise_adapters, mixed_adapters, patch_with_mixed
from support.models import VOCABULARY, batch_of, make_model, row_alone

pytestmark = pytest.mark.models
LENGTHS = [8, 3, 6, 5, 7, 4]
NAMES = ["untied", "everywhere", "__base__", "generated", "red", "red ends"]
BASE = ["__base__"] * len(NAMES)
STEPS = 5


@pytest.fixture(scope="module")
def patched():
    model, bare = make_model(), make_model()
    reft = patch_with_mixed(model)
    for name, adapter in elementwise_adapters().items():
        reft.add_adapter(name, adapter)
    return model, bare


def expected(bare, model, batch, names, steps=STEPS):
    """Greedy tokens of every row alone, through the oracle."""
    rows = []
    for row, name in enumerate(names):
        tokens, _ = oracle.greedy(bare, row_alone(batch, row), model.reft.adapters.get(name), steps)
        rows.append(tokens.tolist())
    return rows


def generate(model, batch, names, **kwargs):
    width = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": STEPS, "do_sample": False, **kwargs}
    out = model.generate(**batch, adapter_names=names, **settings)
    return out[:, width:].tolist()


def test_right_padding_gives_the_same_edit(patched):
    """transformers itself is wrong about right-padded generation; where the edits land is ours."""
    model, _ = patched
    seen = []
    for side in ("left", "right"):
        batch = batch_of(LENGTHS, side)
        with torch.no_grad():
            out = model(**batch, adapter_names=NAMES, output_hidden_states=True)
        h = torch.stack(out.hidden_states, dim=2)
        seen.append([h[row][batch["attention_mask"][row].bool()] for row in range(len(NAMES))])
    for left, right in zip(*seen):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 20])
def test_chunked_prefill(patched, chunk):
    model, bare = patched
    batch = batch_of([6] * len(NAMES))  # without padding: transformers 4.57 ignores it in chunks
    want = expected(bare, model, batch, NAMES)
    assert generate(model, batch, NAMES, prefill_chunk_size=chunk) == want


def test_num_return_sequences_and_sampling_take_each_prompts_adapter(patched):
    """top_k=1 sampling is greedy, so each of the three samples must be the oracle's tokens."""
    model, bare = patched
    batch = batch_of(LENGTHS)
    got = generate(model, batch, NAMES, do_sample=True, top_k=1, num_return_sequences=3)
    want = [row for row in expected(bare, model, batch, NAMES) for _ in range(3)]
    assert got == want


def test_beams_equal_beams_of_each_row_alone(patched):
    model, _ = patched
    batch = batch_of(LENGTHS)
    together = generate(model, batch, NAMES, num_beams=3)
    for row, name in enumerate(NAMES):
        alone = generate(model, row_alone(batch, row), [name], num_beams=3)
        assert together[row] == alone[0], name
    assert together != generate(model, batch, BASE, num_beams=3)


def test_beams_without_an_active_edit_equal_the_bare_model(patched):
    model, bare = patched
    batch = batch_of(LENGTHS)
    got = generate(model, batch, BASE, num_beams=3)
    width = batch["input_ids"].shape[1]
    want = bare.generate(**batch, max_new_tokens=STEPS, do_sample=False, num_beams=3)[:, width:].tolist()
    assert got == want


def test_no_cache(patched):
    model, bare = patched
    batch = batch_of(LENGTHS)
    assert generate(model, batch, NAMES, use_cache=False) == expected(bare, model, batch, NAMES)


def test_inputs_embeds(patched):
    model, bare = patched
    batch = batch_of(LENGTHS)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    got = model.generate(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        adapter_names=NAMES,
        max_new_tokens=STEPS,
        do_sample=False,
    ).tolist()
    assert got == expected(bare, model, batch, NAMES)


@pytest.mark.parametrize("name", ["untied", "everywhere", "generated", "red ends"])
def test_assisted_decoding_and_prompt_lookup(patched, name):
    model, bare = patched
    batch = batch_of([9])
    want = expected(bare, model, batch, [name], 8)
    assistant = make_model(seed=3)
    assert generate(model, batch, [name], max_new_tokens=8, assistant_model=assistant) == want
    assert (
        generate(model, batch, [name], max_new_tokens=8, prompt_lookup_num_tokens=3, eos_token_id=10**6)
        == want
    )


def test_the_model_as_its_own_early_exit_assistant(patched):
    model, bare = patched
    batch = batch_of([9])
    want = expected(bare, model, batch, ["everywhere"], 6)
    assert generate(model, batch, ["everywhere"], max_new_tokens=6, assistant_early_exit=2) == want


def test_a_patched_assistant_edits_as_its_own_adapter_says(patched):
    model, bare = patched
    assistant = copy.deepcopy(model)
    assistant.reft.set_adapter("everywhere")
    batch = batch_of([9])
    want = expected(bare, model, batch, ["everywhere"], 8)
    got = generate(model, batch, ["everywhere"], max_new_tokens=8, assistant_model=assistant)
    assert got == want


def test_guidance_edits_the_second_forward_by_its_own_prompt(patched):
    """Classifier-free guidance runs the model on a negative prompt of another length, with another cache."""
    model, bare = patched
    batch = batch_of([7])
    negative = batch_of([4], seed=5)["input_ids"]
    scale = 1.7
    ids, other = batch["input_ids"], negative
    adapter = model.reft.adapters["untied"]
    tokens = []
    for _ in range(STEPS):
        scores = []
        for sequence, prompt in ((ids, 7), (other, 4)):
            with oracle.eager_hooks(bare, adapter, prompt), torch.no_grad():
                scores.append(bare(input_ids=sequence, use_cache=False).logits[:, -1].log_softmax(-1))
        token = (scale * (scores[0] - scores[1]) + scores[1]).argmax(-1, keepdim=True)
        tokens.append(int(token))
        ids, other = torch.cat([ids, token], 1), torch.cat([other, token], 1)
    got = generate(
        model,
        batch,
        ["untied"],
        guidance_scale=scale,
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=torch.ones_like(negative),
    )
    assert got == [tokens]


def test_conversation_goes_on_with_the_cache(patched):
    """A second turn on the first one's cache: its prompt is the whole conversation."""
    model, bare = patched
    batch = batch_of([6])
    first = model.generate(
        **batch, adapter_names=["generated"], max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    more = torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([first.sequences, more], dim=1)
    again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with_cache = model.generate(
        **again,
        past_key_values=first.past_key_values,
        adapter_names=["generated"],
        max_new_tokens=3,
        do_sample=False,
    )
    # By hand: tokens 6..8 ran as generated in the first turn; the second turn's prompt runs unedited.
    adapter = model.reft.adapters["generated"]

    def step(sequence):
        edited = [i for i in range(sequence.shape[1]) if 6 <= i < 8 or i >= ids.shape[1]]
        with _edit_at(bare, adapter, edited), torch.no_grad():
            return bare(input_ids=sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)

    want = ids
    for _ in range(3):
        want = torch.cat([want, step(want)], dim=1)
    assert with_cache.tolist() == want.tolist()


def _edit_at(model, adapter, index):
    """Eager hooks at given tokens."""
    import contextlib

    @contextlib.contextmanager
    def attached():
        handles = []
        for intervention in adapter.interventions:

            def hook(module, args, output, intervention=intervention):
                h = output[0] if isinstance(output, tuple) else output
                h[:, index] = oracle.formula(intervention, h[:, index].double()).to(h.dtype)

            handles.append(model.model.layers[intervention.layer].register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return attached()


def test_a_decode_step_that_edits_nothing_has_no_plan(patched, monkeypatch):
    """Prompt-only adapters: no op is called, no row packed after the prefill."""
    from reft_kernels import ops
    from reft_kernels.batch import batch_plan as tables
    from reft_kernels.ops import launch

    model, _ = patched
    calls, packs = [], []
    real = tables.pack_rows
    monkeypatch.setattr(tables, "pack_rows", lambda *a: packs.append(1) or real(*a))
    for name, op in list(ops.INTERVENE_.items()):
        monkeypatch.setitem(ops.INTERVENE_, name, lambda *a, op=op: calls.append(a[0].shape) or op(*a))
    with launch.long_way():  # where ops are called by name
        generate(model, batch_of(LENGTHS[:4]), ["untied", "__base__", "tied", "tied"], max_new_tokens=6)
    assert packs == [1]
    assert len(calls) == 3 and all(shape[1] == max(LENGTHS) for shape in calls)


def test_decode_steps_share_one_plan(patched, monkeypatch):
    from reft_kernels.batch import batch_plan as tables

    model, _ = patched
    packs = []
    real = tables.pack_rows
    monkeypatch.setattr(tables, "pack_rows", lambda *a: packs.append(1) or real(*a))
    generate(model, batch_of(LENGTHS), NAMES, max_new_tokens=6)
    assert len(packs) == 2  # the prefill's and the decode steps'


def test_adapters_that_come_and_go_while_generate_runs(patched):
    """Others come and go between decode steps without effect; deleting one in use is an error."""
    model = copy.deepcopy(patched[0])
    batch = batch_of([6, 4])
    want = generate(model, batch, ["everywhere", "generated"])
    extra = mixed_adapters(model.config.hidden_size)["tied"]

    class Swap(list):
        def __call__(self, ids, scores, **kwargs):
            self.append(1)
            if len(self) == 2:
                model.reft.delete_adapter("tied")
                for number in range(6):  # grows the pool too
                    model.reft.add_adapter(f"new{number}", copy.deepcopy(extra))
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    from transformers import StoppingCriteriaList

    swap = Swap()
    got = generate(model, batch, ["everywhere", "generated"], stopping_criteria=StoppingCriteriaList([swap]))
    assert got == want and len(swap) >= 2

    class Delete(list):
        def __call__(self, ids, scores, **kwargs):
            self.append(1)
            if len(self) == 2:
                model.reft.delete_adapter("everywhere")
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    with pytest.raises(ValueError, match="'everywhere' was deleted"):
        generate(
            model, batch, ["everywhere", "generated"], stopping_criteria=StoppingCriteriaList([Delete()])
        )
