"""Elementwise adapters on a model, beside those of low rank: on every way that an edit may take."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.adapters import patch_with_mixed
from support.models import batch_of, make_model, row_alone
from support.runs import LENGTHS, check_rows_are_as_among_their_like, logits, recorded_steps, tokens

import reft_kernels as rk
from reft_kernels.huggingface import sites
from reft_kernels.ops import launch

pytestmark = pytest.mark.models
WIDTH = 32
NAMES = ["everywhere", "red", "__base__", "tied", "late", "red"]


def red(seed: int, layers, positions: str = "all", site: str = "block_output") -> rk.Adapter:
    generator = torch.Generator().manual_seed(seed)
    drawn = {layer: 0.3 * torch.randn(2, WIDTH, generator=generator) for layer in layers}
    tensors = {layer: {"scaling": 1 + less, "bias": shift} for layer, (less, shift) in drawn.items()}
    return rk.Adapter.from_tensors("red", tensors, positions=positions, site=site)


def patched(dtype: torch.dtype = torch.float32, **options):
    model = make_model().to(dtype)
    reft = patch_with_mixed(model, **options)
    reft.add_adapter("red", red(1, [0, 1, 2]))
    reft.add_adapter("late", red(2, [1], "generated+l1"))
    reft.set_adapter(None)
    return model


@pytest.mark.parametrize("fuse_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_to_the_bit_what_it_is_among_its_like(dtype, fuse_norm):
    model = patched(dtype, fuse_norm=fuse_norm)
    found = check_rows_are_as_among_their_like(model, NAMES)
    assert torch.equal(found[2], logits(model, None)[2])
    assert not torch.equal(found[1], logits(model, None)[1])


def test_the_short_way_is_taken_where_nothing_is_scaled(monkeypatch):
    if launch.missing is not None:
        pytest.skip(launch.missing)
    count, edit = [0], sites.edit
    monkeypatch.setattr(sites, "edit", lambda *args: (count.__setitem__(0, count[0] + 1), edit(*args))[1])
    model = patched()
    low = ["everywhere", "tied", "__base__"] * 2
    want = logits(model, low)
    assert count == [0]
    mixed = logits(model, ["everywhere", "late", "__base__", "everywhere", "late", "__base__"])
    assert count == [1]  # the one layer at which a row is scaled
    assert torch.equal(mixed[0], want[0])
    with launch.long_way():
        assert torch.equal(want, logits(model, low))
    assert count == [4]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("fuse_norm", [False, True])
def test_a_fused_norm_reads_what_was_scaled(backend, fuse_norm):
    plain, fused = patched(), patched(fuse_norm=fuse_norm)
    with rk.backend(backend):
        torch.testing.assert_close(logits(plain, NAMES), logits(fused, NAMES), rtol=1e-4, atol=1e-5)
        assert torch.equal(tokens(plain, NAMES), tokens(fused, NAMES))


@pytest.mark.parametrize("fuse_norm", [False, True])
def test_compiled_steps(fuse_norm):
    """One graph for every mix, in which each scaled site has one op more, and all it reads stays."""
    torch._dynamo.reset()
    model, (compiled, graphs) = patched(fuse_norm=fuse_norm, capacity=200), recorded_steps()
    for names in (NAMES, NAMES[::-1], ["red"] * 6, ["everywhere"] * 6):
        got = tokens(model, names, **compiled)
        assert torch.equal(got, tokens(model, names)), names
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].nodes if "reft_kernels" in str(node.target)]
    assert sum("scale_shift_" in name for name in called) == 3
    assert sum("intervene_." in name for name in called) == 3
    assert sum("intervene_norm_" in name for name in called) == (3 if fuse_norm else 0)  # behind the edits
    read = [node for node in graphs[0].nodes if node.op == "placeholder" and "workspace" in node.name]
    if not fuse_norm:
        assert len(read) == 9  # four and two of the pools, rows, tiles and spans
    assert all(node.meta["tensor_dict"].get("_dynamo_static_input_type") is not None for node in read)


def test_torch_compile_and_copies():
    model = patched()
    want = logits(model, NAMES)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        got = compiled(**batch_of(LENGTHS), adapter_names=NAMES).logits
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(want, logits(twin, NAMES))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_gradients_are_those_of_the_formula(checkpointing):
    """Of adapters of both forms in one batch, against autograd through hooks, row by row."""
    model = make_model().double()
    reft = rk.patch(model)
    adapters = {"red": red(1, [0, 2]).double(), "low": red(2, [0, 2], "l2").double()}
    model.requires_grad_(False)
    batch = batch_of([5, 4], "right")
    seen = batch["attention_mask"].bool()
    wanted = {}
    for row, (name, adapter) in enumerate(adapters.items()):
        leaves = {(i, n): getattr(one, n).detach().clone().requires_grad_()
                  for i, one in enumerate(adapter.interventions) for n in one.names}  # fmt: skip
        handles = []
        for i, one in enumerate(adapter.interventions):
            at = slice(None) if str(one.positions) == "all" else slice(-2, None)

            def hook(module, args, output, leaves=leaves, i=i, at=at):
                h = output[0] if isinstance(output, tuple) else output
                edited = leaves[i, "scaling"] * h[:, at] + leaves[i, "bias"]
                h = edited if at == slice(None) else torch.cat([h[:, :-2], edited], 1)
                return (h, *output[1:]) if isinstance(output, tuple) else h

            handles.append(model.model.layers[one.layer].register_forward_hook(hook))
        model(**row_alone(batch, row)).logits.square().sum().backward()
        for handle in handles:
            handle.remove()
        wanted[name] = {key: leaf.grad for key, leaf in leaves.items()}
    for name, adapter in adapters.items():
        adapter.trainable = True
        reft.add_adapter(name, adapter)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
    with rk.backend("reference"):
        model(**batch, adapter_names=["red", "low"]).logits[seen].square().sum().backward()
    for name, adapter in adapters.items():
        for (i, n), want in wanted[name].items():
            got = getattr(adapter.interventions[i], n).grad
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * want.abs().max().item())


def test_what_was_trained_since_is_seen_and_an_idle_row_has_no_gradient():
    model = patched()
    adapter = model.reft.adapters["red"]
    adapter.trainable = True
    before = logits(model, NAMES)
    with torch.no_grad():
        adapter.interventions[0].scaling.mul_(1.5)
    after = logits(model, NAMES)
    assert not torch.equal(before[1], after[1]) and torch.equal(before[0], after[0])
    model(**batch_of([4, 4]), adapter_names=["everywhere", "late"]).logits.sum()
    assert all(p.grad is None for p in adapter.parameters())


@pytest.mark.parametrize("name", ["red", "everywhere"])
def test_what_was_trained_and_then_frozen_is_seen(name):
    """Steps with autograd leave the pool as it was, and nobody looked before it was frozen."""
    model = patched()
    adapter = model.reft.adapters[name]
    adapter.trainable = True
    before = logits(model, [name])
    with torch.no_grad():
        for one in adapter.interventions:
            one.get_parameter(one.names[-1]).add_(1.0)
    adapter.trainable = False
    after = logits(model, [name])
    assert not torch.equal(before, after)
    fresh = patched()
    fresh.reft.delete_adapter(name)
    fresh.reft.add_adapter(name, copy.deepcopy(adapter))
    assert torch.equal(after, logits(fresh, [name]))
    assert not model.reft._store.stale({name: adapter})


def test_dropout_falls_on_the_rows_of_its_adapter_whatever_their_form():
    model = make_model()
    reft, seen = rk.patch(model), []
    for name, method, dropout in (("red", "red", 0.5), ("low", "direft", 0.0), ("both", "direft", 0.25)):
        config = rk.ReftConfig(method=method, layers=[1], positions="all", dropout=dropout)
        reft.add_adapter(name, config)
    model.train()
    model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    torch.manual_seed(0)
    model(**batch_of([40] * 4), adapter_names=["red", "low", "both", "__base__"])
    dropped = (seen[0] == 0).float().mean((1, 2)).tolist()
    assert dropped[1] == dropped[3] == 0
    assert abs(dropped[0] - 0.5) < 0.1 and abs(dropped[2] - 0.25) < 0.1


def test_both_forms_on_a_token_are_refused_before_anything_runs():
    model = patched()
    with pytest.raises(ValueError, match="adapter_names: 'everywhere' .direft. and 'red' .red."):
        logits(model, [["everywhere", "red"], "red"], [4, 4])
    model.reft.add_adapter("mlp", red(4, [0, 1], site="mlp_output"))
    model.reft.set_adapter(None)
    both = logits(model, [["everywhere", "mlp"], "mlp"], [4, 4])  # at other sites they meet nowhere
    assert torch.equal(both[1], logits(model, ["mlp", "mlp"], [4, 4])[1])
    assert not torch.equal(both[0], logits(model, ["everywhere", "mlp"], [4, 4])[0])


def test_two_reds_are_their_composition():
    model = patched()
    both = rk.Adapter.compose([model.reft.adapters["red"], red(9, [0, 1])], weights=[1.0, -0.5])
    model.reft.add_adapter("other", red(9, [0, 1]))
    model.reft.add_adapter("both", both)
    model.reft.set_adapter(None)
    batch = batch_of([5])
    with torch.no_grad():
        found = model(**batch, adapter_names=[["red", "other"]], scale={"other": -0.5}).logits
        want = model(**batch, adapter_names=["both"]).logits
    torch.testing.assert_close(found, want)
    assert {one.method for one in both.interventions} == {"folded_scale"}
