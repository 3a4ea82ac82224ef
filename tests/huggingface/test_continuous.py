"""transformers' continuous batching: an adapter for each request, whatever its positions."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.adapters import elementwise_adapters, patch_with_mixed, random_adapter
from support.models import make_model
from transformers import GenerationConfig

import reft_kernels as rk
from reft_kernels.huggingface import continuous

pytestmark = pytest.mark.models
PROMPTS = [[5, 6, 7, 8, 11, 3], [9, 10], [5, 6, 7, 8, 20, 30, 40], [5, 6, 7, 8], [12, 13, 14], [5, 6, 7, 8]]
NAMES = ["tied", "untied", "generated", "everywhere", "__base__", "late"]
PROMPTS += [[5, 6, 7, 8], [20, 21, 22, 23, 24], [9, 10, 11]]
NAMES += ["red", "red ends", "jola"]

needs_requests = pytest.mark.skipif(
    continuous.why_not() is not None, reason="this transformers does not say which tokens are whose"
)


def settings(**options):
    """Small: else a manager's cache takes most of the machine's memory."""
    page = "page_size" if "page_size" in vars(transformers.ContinuousBatchingConfig()) else "block_size"
    sizes = {"num_blocks": 24, "max_batch_tokens": 16, page: 32} | options
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return config, transformers.ContinuousBatchingConfig(**sizes)


def patched(**options):
    model = make_model()
    reft = patch_with_mixed(model, **options)
    extra = {
        "late": rk.ReftConfig(r=2, positions="prompt[-1:]+generated[1:3]"),
        "by id": rk.ReftConfig(r=2, positions="token(8,74)"),
        "head": rk.ReftConfig(r=2, positions="all", site="lm_head_input"),
    }
    for seed, (name, config) in enumerate(extra.items()):
        reft.add_adapter(name, random_adapter(config, 32, seed=seed))
    for name, adapter in elementwise_adapters().items():
        reft.add_adapter(name, adapter)
    return model


@pytest.fixture(scope="module")
def model():
    return patched()


def alone(model, prompt, name, steps=5):
    out = model.generate(torch.tensor([prompt]), adapter_names=[name], max_new_tokens=steps, do_sample=False)
    return out[0, len(prompt) :].tolist()


def answers(results):
    return [result.generated_tokens for result in results.values()]


@needs_requests
@pytest.mark.parametrize("attention", ["paged|eager", "sdpa"])
@pytest.mark.parametrize("chunk", [16, 4])
def test_mixed_requests_equal_each_alone(model, attention, chunk):
    """In chunks of prompts, too: of 16 tokens a batch, and of 4."""
    want = [alone(model, prompt, name) for prompt, name in zip(PROMPTS, NAMES)]
    model.set_attn_implementation(attention)
    try:
        found = answers(model.generate_batch(PROMPTS, *settings(max_batch_tokens=chunk), adapter_names=NAMES))
    finally:
        model.set_attn_implementation("sdpa")
    assert found == want
    bare = [alone(model, prompt, "__base__") for prompt in PROMPTS]
    assert sum(one != other for one, other in zip(found, bare)) >= 4, "the edits hardly matter"


@needs_requests
def test_prompts_that_are_alike_are_not_shared(model):
    """The same prompt under other adapters has other keys and values."""
    prompts = [list(range(3, 70))] * 4
    names = ["everywhere", "__base__", "tied", "everywhere"]
    found = answers(model.generate_batch(prompts, *settings(max_batch_tokens=64), adapter_names=names))
    assert found == [alone(model, prompt, name) for prompt, name in zip(prompts, names)]
    assert found[0] == found[3] != found[1]


@needs_requests
def test_by_token_id_and_at_the_head(model):
    """What goes into the language-model head are some of the batch's tokens only."""
    prompts, names = [[5, 8, 7], [8, 8, 9, 12], [5, 6]], ["by id", "head", "head"]
    found = answers(model.generate_batch(prompts, *settings(), adapter_names=names))
    assert found == [alone(model, prompt, name) for prompt, name in zip(prompts, names)]


@needs_requests
def test_a_manager_takes_requests_one_by_one(model):
    manager = model.init_continuous_batching(*settings())
    manager.start()
    try:
        ids = {}
        for prompt, name in zip(PROMPTS, NAMES):
            ids[manager.add_request(prompt, adapter_name=name)] = (prompt, name)
        more = manager.add_requests(PROMPTS[:2], adapter_names=["late", "tied"], max_new_tokens=3)
        ids |= dict(zip(more, zip(PROMPTS, ["late", "tied"])))
        with pytest.raises(ValueError, match="adapter_names: there is no adapter 'nobody'"):
            manager.add_request([3, 4], adapter_name="nobody")
        done = {}
        while len(done) < len(ids):
            result = manager.get_result(timeout=60)
            assert result is not None and result.error is None
            if result.is_finished():
                done[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True)
    for request, (prompt, name) in ids.items():
        assert done[request] == alone(model, prompt, name, len(done[request])), name


@needs_requests
def test_requests_thrown_out_of_a_full_cache_come_back(model):
    """With their answers in what they prefill: those stay generated tokens."""
    prompts = [list(range(3 + i, 30 + i)) for i in range(4)]
    names = ["generated", "tied", "late", "untied"]
    config, sizes = settings(num_blocks=6, max_batch_tokens=32)
    config.max_new_tokens = 40
    resets = []
    real = transformers.generation.continuous_batching.requests.RequestState.create_equivalent_initial_request
    request = transformers.generation.continuous_batching.requests.RequestState
    request.create_equivalent_initial_request = lambda self: resets.append(self.request_id) or real(self)
    try:
        found = answers(model.generate_batch(prompts, config, sizes, adapter_names=names))
    finally:
        request.create_equivalent_initial_request = real
    assert resets, "nothing was thrown out"
    assert found == [alone(model, prompt, name, 40) for prompt, name in zip(prompts, names)]


@needs_requests
def test_several_answers_to_a_request(model):
    config, sizes = settings()
    config.num_return_sequences = 2
    found = answers(model.generate_batch(PROMPTS[:2], config, sizes, adapter_names=["tied", "untied"]))
    want = [alone(model, prompt, name) for prompt, name in zip(PROMPTS, ["tied", "untied"])]
    assert found == [want[0], want[0], want[1], want[1]]


@needs_requests
def test_an_adapter_in_use_is_not_deleted():
    """Neither while its request waits in the queue, nor while it runs; the others are answered."""
    model = patched()
    reft = model.reft
    manager = model.init_continuous_batching(*settings())
    waiting = manager.add_request(PROMPTS[0], adapter_name="untied", max_new_tokens=3)
    with pytest.raises(ValueError, match=rf"'untied' has 1 unfinished request.*{waiting}.*cancel_request"):
        reft.delete_adapter("untied")
    with pytest.raises(ValueError, match="'untied' has 1 unfinished request"):
        rk.unpatch(model)
    reft.delete_adapter("late")
    with pytest.raises(ValueError, match="there is no adapter 'late'"):
        manager.add_request([3, 4], adapter_name="late")
    long = manager.add_request(PROMPTS[1], adapter_name="tied", max_new_tokens=40, streaming=True)
    manager.start()
    try:
        done, refused = {}, 0
        while len(done) < 2:
            result = manager.get_result(timeout=60)
            assert result is not None and result.error is None
            if result.is_finished():
                done[result.request_id] = result.generated_tokens
            elif len(result.generated_tokens) < 20:  # the rest may be there before the answer to this
                with pytest.raises(ValueError, match=rf"'tied' has 1 unfinished request.*{long}"):
                    reft.delete_adapter("tied")
                refused += 1
        assert refused
        want = {waiting: alone(model, PROMPTS[0], "untied", 3), long: alone(model, PROMPTS[1], "tied", 40)}
        assert done == want
        cancelled = manager.add_request(PROMPTS[0], adapter_name="untied", max_new_tokens=100)
        manager.cancel_request(cancelled)
        left = manager.add_request(PROMPTS[2], adapter_name="everywhere", max_new_tokens=2)
        assert manager.get_result(timeout=60).request_id == left
        for name in ("tied", "untied", "everywhere"):
            reft.delete_adapter(name)
        with pytest.raises(ValueError, match="there is no adapter 'tied'"):
            manager.add_request([3, 4], adapter_name="tied")
        manager.add_request([3, 4], adapter_name="__base__", max_new_tokens=2)
        assert manager.get_result(timeout=60).error is None
    finally:
        manager.stop(block=True)


@needs_requests
def test_the_active_adapter_and_fused_norms():
    model = patched(fuse_norm=True)
    model.reft.set_adapter("tied")
    found = answers(model.generate_batch(PROMPTS[:3], *settings()))
    assert found == [alone(model, prompt, "tied") for prompt in PROMPTS[:3]]


@needs_requests
def test_bad_requests(model):
    def refuses(match, prompts=PROMPTS[:2], **kwargs):
        with pytest.raises(ValueError, match=match):
            model.generate_batch(prompts, *settings(), **kwargs)

    refuses("adapter_names: has 1 names for a batch of 2", adapter_names=["tied"])
    refuses("adapter_names: there is no adapter 'nobody'", adapter_names=["tied", "nobody"])
    refuses("generate_batch: takes adapter_names, but no", prompt_lengths=[1, 1])
    with pytest.raises(ValueError, match="manager's add_request takes adapter_name"):
        model.init_continuous_batching(*settings(), adapter_names=["tied"])
    reft = model.reft
    reft.add_adapter("far", random_adapter(rk.ReftConfig(r=1, positions=[4]), 32))
    refuses(r"row 1, adapter 'far': .*outside a prompt of 2 tokens", adapter_names=["far", "far"])
    reft.delete_adapter("far")


def test_where_requests_are_not_known(monkeypatch):
    """Names are refused by the version's name; the active adapter works if it needs no prompt."""
    monkeypatch.setattr(continuous, "why_not", lambda: "transformers 4.0 does not say which tokens are whose")
    model = make_model()
    reft = patch_with_mixed(model)
    prompts = [[5, 6, 7, 8], [9, 10]]
    for name in ("tied", "generated"):
        reft.set_adapter(name)
        for method in (model.generate_batch, model.init_continuous_batching):
            with pytest.raises(ValueError, match=f"adapter '{name}' depends on the prompt"):
                method(prompts)
    reft.set_adapter("everywhere")
    with pytest.raises(ValueError, match="takes no adapter names, as transformers 4.0 does not say"):
        model.generate_batch(prompts, adapter_names=["tied", "tied"])
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("the continuous batching of transformers 4 needs a GPU")
    found = {}
    for name in ("everywhere", None):
        reft.set_adapter(name)
        found[name] = answers(model.generate_batch(prompts, *settings()))
        assert found[name] == [alone(model, prompt, name or "__base__", 5) for prompt in prompts]
    assert found["everywhere"] != found[None]
