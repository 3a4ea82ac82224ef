"""Ways to go wrong that were found by looking for them; each left a model wrongly edited, or half changed."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from support import model_oracle as oracle
from support.adapters import mixed_adapters, patch_with_mixed, random_adapter
from support.models import batch_of, make_model, row_alone
from transformers import GenerationConfig

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32


@pytest.fixture
def model():
    model = make_model()
    patch_with_mixed(model)
    return model


def logits(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs).logits


def tokens(model, batch, steps=5, **kwargs):
    out = model.generate(**batch, max_new_tokens=steps, do_sample=False, **kwargs)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}])
def test_patching_pefts_wrapper_patches_the_model_inside(more):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapper = peft.get_peft_model(make_model(), config).eval()
    reft = rk.patch(wrapper)
    assert wrapper.reft is reft and wrapper.get_base_model().reft is reft
    reft.add_adapter("a", mixed_adapters(WIDTH)["untied"])
    batch = batch_of([6])
    want, _ = oracle.greedy(make_model(), batch, reft.adapters["a"], 5)
    assert tokens(wrapper, batch, **more) == [want.tolist()]
    with pytest.raises(rk.NotPatchable):
        rk.patch(wrapper)
    rk.unpatch(wrapper)
    assert not hasattr(wrapper, "reft") and not hasattr(wrapper.get_base_model(), "reft")


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


@pytest.mark.parametrize("trainable", [False, True])
def test_inputs_embeds_of_the_caller_are_not_written_with_gradients_on(trainable):
    model = make_model()
    config = rk.ReftConfig(r=2, layers=[0], site="block_input", positions="all")
    rk.patch(model).add_adapter("a", config if trainable else random_adapter(config, WIDTH))
    embeds = model.get_input_embeddings()(batch_of([5])["input_ids"]).detach()
    kept = embeds.clone()
    edited = model(inputs_embeds=embeds).logits
    assert torch.equal(embeds, kept)
    assert not torch.equal(edited, make_model()(inputs_embeds=embeds).logits)


def test_a_head_that_the_model_lacks_is_refused(model):
    site = "head_attention_value_output"
    config = rk.ReftConfig(r=1, layers=[0], site=site, positions="f1", heads=[4], share_weights=True)
    with pytest.raises(ValueError, match="head 4; the model has 4 heads"):
        model.reft.add_adapter("a", random_adapter(config, 8))
    assert "a" not in model.reft.adapters


def test_the_mask_is_inferred_with_another_generation_config(model):
    batch = batch_of([7, 3])
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    names = ["untied", "untied"]
    want = model.generate(**batch, generation_config=config, adapter_names=names)
    assert torch.equal(
        model.generate(batch["input_ids"], generation_config=config, adapter_names=names), want
    )
    assert torch.equal(model.generate(batch["input_ids"], config, adapter_names=names), want)


@pytest.mark.parametrize("cache", [True, False])
def test_guidance_keeps_its_prompt_without_a_cache(model, cache):
    batch, negative = batch_of([7]), batch_of([4], seed=5)["input_ids"]
    model.reft.add_adapter("l2", random_adapter(rk.ReftConfig(r=2, positions="l2"), WIDTH, scale=0.3))
    found = [
        tokens(
            model,
            batch,
            adapter_names=["l2"],
            guidance_scale=1.7,
            negative_prompt_ids=negative,
            negative_prompt_attention_mask=torch.ones_like(negative),
            use_cache=use_cache,
        )
        for use_cache in (True, cache)
    ]
    assert found[0] == found[1]


def test_a_generate_of_another_prompt_inside_generate(model):
    """In a stopping criterion, say: it has a prompt of its own, not the outer one's columns."""
    other = batch_of([5], seed=8)
    model.reft.set_adapter("untied")
    want = tokens(model, other)
    found = []

    def criterion(ids, scores, **kwargs):
        found.append(tokens(model, other))
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    outer = batch_of([8])
    alone = tokens(model, outer, adapter_names=["everywhere"])
    from transformers import StoppingCriteriaList

    criteria = StoppingCriteriaList([criterion])
    assert tokens(model, outer, adapter_names=["everywhere"], stopping_criteria=criteria) == alone
    assert found and all(one == want for one in found)


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


def test_a_backend_that_cannot_run_is_said_before_anything_runs(model, monkeypatch):
    from reft_kernels.ops import dispatch, native

    monkeypatch.setattr(native, "cpu_missing", "taken away for this test")
    monkeypatch.setattr(dispatch, "_resolved", {})
    with rk.backend("native"), pytest.raises(rk.BackendUnavailable, match="taken away"):
        logits(model, batch_of([5]))


def test_a_pool_dtype_that_the_model_cannot_use_is_refused():
    reft = rk.patch(make_model(), pool_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="pool_dtype: must be the model's"):
        reft.add_adapter("a", random_adapter(rk.ReftConfig(r=1), WIDTH))
    assert not reft.adapters


def test_adapters_added_in_inference_mode_train_later():
    model = make_model()
    with torch.inference_mode():
        rk.patch(model).add_adapter("a", rk.ReftConfig(r=1, positions="all"))
        model(**batch_of([4]))
    model(**batch_of([4])).logits.sum().backward()
    assert all(p.grad is not None for p in model.reft.adapters["a"].parameters())


def test_backward_does_not_mind_what_happens_to_the_pool_before_it():
    """A frozen adapter above a trained layer: loads, evaluations and other forwards come before backward."""

    def gradients(disturb):
        model = make_model()
        reft = rk.patch(model)
        reft.add_adapter("frozen", random_adapter(rk.ReftConfig(r=2, positions="all"), WIDTH, scale=0.3))
        torch.manual_seed(0)
        reft.add_adapter("trained", rk.ReftConfig(r=1, positions="all", layers=[0]))
        model.model.embed_tokens.weight.requires_grad_(True)
        batch = batch_of([5, 5])
        loss = model(**batch, adapter_names=["frozen", "trained"]).logits.square().mean()
        if disturb:
            logits(model, batch, adapter_names=["trained", "frozen"])
            reft.delete_adapter("frozen")
            reft.add_adapter("new", random_adapter(rk.ReftConfig(r=9, positions="all"), WIDTH, seed=3))
            model(**batch, adapter_names=["new", "trained"])
        loss.backward()
        return model.model.embed_tokens.weight.grad

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_cache_goes_on_under_another_adapter(model):
    """Only the new tokens run under the new adapter; what is cached stays as it was made."""
    first = batch_of([6])
    with torch.no_grad():
        one = model(**first, use_cache=True, adapter_names=["untied"])
        cache, step = one.past_key_values, one.logits[:, -1:].argmax(-1)
        got = model(input_ids=step, past_key_values=cache, adapter_names=["everywhere"]).logits[0, -1]
        ids = torch.cat([first["input_ids"], step], dim=1)
        bare = make_model()
        handles = []
        for layer, block in enumerate(bare.model.layers):

            def hook(module, args, output, layer=layer):
                for name, where in (("untied", None), ("everywhere", [6])):
                    for one in model.reft.adapters[name].interventions:
                        if one.layer == layer:
                            index = oracle.columns(one.positions, 6, 6) if where is None else where
                            output[:, index] = oracle.formula(one, output[:, index].double()).to(output.dtype)

            handles.append(block.register_forward_hook(hook))
        want = bare(input_ids=ids, use_cache=False).logits[0, -1]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sliding_windows(family, cache):
    model, bare = make_model(family), make_model(family)
    for one in (model, bare):
        one.config.sliding_window = 4
        for module in one.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = 4
    reft = patch_with_mixed(model)
    batch = batch_of([9, 6])
    names = ["untied", "everywhere"]
    got = tokens(model, batch, adapter_names=names, cache_implementation=cache)
    for row, name in enumerate(names):
        want, _ = oracle.greedy(bare, row_alone(batch, row), reft.adapters[name], 5)
        assert got[row] == want.tolist()


def test_continuous_batching_takes_adapters_that_need_no_prompt():
    model = make_model()
    reft = patch_with_mixed(model)
    prompts = [[5, 6, 7, 8], [9, 10]]
    for name in ("tied", "generated"):
        reft.set_adapter(name)
        for method in (model.generate_batch, model.init_continuous_batching):
            with pytest.raises(ValueError, match=f"adapter '{name}' depends on the prompt"):
                method(prompts)
    reft.set_adapter("everywhere")
    with pytest.raises(ValueError, match="takes no adapter names"):
        model.generate_batch(prompts, adapter_names=["tied", "tied"])
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("the continuous batching of transformers 4 needs a GPU")
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Else its cache takes most of the machine's memory.
    size = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
    found = {}
    for name in ("everywhere", None):
        reft.set_adapter(name)
        results = model.generate_batch(prompts, config, size)
        found[name] = [result.generated_tokens for result in results.values()]
        for prompt, tokens in zip(prompts, found[name]):
            want = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
            assert tokens == want[0, len(prompt) :].tolist()
    assert found["everywhere"] != found[None]
