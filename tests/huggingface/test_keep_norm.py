"""Adapters that keep the norm, on a model: every way that an edit may take, beside all others."""

from __future__ import annotations

import pytest
import torch
from support.adapters import patch_with_mixed
from support.models import batch_of, make_model
from support.runs import LENGTHS, check_rows_are_as_among_their_like, logits, recorded_steps, tokens

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32
NAMES = ["everywhere", "kept", "__base__", "tied", "red", "kept"]
KEPT = {"keep_norm": True}


def patched(dtype: torch.dtype = torch.float32, **options):
    model = make_model().to(dtype)
    reft = patch_with_mixed(model, **options)
    drawn = torch.randn(3, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    v = {layer: drawn[layer, 0] for layer in range(3)}
    reft.add_adapter("kept", rk.Adapter.from_tensors("vector", v, options=KEPT))
    scales = {layer: {"scaling": 1 + 0.3 * drawn[layer, 1], "bias": drawn[layer, 2]} for layer in (0, 2)}
    reft.add_adapter("red", rk.Adapter.from_tensors("red", scales, options=KEPT))
    reft.set_adapter(None)
    return model


@pytest.mark.parametrize("fuse_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_to_the_bit_what_it_is_among_its_like(dtype, fuse_norm):
    model = patched(dtype, fuse_norm=fuse_norm)
    found = check_rows_are_as_among_their_like(model, NAMES)
    assert torch.equal(found[2], logits(model, None)[2])
    assert not torch.equal(found[1], logits(model, None)[1])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("fuse_norm", [False, True])
def test_a_fused_norm_reads_what_kept_its_norm(backend, fuse_norm):
    plain, fused = patched(), patched(fuse_norm=fuse_norm)
    with rk.backend(backend):
        torch.testing.assert_close(logits(plain, NAMES), logits(fused, NAMES), rtol=1e-4, atol=1e-5)
        assert torch.equal(tokens(plain, NAMES), tokens(fused, NAMES))


@pytest.mark.parametrize("fuse_norm", [False, True])
def test_compiled_steps(fuse_norm):
    """One graph for every mix, in which each site that keeps norms has two ops more."""
    torch._dynamo.reset()
    model, (compiled, graphs) = patched(fuse_norm=fuse_norm, capacity=200), recorded_steps()
    for names in (NAMES, NAMES[::-1], ["kept"] * 6, ["everywhere"] * 6):
        got = tokens(model, names, **compiled)
        assert torch.equal(got, tokens(model, names)), names
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].nodes if "reft_kernels" in str(node.target)]
    for op in ("row_norms", "restore_norms_"):
        assert sum(f"{op}." in name for name in called) == 3, called


def test_torch_compile():
    torch._dynamo.reset()
    model = patched()
    want = logits(model, NAMES)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        got = compiled(**batch_of(LENGTHS), adapter_names=NAMES).logits
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_a_head_keeps_its_own_norm():
    model = make_model()
    reft = rk.patch(model)
    width = model.config.head_dim
    v = torch.randn(width, generator=torch.Generator().manual_seed(3))
    site = "head_attention_value_output"
    reft.add_adapter("head", rk.Adapter.from_tensors("vector", {(1, 2): v}, site=site, options=KEPT))
    seen = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch_of(LENGTHS), adapter_names=["__base__"] * 6)
        model(**batch_of(LENGTHS), adapter_names=["head"] * 6)
    bare, edited = (it.unflatten(-1, (-1, width)).double() for it in seen)
    assert not torch.equal(bare, edited)
    part = bare[..., 2, :] + v.double()
    part *= bare[..., 2, :].norm(dim=-1, keepdim=True) / part.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(edited[..., 2, :], part, rtol=1e-5, atol=1e-5)


def test_merging_is_refused_with_the_reason():
    model = make_model()
    reft = rk.patch(model)
    v = torch.randn(WIDTH)
    reft.add_adapter("kept", rk.Adapter.from_tensors("vector", {1: v}, site="mlp_output", options=KEPT))
    with pytest.raises(ValueError, match="options: vector at mlp_output of layer 1 keeps the norm"):
        reft.merge_adapter("kept")
    assert "keeps the norm" in repr(reft) and "keep_norm=True" in repr(reft.adapters["kept"].interventions[0])


def test_it_trains_and_reads_back(tmp_path):
    model = make_model()
    reft = rk.patch(model)
    reft.add_adapter("mine", rk.ReftConfig(method="vector", positions="all", layers=[1], options=KEPT))
    batch = batch_of(LENGTHS)
    parameters = [p for p in reft.adapters["mine"].parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"], adapter_names=["mine"] * 6).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    reft.save_pretrained(tmp_path, "mine")
    other = make_model()
    rk.patch(other).load_adapter(tmp_path, "mine")
    model.eval()
    torch.testing.assert_close(logits(other, ["mine"] * 6), logits(model, ["mine"] * 6))
