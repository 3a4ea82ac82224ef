"""Adapters merged into weights: the same function, back to the bit, and refused where that can't be."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support import formulas
from support.models import FAMILIES, batch_of, make_model

import reft_kernels as rk
from reft_kernels.adapter import Intervention
from reft_kernels.sites import HEAD_SITE

pytestmark = pytest.mark.models
WIDTH, HEAD_WIDTH = 32, 8
LINEAR = (
    "loreft", "noreft", "consreft", "red", "lobireft", "direft", "nodireft", "vector", "ablation", "adapter",
    "folded_scale",
)  # fmt: skip


def one(
    method: str, site: str, layer: int = 1, seed: int = 0, positions: str = "all", **more
) -> Intervention:
    width = HEAD_WIDTH if site == HEAD_SITE else WIDTH
    tensors = formulas.parameters(method, 2, width, seed=seed)
    tensors = {name: 0.2 * tensor for name, tensor in tensors.items()}
    return Intervention(method, layer, site, rk.Positions.parse(positions), tensors, **more)


def behind(seed: int = 0) -> rk.Adapter:
    """Behind the MLP and the attention."""
    methods = iter(LINEAR[seed:] + LINEAR)
    places = [(layer, site) for layer in (0, 2) for site in ("mlp_output", "attention_output")]
    return rk.Adapter([one(next(methods), site, layer, seed + layer) for layer, site in places])


def heads(seed: int = 0) -> rk.Adapter:
    """In front of the attention's projection."""
    methods = (("lofit", 0), ("consreft", 3), ("adapter", 1), ("jola", 2))
    return rk.Adapter([one(method, HEAD_SITE, 2, seed, head=head) for method, head in methods])


def patched(family: str = "llama"):
    model = make_model(family, gain=1.0).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # which are 0 in a fresh model
                parameter.normal_(0, 0.1)
    return model, rk.patch(model)


def logits(model, **call):
    """(Without padding, which merged weights edit as well, and nobody reads.)"""
    with torch.no_grad(), rk.backend("reference"):
        return model(**batch_of([6, 6]), **call).logits


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_same_function_and_comes_back_to_the_bit(family):
    model, reft = patched(family)
    before, where = bits(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    bare = logits(model)
    reft.add_adapter("mine", behind())
    reft.add_adapter("heads", heads())
    edited = logits(model, adapter_names=[["mine", "heads"]] * 2)
    assert not torch.allclose(edited, logits(model, adapter_names=["mine"] * 2), atol=1e-3)
    assert not torch.allclose(edited, logits(model, adapter_names=["heads"] * 2), atol=1e-3)
    reft.merge_adapter("heads")
    reft.merge_adapter("mine")
    assert reft.active_adapter is None
    torch.testing.assert_close(logits(model), edited, rtol=1e-9, atol=1e-9)
    reft.unmerge_adapter()
    before |= {name: t for name, t in bits(model).items() if name.startswith("reft.")}
    same_bits(model, before)
    mine = {name: p.data_ptr() for name, p in model.named_parameters() if name in where}
    assert mine == where and reft.active_adapter == "mine"
    assert torch.equal(bare, logits(model, adapter_names=["__base__"] * 2))


@pytest.mark.parametrize("method", LINEAR)
def test_each_linear_method(method):
    model, reft = patched()
    reft.add_adapter("mine", rk.Adapter([one(method, "mlp_output")]))
    edited = logits(model)
    reft.merge_adapter()
    torch.testing.assert_close(logits(model), edited, rtol=1e-9, atol=1e-9)


def test_a_constant_may_have_an_activation():
    """An edit of which φ sees nothing of h is constant."""
    model, reft = patched()
    tensors = formulas.parameters("folded", 1, WIDTH)
    tensors["kind"] = torch.tensor([0x106], dtype=torch.int32)  # NO_PRODUCT and tanh
    made = Intervention("folded", 0, "mlp_output", rk.Positions.parse("all"), tensors)
    reft.add_adapter("mine", rk.Adapter([made]))
    edited = logits(model)
    reft.merge_adapter("mine")
    torch.testing.assert_close(logits(model), edited, rtol=1e-9, atol=1e-9)


def test_several_in_any_order():
    model, reft = patched()
    for seed, name in enumerate("abc"):
        reft.add_adapter(name, behind(seed))
    before = bits(model)
    for name in "abc":
        reft.merge_adapter(name)
    with pytest.raises(ValueError, match="'b' is merged already"):
        reft.merge_adapter("b")
    reft.unmerge_adapter("a")
    reft.unmerge_adapter("c")
    only_b = logits(model, adapter_names=["__base__"] * 2)
    reft.unmerge_adapter()
    same_bits(model, before)
    torch.testing.assert_close(only_b, logits(model, adapter_names=["b", "b"]), rtol=1e-9, atol=1e-9)


def test_others_work_on_top_and_it_is_named_no_more():
    model, reft = patched()
    reft.add_adapter("mine", behind())
    reft.add_adapter("top", rk.Adapter([one("direft", "block_output", positions="l1")]))
    both = logits(model, adapter_names=[["mine", "top"]] * 2)
    reft.merge_adapter("mine")
    torch.testing.assert_close(logits(model, adapter_names=["top"] * 2), both, rtol=1e-9, atol=1e-9)
    for call in (
        lambda: logits(model, adapter_names=["mine", "top"]),
        lambda: reft.set_adapter("mine"),
        lambda: reft.delete_adapter("mine"),
    ):
        with pytest.raises(ValueError, match="'mine' is merged into the weights.*unmerge_adapter"):
            call()
    reft.unmerge_adapter()
    with pytest.raises(ValueError, match="'mine' is not merged"):
        reft.unmerge_adapter("mine")
    reft.delete_adapter("mine")


@pytest.mark.parametrize("unmerged_inside", [False, True])
def test_the_active_one_may_be_merged_while_it_is_disabled(unmerged_inside):
    model, reft = patched()
    reft.add_adapter("mine", behind())
    edited = logits(model)
    with reft.disable_adapter():
        reft.merge_adapter("mine")
        if unmerged_inside:
            reft.unmerge_adapter("mine")
    assert reft.active_adapter == ("mine" if unmerged_inside else None)
    torch.testing.assert_close(logits(model), edited, rtol=1e-9, atol=1e-9)
    if not unmerged_inside:
        reft.unmerge_adapter("mine")
    assert reft.active_adapter == "mine"
    assert torch.equal(logits(model), edited)


def test_names_that_were_right_once_are_looked_at_again():
    model, reft = patched()
    reft.add_adapter("mine", behind())
    names = ["mine", "mine"]
    edited = logits(model, adapter_names=names)
    ids = batch_of([6, 6])["input_ids"]

    @torch.no_grad()
    def step(cache):  # of a loop, whose plan is kept from one to the next
        with rk.backend("reference"):
            return model(ids[:, :1], past_key_values=cache, adapter_names=names).past_key_values

    with torch.no_grad(), rk.backend("reference"):
        cache = model(ids, use_cache=True, adapter_names=names).past_key_values
    cache = step(step(cache))
    reft.merge_adapter("mine")
    with pytest.raises(ValueError, match="'mine' is merged"):
        step(cache)
    reft.unmerge_adapter()
    assert torch.equal(logits(model, adapter_names=names), edited)
    with pytest.raises(ValueError, match="2 names for a batch of 3 rows"):
        model(**batch_of([6, 6, 6]), adapter_names=names)
    names[1] = "__base__"
    assert torch.equal(
        logits(model, adapter_names=names)[1], logits(model, adapter_names=["__base__"] * 2)[1]
    )
    reft.delete_adapter("mine")
    with pytest.raises(ValueError, match="'mine'"):
        logits(model, adapter_names=names)


def test_unpatch_gives_the_weights_back_and_copies_are_their_own():
    model, reft = patched()
    before = {name: t for name, t in bits(model).items() if not name.startswith("reft")}
    reft.add_adapter("mine", behind())
    reft.merge_adapter("mine")
    twin = copy.deepcopy(model)
    rk.unpatch(model)
    same_bits(model, before)
    assert not torch.equal(
        twin.model.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight
    )
    twin.reft.unmerge_adapter()
    same_bits(twin, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    model = make_model(gain=1.0).to(dtype)
    reft, adapter = rk.patch(model), rk.Adapter([one("consreft", "mlp_output")])
    projection = model.model.layers[1].mlp.down_proj
    w = projection.weight.double()
    reft.add_adapter("mine", adapter)
    reft.merge_adapter("mine")
    R, b = (getattr(adapter.interventions[0], name).double() for name in ("R", "b"))
    assert projection.weight.dtype is dtype
    error = (projection.weight.double() - (w - R.T @ (R @ w))).abs()
    assert bool((error <= torch.finfo(dtype).eps * w.abs().max()).all())
    torch.testing.assert_close(projection.bias.double(), (b @ R), rtol=1e-2, atol=1e-4)
    assert not projection.bias.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_linear_layers(family):
    """What goes into the last of an MLP, and a part of what a fused projection gives."""
    model, reft = patched(family)
    width = 4 * WIDTH if family == "gpt2" else 48
    down = formulas.parameters("direft", 2, width)
    down = {name: 0.2 * tensor for name, tensor in down.items()}
    path = f"*.mlp.{'c_proj' if family == 'gpt2' else 'down_proj'}.input"
    made = {
        "down": Intervention("direft", 1, path, rk.Positions.parse("all"), down),
        "key": one("consreft", "key_output") if family == "gpt2" else one("vector", "mlp_dense_output"),
        "head": one_head("loreft", "head_query_output", 2),
    }
    for name, intervention in made.items():
        reft.add_adapter(name, rk.Adapter([intervention]))
    before, edited = bits(model), logits(model, adapter_names=[list(made)] * 2)
    for name in made:
        assert not torch.equal(edited, logits(model, adapter_names=[name] * 2)), name
    for name in made:
        reft.merge_adapter(name)
    torch.testing.assert_close(logits(model), edited, rtol=1e-9, atol=1e-9)
    reft.unmerge_adapter()
    same_bits(model, before)


def one_head(method: str, site: str, head: int) -> Intervention:
    tensors = {n: 0.5 * t for n, t in formulas.parameters(method, 2, HEAD_WIDTH).items()}
    return Intervention(method, 0, site, rk.Positions.parse("all"), tensors, head=head)


class Quantised(torch.nn.Linear):
    """Stands for the linear layers of quantised models, which are subclasses."""


def tie(model):
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight


def quantise(model):
    model.model.layers[1].mlp.down_proj.__class__ = Quantised


def train(model):
    model.reft.adapters["mine"].trainable = True


@pytest.mark.parametrize(
    ("made", "prepare", "words"),
    [
        (("loreft", "mlp_output", {"positions": "prompt"}), None, ("positions", "'prompt'", "all tokens")),
        (("direft", "mlp_output", {"act_fn": "relu"}), None, ("act_fn", "direft", "not linear")),
        (("sae", "mlp_output", {}), None, ("act_fn", "sae", "not linear")),
        (("loreft", "block_output", {}), None, ("site", "block_output of layer 1", "plain linear layer")),
        (("loreft", "block_input", {}), None, ("site", "block_input of layer 1", "LlamaDecoderLayer")),
        (("loreft", "mlp_output", {}), tie, ("weight", "tied", "layers.0.mlp", "layers.1.mlp")),
        (("loreft", "mlp_output", {}), quantise, ("site", "mlp_output of layer 1", "quantised")),
        (("vector", "mlp_output", {}), train, ("adapter", "trainable")),
    ],
)
def test_what_is_not_exact_is_refused(made, prepare, words):
    model, reft = patched()
    method, site, more = made
    reft.add_adapter("mine", rk.Adapter([one("vector", "mlp_output", 2), one(method, site, **more)]))
    if prepare is not None:
        prepare(model)
    before = bits(model)
    with pytest.raises(ValueError) as caught:
        reft.merge_adapter("mine")
    assert all(word in str(caught.value) for word in words), caught.value
    same_bits(model, before)
    assert reft.active_adapter == "mine" and not reft._merging._kept


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_values_that_half_precision_lacks_are_refused(value):
    model = make_model(gain=1.0).half()
    reft = rk.patch(model)
    v = torch.full((WIDTH,), value)
    with pytest.warns(UserWarning) if value != value else contextlib.nullcontext():
        reft.add_adapter("mine", rk.Adapter.from_tensors("vector", {0: v, 1: v}, site="mlp_output"))
    before = bits(model)
    with pytest.raises(ValueError, match="^bias: .*mlp_output.*NaN or Inf in torch.float16"):
        reft.merge_adapter("mine")
    same_bits(model, before)
