"""patch(fuse_norm=True): the norm that reads a block's output, in one pass with the edit of that output."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.adapters import patch_with_mixed
from support.models import FAMILIES, LAYERS, batch_of, make_model
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import reft_kernels as rk
from reft_kernels.huggingface.fused_norm import NextNorm, NormForward, kind_of
from reft_kernels.ops import Norm, launch

pytestmark = pytest.mark.models
LENGTHS = [6, 3, 5, 1]


@pytest.fixture(autouse=True, params=["short", "long"])
def way(request):
    """Past the dispatcher, where nothing is offered, and through it."""
    if request.param == "short":
        if launch.missing is not None:
            pytest.skip(f"no short way: {launch.missing}")
        yield request.param
    else:
        with launch.long_way():
            yield request.param


NAMES = ["everywhere", "tied", "__base__", "generated"]


def patched(fuse: bool, family: str = "llama", dtype: torch.dtype = torch.float32):
    model = make_model(family).to(dtype)
    reft = patch_with_mixed(model, fuse_norm=fuse)
    reft.set_adapter(None)
    return model


def norms_of(model) -> list[NextNorm]:
    blocks = model.reft._runtime.blocks.layers
    found = [getattr(block.__dict__.get("forward"), "norm", None) for block in blocks]
    return [norm for norm in found if norm is not None]


class Calls:
    """Counts how often the norms of a model run their own forward."""

    def __init__(self, model) -> None:
        self.count = 0
        for norm in norms_of(model):
            norm.stand_in.original = self.counted(norm.stand_in.original)

    def counted(self, original):
        def run(*args):
            self.count += 1
            return original(*args)

        return run


@torch.no_grad()
def logits(model, batch, names=None, **more):
    return model(**batch, adapter_names=names, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same(family):
    fused, plain = patched(True, family), patched(False, family)
    norms = norms_of(fused)
    assert len(norms) == LAYERS  # each block's output is read by the next one's norm, or the stack's
    calls = Calls(fused)
    batch = batch_of(LENGTHS)
    seen = batch["attention_mask"].bool()
    for names in (NAMES, None):
        got, want = logits(fused, batch, names), logits(plain, batch, names)
        torch.testing.assert_close(got[seen], want[seen], atol=2e-5, rtol=2e-5)
    assert calls.count == 0 and not any(norm.given_up for norm in norms)
    options = {"max_new_tokens": 5, "do_sample": False, "adapter_names": NAMES}
    assert torch.equal(fused.generate(**batch, **options), plain.generate(**batch, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    fused, plain = patched(True, dtype=dtype), patched(False, dtype=dtype)
    assert len(norms_of(fused)) == LAYERS
    batch = batch_of([5, 5])
    names = ["everywhere", "__base__"]
    got, want = (logits(model, batch, names).float() for model in (fused, plain))
    wide = logits(patched(False), batch, names)
    near = (want - wide).abs().mean()
    assert (got - wide).abs().mean() <= 1.2 * near


def test_a_row_has_the_same_bits_whatever_its_neighbours_edit():
    """The fused norm is on in idle forwards too."""
    model = patched(True)
    batch = batch_of([5, 5, 5])
    idle = logits(model, batch)
    assert torch.equal(logits(model, batch, ["__base__", "everywhere", "__base__"])[[0, 2]], idle[[0, 2]])
    plain = patched(False)
    assert not torch.equal(logits(plain, batch), idle)  # else this test would see nothing


def test_no_norm_runs_beside_the_fused_one():
    model = patched(True)
    batch = batch_of([4, 4])
    with torch.profiler.profile() as profile, torch.no_grad():
        model(**batch, adapter_names=["everywhere", "__base__"])
    ran = {event.key: event.count for event in profile.key_averages()}
    # Each block's output; and alone the first block's first norm, and the second one in each block.
    assert ran["reft_kernels::intervene_norm_"] == LAYERS + LAYERS + 1
    assert "reft_kernels::intervene_" not in ran and "aten::rsqrt" not in ran


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_give_the_same_bits(family):
    model = patched(True, family)
    batch = batch_of(LENGTHS)
    for names in (NAMES, None):
        got = logits(model, batch, names)
        with launch.long_way():
            assert torch.equal(logits(model, batch, names), got)


def test_a_norm_over_channels_is_not_one_over_the_last_dimension():
    assert kind_of(nn.GroupNorm(1, 48)) is None


def test_the_norms_alone_are_the_models_own_where_they_must(way):
    """In training, with autograd, under autocast and outside of a forward."""
    model = patched(True)
    assert len(model.reft._runtime.fused.alone) == LAYERS + 1
    norm = model.model.layers[0].post_attention_layernorm
    stand_in = norm.__dict__["forward"]
    count = []
    below = stand_in.original
    stand_in.original = lambda x: (count.append(1), below(x))[1]
    batch = batch_of([4, 4])
    logits(model, batch)
    assert not count
    with torch.no_grad():
        norm(torch.randn(2, 32))
    assert len(count) == 1
    model(**batch)
    assert len(count) == 2
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, batch)
    assert len(count) == 3
    model.train()
    logits(model, batch)
    assert len(count) == 4


def _same_as_unfused(model, batch, prepare) -> None:
    plain = patched(False)
    prepare(model)
    prepare(plain)
    torch.testing.assert_close(logits(model, batch, NAMES), logits(plain, batch, NAMES), atol=2e-5, rtol=2e-5)


def double(module, args, output):
    (output[0] if isinstance(output, tuple) else output).mul_(2)


def double_input(module, args):
    args[0].mul_(2)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.model.layers[0].register_forward_hook(double),
        lambda model: model.model.layers[1].register_forward_pre_hook(double_input),
        lambda model: model.model.layers[1].input_layernorm.register_forward_pre_hook(double_input),
    ],
    ids=["the block's hook", "the next block's pre-hook", "the norm's pre-hook"],
)
def test_a_hook_in_between_turns_it_off_there(prepare):
    model = patched(True)
    calls = Calls(model)
    _same_as_unfused(model, batch_of(LENGTHS), prepare)
    assert calls.count == 0  # its norm runs alone, on what the hook made
    assert not any(norm.given_up for norm in norms_of(model))


def test_a_norm_that_somebody_wrapped_runs_itself():
    def prepare(model):
        norm = model.model.layers[1].input_layernorm
        below = norm.forward
        norm.forward = lambda h: 3 * below(h)

    _same_as_unfused(patched(True), batch_of(LENGTHS), prepare)


def test_an_edit_of_the_next_blocks_input_comes_in_between():
    def prepare(model):
        config = rk.ReftConfig(r=2, layers=[1], site="block_input", positions="all")
        generator = torch.Generator().manual_seed(3)
        adapter = rk.Adapter.from_config(config, LAYERS, model.config.hidden_size, generator=generator)
        adapter.trainable = False
        model.reft.add_adapter("input", adapter)
        names = ["input", "everywhere", "input", "__base__"]
        model.names = names

    fused, plain = patched(True), patched(False)
    for model in (fused, plain):
        prepare(model)
    batch = batch_of(LENGTHS)
    got, want = (logits(model, batch, model.names) for model in (fused, plain))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_a_result_that_nobody_fetches_is_given_up(way):
    """As where a family's first norm reads something else than the block's output."""

    def prepare(model):
        block = model.model.layers[1]
        block.input_layernorm, block.other = nn.Identity(), block.input_layernorm

    model = patched(True)
    prepare(model)
    plain = patched(False)
    prepare(plain)
    batch = batch_of(LENGTHS)
    for _ in range(2):
        torch.testing.assert_close(
            logits(model, batch, NAMES), logits(plain, batch, NAMES), atol=2e-5, rtol=2e-5
        )
    assert [norm.given_up for norm in norms_of(model)] == [way == "long", False, False]
    assert model.reft._runtime.fused.pending is False


def test_training_takes_the_models_own_norms():
    batch = batch_of([4, 4])
    grads = []
    for fuse in (True, False):
        model = make_model()
        reft = rk.patch(model, fuse_norm=fuse)
        torch.manual_seed(1)
        reft.add_adapter("mine", rk.ReftConfig(r=2, layers="all", positions="all"))
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        grads.append([p.grad for p in reft.parameters()])
    assert grads[0] and all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_forward_that_fails_leaves_nothing_waiting():
    model = patched(True)
    batch = batch_of(LENGTHS)
    want = logits(model, batch, NAMES)
    broken = model.model.layers[2].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, batch, NAMES)
    broken.remove()
    assert torch.equal(logits(model, batch, NAMES), want)
    assert not any(norm.given_up for norm in norms_of(model))


def test_copies_are_fused_too():
    model = patched(True)
    batch = batch_of(LENGTHS)
    want = logits(model, batch, NAMES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(norm.norm not in model.modules() for norm in norms_of(twin))
        calls = Calls(twin)
        assert torch.equal(logits(twin, batch, NAMES), want)
        assert calls.count == 0


def test_unpatch_takes_it_off():
    model = make_model()
    batch = batch_of(LENGTHS)
    want = logits_of_bare(model, batch)
    rk.patch(model, fuse_norm=True)
    assert isinstance(model.model.norm.__dict__["forward"], NormForward)
    rk.unpatch(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(logits_of_bare(model, batch), want)


@torch.no_grad()
def logits_of_bare(model, batch):
    return model(**batch).logits


def test_a_model_cast_after_patching():
    model = patched(True).to(torch.bfloat16)
    plain = patched(False).to(torch.bfloat16)
    batch = batch_of([5, 5])
    got, want = (logits(m, batch, ["everywhere", "__base__"]) for m in (model, plain))
    torch.testing.assert_close(got, want, atol=0.5, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_told_by_what_they_compute(dtype):
    def kind(norm: nn.Module) -> Norm | None:
        return kind_of(norm.to(dtype))

    llama = LlamaRMSNorm(48)
    assert kind(llama) in (
        (Norm.RMS | Norm.ROUND, Norm.RMS) if dtype is torch.float32 else (Norm.RMS | Norm.ROUND,)
    )
    assert kind(Gemma2RMSNorm(48)) == Norm.PLUS_ONE
    assert kind(nn.RMSNorm(48, eps=1e-6)) == Norm.RMS or dtype is torch.float32
    assert kind(nn.LayerNorm(48)) == Norm.CENTRED
    assert kind(nn.LayerNorm(48, bias=False)) == Norm.CENTRED
    before = llama.weight.clone()
    kind(llama)
    assert torch.equal(llama.weight, before)


class _Off(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.01


class _Squared(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x / x.abs().mean(-1, keepdim=True)


@pytest.mark.parametrize("norm", [_Off(48), _Squared(48), nn.RMSNorm(48)], ids=["scaled", "L1", "no eps"])
def test_what_is_no_such_norm_is_left_alone(norm):
    assert kind_of(norm) is None


def test_an_eps_that_is_not_what_it_says_is_noticed():
    norm = LlamaRMSNorm(48, eps=1e-6)
    assert kind_of(norm) is not None
    norm.eps, norm.variance_epsilon = 1e-6, 1e-3
    below = norm.forward

    def other(x):
        norm.variance_epsilon = 1e-5
        try:
            return below(x)
        finally:
            norm.variance_epsilon = 1e-3

    norm.forward = other
    assert kind_of(norm) is None
