"""A patched model on a GPU: what it is on the CPU; generate with a static cache, whose decode is compiled."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import transformers
from support.adapters import patch_with_mixed, random_adapter
from support.models import batch_of, make_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import reft_kernels as rk
from reft_kernels.huggingface import continuous

pytestmark = [pytest.mark.gpu, pytest.mark.models]

LENGTHS, STEPS = [8, 3, 6, 5], 6
NAMES = ["untied", "everywhere", "__base__", "generated"]
OTHERS = ["everywhere", "generated", "tied", "__base__"]


norms = pytest.mark.parametrize("fuse_norm", [False, True], ids=["norms apart", "norms fused"])


def _patched(device: str, fuse_norm: bool = False):
    model = make_model().to(device)
    patch_with_mixed(model, fuse_norm=fuse_norm)
    return model


def _batch(device: str, lengths: list[int] = LENGTHS) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in batch_of(lengths).items()}


def _tokens(model, names: list[str], **options) -> list[list[int]]:
    batch = _batch(str(model.device))
    with torch.no_grad():
        out = model.generate(**batch, adapter_names=names, max_new_tokens=STEPS, do_sample=False, **options)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.fixture
def full_precision():
    """float32 products in float32, as on the CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, list]:
    """Logits and tokens of the same model on the CPU, by the reference backend."""
    model = _patched("cpu")
    with rk.backend("reference"), torch.no_grad():
        return {
            "logits": model(**_batch("cpu"), adapter_names=NAMES).logits,
            "names": _tokens(model, NAMES),
            "others": _tokens(model, OTHERS),
        }


@norms
def test_logits_and_tokens_are_the_cpus(
    fused: str, fuse_norm: bool, on_cpu: dict, full_precision: None
) -> None:
    model = _patched("cuda", fuse_norm)
    with torch.no_grad():
        logits = model(**_batch("cuda"), adapter_names=NAMES).logits.cpu()
    real = _batch("cpu")["attention_mask"].bool()
    torch.testing.assert_close(logits[real], on_cpu["logits"][real], atol=2e-3, rtol=2e-3)
    assert _tokens(model, NAMES) == on_cpu["names"]
    assert _tokens(model, OTHERS) == on_cpu["others"]


@norms
def test_a_mix_of_adapters_is_no_reason_to_record(
    fused: str, fuse_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled for another mix of adapters, and no CUDA graph is recorded anew."""
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    recorded = []
    record = CUDAGraphTreeManager.record_function

    def counted(self, *args, **kwargs):
        recorded.append(args)
        return record(self, *args, **kwargs)

    monkeypatch.setattr(CUDAGraphTreeManager, "record_function", counted)
    torch._dynamo.reset()
    model = _patched("cuda", fuse_norm)
    mixes = [NAMES, ["everywhere"] * 4, ["generated", "everywhere"] * 2, NAMES[::-1], NAMES]
    for names in mixes[:1] * 3:  # the first calls warm up and record
        _tokens(model, names, cache_implementation="static")
    graphs, records = counters["stats"]["unique_graphs"], len(recorded)
    assert records
    for names in mixes:
        assert _tokens(model, names, cache_implementation="static") == _tokens(model, names)
    assert counters["stats"]["unique_graphs"] == graphs and len(recorded) == records


@norms
def test_static_cache_with_a_compiled_decode_step(
    fused: str, fuse_norm: bool, on_cpu: dict, full_precision: None
) -> None:
    """Other adapters after the step was compiled (and captured), none, and the first ones again."""
    torch._dynamo.reset()
    model = _patched("cuda", fuse_norm)
    for names, wanted in ((NAMES, "names"), (OTHERS, "others"), (NAMES, "names")):
        assert _tokens(model, names, cache_implementation="static") == on_cpu[wanted]
    idle = _tokens(model, ["__base__"] * len(LENGTHS), cache_implementation="static")
    bare = make_model().to("cuda")
    batch = _batch("cuda")
    expected = bare.generate(**batch, max_new_tokens=STEPS, do_sample=False)
    assert idle == expected[:, batch["input_ids"].shape[1] :].tolist()
    assert _tokens(model, OTHERS, cache_implementation="static") == on_cpu["others"]


def test_a_pool_that_grows_under_a_captured_step(fused: str, full_precision: None) -> None:
    """The graph read the pool where it lay; after it has moved, the step reads it where it lies now."""
    large = rk.ReftConfig(r=24, layers="all", positions="all")
    generated = []
    for device, backend, options in (
        ("cpu", "reference", {}),
        ("cuda", fused, {"cache_implementation": "static"}),
    ):
        torch._dynamo.reset()
        model = _patched(device)
        with rk.backend(backend):
            found = [_tokens(model, NAMES, **options)]
            (pool,) = model.reft._store.pools.values()
            address = pool.down.data_ptr()
            model.reft.add_adapter("large", random_adapter(large, pool.width, scale=0.3))
            found.append(_tokens(model, ["large", *NAMES[1:]], **options))
            found.append(_tokens(model, NAMES, **options))
        assert pool.down.data_ptr() != address
        generated.append(found)
    assert generated[0] == generated[1]


def _on_the_gpu(model, **inputs) -> Counter:
    """How often each kernel and each copy runs in a forward."""
    with torch.no_grad():
        model(**inputs)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            model(**inputs)
            torch.cuda.synchronize()
    return Counter(event.name for event in trace.events() if event.device_type is DeviceType.CUDA)


def test_an_idle_forward_runs_what_the_bare_model_runs(fused: str) -> None:
    """The same kernels and copies, as often. So a graph captured of it has no node of ours."""
    batch = _batch("cuda")
    bare = _on_the_gpu(make_model().to("cuda"), **batch)
    model = _patched("cuda")
    assert bare and _on_the_gpu(model, **batch, adapter_names=["__base__"] * len(LENGTHS)) == bare
    assert _on_the_gpu(model, **batch, adapter_names=NAMES).total() > bare.total()


@pytest.mark.skipif(continuous.why_not() is not None, reason="it does not say which tokens are whose")
def test_continuous_batches_are_each_request_alone(fused: str, full_precision: None) -> None:
    """Prompts in chunks beside tokens that are generated, an adapter for each request."""
    page = "page_size" if "page_size" in vars(transformers.ContinuousBatchingConfig()) else "block_size"
    sizes = transformers.ContinuousBatchingConfig(**{"num_blocks": 24, "max_batch_tokens": 16, page: 32})
    config = transformers.GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = [[5, 6, 7, 8, 11, 3], [9, 10], list(range(3, 25)), [5, 6, 7, 8]]
    alone, wanted = _patched("cpu"), []
    with rk.backend("reference"):
        for prompt, name in zip(prompts, NAMES):
            options = {"adapter_names": [name], "max_new_tokens": STEPS, "do_sample": False}
            wanted.append(alone.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
    found = _patched("cuda").generate_batch(prompts, config, sizes, adapter_names=NAMES)
    assert [result.generated_tokens for result in found.values()] == wanted


def test_training_step_is_the_cpus(fused: str, full_precision: None) -> None:
    config = rk.ReftConfig(r=4, layers="all", positions="f2+l2", act_fn="silu")
    generator = torch.Generator().manual_seed(0)
    adapter = rk.Adapter.from_config(config, 3, 32, generator=generator)
    gradients = []
    for device, backend in (("cpu", "reference"), ("cuda", fused)):
        model = make_model().to(device)
        reft = rk.patch(model)
        reft.add_adapter("it", copy.deepcopy(adapter))
        reft.set_adapter("it")
        batch = _batch(device, [8, 5, 6])
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100  # the prompt
        with rk.backend(backend):
            model(**batch, labels=labels, use_cache=False).loss.backward()
        trained = reft.adapters["it"]
        gradients.append([p.grad.cpu() for p in trained.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for cpu, gpu in zip(*gradients):
        torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=1e-3)
