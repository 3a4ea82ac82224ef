"""torch.compile: generate's compiled decode step under a static cache, and a model compiled by its user.

The traps: a model compiled before it was patched, or while idle, must not go on unedited in silence.
"""

from __future__ import annotations

import pytest
import torch
from support import model_oracle as oracle
from support.adapters import patch_with_mixed
from support.models import batch_of, make_model, row_alone
from transformers import CompileConfig

import reft_kernels as rk

pytestmark = pytest.mark.models
LENGTHS = [8, 3, 6]
STEPS = 5


fusing = pytest.mark.parametrize("fuse_norm", [False, True], ids=["norms apart", "norms fused"])


def compiled_tokens(model, batch, **kwargs):
    """Greedy tokens through a decode step that is really compiled, in one graph, also without a GPU."""
    config = CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    config._compile_all_devices = True
    out = model.generate(
        **batch,
        max_new_tokens=STEPS,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
        **kwargs,
    )
    return out[:, batch["input_ids"].shape[1] :].tolist()


def expected(bare, adapters, batch, names):
    found = []
    for row, name in enumerate(names):
        tokens, _ = oracle.greedy(bare, row_alone(batch, row), adapters.get(name), STEPS)
        found.append(tokens.tolist())
    return found


@fusing
def test_compiled_decode_step_through_patching_and_changing_adapters(fuse_norm):
    model, bare = make_model(), make_model()
    batch = batch_of(LENGTHS)
    nothing = ["__base__"] * 3
    assert compiled_tokens(model, batch) == expected(bare, {}, batch, nothing)  # compiled before the patch
    reft = patch_with_mixed(model, fuse_norm=fuse_norm)
    reft.set_adapter(None)
    adapters = dict(reft.adapters)
    for names in (
        nothing,  # compiled while idle, then used for edits
        ["everywhere", "generated", "__base__"],
        ["generated", "everywhere", "everywhere"],
        nothing,
        ["tied", "untied", "tied"],
        ["everywhere", "generated", "__base__"],
    ):
        assert compiled_tokens(model, batch, adapter_names=names) == expected(bare, adapters, batch, names)
    reft.delete_adapter("everywhere")
    assert compiled_tokens(model, batch, adapter_names=["generated"] * 3) == expected(
        bare, adapters, batch, ["generated"] * 3
    )
    rk.unpatch(model)
    assert compiled_tokens(model, batch) == expected(bare, {}, batch, nothing)


@fusing
def test_decode_steps_do_not_recompile_for_other_rows_of_the_same_adapters(fuse_norm):
    from torch._dynamo.utils import counters

    model = make_model()
    patch_with_mixed(model, fuse_norm=fuse_norm)
    batch = batch_of(LENGTHS)
    compiled_tokens(model, batch, adapter_names=["everywhere", "generated", "everywhere"])
    compiled_tokens(model, batch, adapter_names=["everywhere", "everywhere", "generated"])
    before = counters["stats"]["unique_graphs"]
    compiled_tokens(model, batch, adapter_names=["generated", "everywhere", "everywhere"])
    compiled_tokens(
        model, batch_of([5, 5, 2], seed=9), adapter_names=["generated", "everywhere", "everywhere"]
    )
    assert counters["stats"]["unique_graphs"] == before


@fusing
@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
def test_a_model_that_its_user_compiles(when, fuse_norm):
    model, bare = make_model(), make_model()
    batch = batch_of(LENGTHS)
    names = ["everywhere", "untied", "__base__"]
    compiled = torch.compile(model, backend="aot_eager") if when == "before the patch" else None
    if compiled is not None:
        with torch.no_grad():
            compiled(**batch)
    patch_with_mixed(model, fuse_norm=fuse_norm)
    if compiled is None:
        compiled = torch.compile(model, backend="aot_eager")
    for given in (names, ["__base__"] * 3, names[::-1]):
        with torch.no_grad():
            logits = compiled(**batch, adapter_names=given).logits
        for row, name in enumerate(given):
            want = oracle.forward(bare, row_alone(batch, row), model.reft.adapters.get(name))
            got = logits[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_a_compiled_forward_method():
    """`model.forward = torch.compile(model.forward)` wraps ours; unpatching leaves a working model."""
    model, bare = make_model(), make_model()
    batch = batch_of(LENGTHS)
    reft = patch_with_mixed(model)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    with torch.no_grad():
        got = model(**batch, adapter_names=["everywhere"] * 3).logits
        want = oracle.forward(bare, row_alone(batch, 0), reft.adapters["everywhere"])
        torch.testing.assert_close(got[0][batch["attention_mask"][0].bool()], want, atol=2e-4, rtol=1e-4)
        rk.unpatch(model)
        torch.testing.assert_close(model(**batch).logits, bare(**batch).logits)


def test_a_compiled_step_reads_the_pool_where_it_lies():
    """Inputs that are not static are copied before every replay of a CUDA graph."""
    model = make_model()
    patch_with_mixed(model)
    static: dict[str, bool] = {}

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if node.op == "placeholder" and "plan" in node.name:
                kept = node.meta["tensor_dict"].get("_dynamo_static_input_type") is not None
                static[node.name] = kept
        return graph

    config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    config._compile_all_devices = True
    options = {"max_new_tokens": STEPS, "cache_implementation": "static", "compile_config": config}
    names = ["everywhere", "generated", "everywhere"]
    model.generate(**batch_of(LENGTHS), adapter_names=names, **options)
    assert all(static.values())
    assert sum("pool" in name for name in static) == 4  # down, up, bias and kind of the one pool
