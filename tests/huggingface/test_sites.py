"""The places in a model where an adapter edits, against plain hooks at modules written down by hand."""

from __future__ import annotations

import functools

import pytest
import torch
from support import model_oracle
from support import site_oracle as oracle
from support.adapters import patch_with_mixed, random_adapter
from support.models import batch_of, make_model
from support.runs import recorded_steps

import reft_kernels as rk
from reft_kernels import sites
from reft_kernels.ops.launch import long_way

pytestmark = pytest.mark.models
WIDTH = 32


def model_of(family, gain=4.0, seed=0):
    return make_model(family, seed=seed, gain=gain, families=oracle.MODELS)


def config_for(site, **options):
    layered = sites.has_layers(site)
    heads = [1] if sites.takes_heads(site) else None
    layers = [0, 2] if layered else "all"
    return rk.ReftConfig(site=site, heads=heads, layers=layers, r=2, **options)


def adapter_at(bare, family, site, **options):
    at = oracle.sites_of(family)[site]
    return random_adapter(config_for(site, **options), oracle.width_of(bare, family, at), scale=0.5), at


@pytest.mark.parametrize("family", oracle.SITES)
def test_a_site_is_where_a_hook_would_be(family):
    """Every site of a family: eager by both ways, trained, and with the bare model's rows left alone."""
    model, bare = model_of(family), model_of(family)
    bare.requires_grad_(False)
    reft = rk.patch(model)
    sites_here = oracle.sites_of(family)
    for site in sites_here:
        reft.add_adapter(site, adapter_at(bare, family, site, positions="prompt[1:4]")[0])
    assert set(reft._sites.locator.available(0)) == set(sites_here)
    batch = batch_of([5, 5])
    with torch.no_grad():
        plain = bare(**batch).logits
    for site, at in sites_here.items():
        adapter = reft.adapters[site]
        handles = [oracle.hook(bare, family, at, one, [1, 2, 3]) for one in adapter.interventions]
        with torch.no_grad():
            want = bare(**batch).logits
            got = model(**batch, adapter_names=[site, "__base__"]).logits
            with long_way():
                assert torch.equal(model(**batch, adapter_names=[site, "__base__"]).logits, got), site
        assert torch.equal(got[1], plain[1]), site
        change, error = (want[0] - plain[0]).abs().max(), (want[0] - got[0]).abs().max()
        assert change > 1e-4 and error < min(0.02 * change, 5e-4), (site, change, error)
        expected = _gradients(bare, batch, adapter)
        adapter.trainable = True
        mine = model(**batch, adapter_names=[site] * 2).logits.square().mean()
        parameters = [one.W for one in adapter.interventions]
        for one, theirs in zip(torch.autograd.grad(mine, parameters), expected):
            scale = float(theirs.abs().max())
            assert scale > 0
            torch.testing.assert_close(
                one, theirs, atol=2e-3 * scale, rtol=1e-3, msg=functools.partial("{}: {}".format, site)
            )
        adapter.trainable = False
        for handle in handles:
            handle.remove()


def _gradients(bare, batch, adapter):
    """Of each W, in the hooked model."""
    copies = {one: one.W.detach().double().clone().requires_grad_(True) for one in adapter.interventions}
    real = model_oracle.formula

    def formula(intervention, h):
        p = {name: tensor.detach().double() for name, tensor in intervention.named_parameters()}
        return h + (h @ copies[intervention].T + p["b"] - h @ p["R"].T) @ p["R"]

    model_oracle.formula = formula
    try:
        loss = bare(**batch).logits.square().mean()
        return [grad.float() for grad in torch.autograd.grad(loss, list(copies.values()))]
    finally:
        model_oracle.formula = real


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_generate_at_many_sites_at_once(family):
    """Each row another site; against each row alone without a cache."""
    model, bare = model_of(family), model_of(family)
    reft = rk.patch(model)
    names = list(oracle.sites_of(family))
    for site in names:
        reft.add_adapter(site, adapter_at(bare, family, site, positions="all")[0])
    batch = batch_of([5] * len(names))
    options = {"max_new_tokens": 4, "do_sample": False}
    out = model.generate(**batch, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        want = model.generate(**alone, adapter_names=[name], **options, use_cache=False)
        assert torch.equal(out[row : row + 1], want), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_compiled_decode_step(family):
    """One graph without breaks: whole outputs, stretches of them, inputs, heads."""
    torch._dynamo.reset()
    model, bare = model_of(family), model_of(family)
    reft = rk.patch(model)
    names = ["query_output", "head_value_output", "mlp_activation", "attention_value_output", "mlp_input",
             "lm_head_input", "embedding_output", "head_attention_value_output"]  # fmt: skip
    for site in names:
        reft.add_adapter(site, adapter_at(bare, family, site, positions="all")[0])
    compiled, graphs = recorded_steps()
    call = {**batch_of([5] * 8), "adapter_names": names, "max_new_tokens": 4, "do_sample": False}
    got = model.generate(**call, **compiled)
    assert graphs and torch.equal(got, model.generate(**call))


def test_norms_that_are_fused_and_edited():
    """fuse_norm and sites at norms, at what norms read, and at what reads them."""
    bare = model_of("llama")
    model = model_of("llama")
    reft = rk.patch(model, fuse_norm=True)
    names = ["attention_norm_output", "mlp_norm_output", "attention_input", "block_output", "lm_head_input"]
    for site in names:
        reft.add_adapter(site, adapter_at(bare, "llama", site, positions="all")[0])
    other = model_of("llama")
    patched = rk.patch(other)
    for name, adapter in reft.adapters.items():
        patched.add_adapter(name, rk.Adapter.from_record(adapter.to_record()))
    batch = batch_of([5] * 5)
    with torch.no_grad():
        got = model(**batch, adapter_names=names).logits
        torch.testing.assert_close(got, other(**batch, adapter_names=names).logits, atol=1e-3, rtol=1e-3)


def test_embeddings_of_the_caller_stay_as_they_are():
    """block_input of layer 0 must not write into the caller's tensor; and there is no embedding to edit."""
    model, bare = model_of("llama"), model_of("llama")
    reft = rk.patch(model)
    for site in ("block_input", "embedding_output"):
        reft.add_adapter(site, adapter_at(bare, "llama", site)[0])
    batch = batch_of([5])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    kept = embeds.clone()
    with torch.no_grad():
        got = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        assert torch.equal(embeds, kept) and torch.equal(got, model(**batch).logits)
        with pytest.raises(ValueError, match="inputs_embeds: pass the embeddings by that adapter"):
            model(inputs_embeds=embeds, adapter_names=["embedding_output"])
        with pytest.raises(ValueError, match="inputs_embeds: pass the embeddings by that adapter"):
            model.generate(inputs_embeds=embeds, adapter_names=["embedding_output"], max_new_tokens=1)


@pytest.mark.parametrize(
    ("path", "same"),
    [
        ("model.layers.*.mlp.down_proj.output", "mlp_dense_output"),
        ("*.self_attn.o_proj.input", "attention_value_output"),
        ("*.input_layernorm.output", "attention_norm_output"),
        ("lm_head.input", "lm_head_input"),
        ("model.embed_tokens.output", "embedding_output"),
        ("input_layernorm", "attention_norm_output"),
        ("post_attention_layernorm", "mlp_norm_output"),
    ],
)
def test_a_module_by_its_path(path, same, tmp_path):
    model, bare = model_of("llama"), model_of("llama")
    reft = rk.patch(model)
    layered = sites.has_layers(same)
    config = rk.ReftConfig(r=2, site=path, layers=[1] if layered else "all", positions="all")
    adapter = reft.add_adapter("path", config)
    adapter.trainable = False
    assert adapter.interventions[0].width == oracle.width_of(bare, "llama", oracle.sites_of("llama")[same])
    adapter.save_pretrained(tmp_path)
    record = rk.Adapter.from_pretrained(tmp_path).to_record()
    named = [one.__class__(**{**vars(one), "site": same}) for one in record.interventions]
    reft.add_adapter("name", rk.Adapter.from_record(record.__class__(tuple(named), record.width)))
    batch = batch_of([5])
    with torch.no_grad():
        got = model(**batch, adapter_names=["path"]).logits
        assert torch.equal(got, model(**batch, adapter_names=["name"]).logits)
        assert torch.equal(model(**batch, adapter_names=["path"]).logits, got)
        assert not torch.equal(got, model(**batch, adapter_names=["__base__"]).logits)


class Behind(torch.nn.Module):
    """A norm behind a module that gives on what it gets: here the residual stream itself."""

    def __init__(self, norm):
        super().__init__()
        self.same, self.norm = torch.nn.Identity(), norm

    def forward(self, x):
        return self.norm(self.same(x))


def test_a_path_to_what_gives_its_input_on_is_copied():
    """The residual stream keeps what it had, as under a hook."""
    model, bare = model_of("llama"), model_of("llama")
    for one in (model, bare):
        one.model.layers[1].mlp_norm = one.model.layers[1].post_attention_layernorm
        one.model.layers[1].post_attention_layernorm = Behind(one.model.layers[1].mlp_norm)
    site = "*.post_attention_layernorm.same.output"
    adapter = random_adapter(rk.ReftConfig(r=2, site=site, layers=[1], positions="all"), WIDTH)
    rk.patch(model).add_adapter("a", adapter)
    at = oracle.At("{}.post_attention_layernorm.same")
    oracle.hook(bare, "llama", at, adapter.interventions[0], slice(None))
    batch = batch_of([5])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, bare(**batch).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 2])], ids=["last", "three", "listed"])
def test_the_heads_input_where_some_columns_are_kept(kept):
    model, bare = model_of("llama"), model_of("llama")
    adapter, _ = adapter_at(bare, "llama", "lm_head_input", positions="f2+l1")
    rk.patch(model).add_adapter("a", adapter)
    batch = batch_of([5, 5])
    with torch.no_grad():
        whole = model(**batch).logits
        some = model(**batch, logits_to_keep=kept).logits
        assert not torch.allclose(whole, model(**batch, adapter_names=["__base__"] * 2).logits, atol=1e-2)
    index = slice(-kept, None) if isinstance(kept, int) else kept
    torch.testing.assert_close(some, whole[:, index], atol=1e-5, rtol=1e-5)


def test_synonyms():
    for name, own in sites.SYNONYMS.items():
        assert sites.canonical(name) == sites.canonical(own)
    assert rk.ReftConfig(site="resid_post").site == "block_output"


@pytest.mark.parametrize(
    ("family", "config", "match"),
    [
        ("gpt_neox", {"site": "query_output"}, "'query_output' was not found.*GPTNeoX.* has .*block_input"),
        ("bert", {"site": "mlp_norm_output"}, "site: 'mlp_norm_output' was not found"),
        ("llama", {"site": "*.mlp.gate.output"}, "mlp has no module 'gate', but gate_proj, up_proj"),
        ("llama", {"site": "*.mlp.output", "layers": [9]}, "no layer 9"),
        ("llama", {"site": "*.self_attn.output"}, r"the width of '\*.self_attn.output' is not known"),
        ("llama", {"site": "head_key_output", "heads": [2]}, "edits head 2; the model has 2 heads"),
        ("llama", {"site": "head_query_output", "heads": [4]}, "edits head 4; the model has 4 heads"),
        ("llama", {"site": "embedding_output", "layers": [1]}, "layers: 'embedding_output' is in no layer"),
        ("llama", {"site": "mlp_outputs"}, r"site: must be one of .*was 'mlp_outputs' \(near: mlp_output"),
        ("llama", {"site": "*.*.output"}, "site: must be one of"),
        ("llama", {"site": "key_output", "heads": [0]}, "heads: needed for the sites of one head"),
        ("llama", {"site": "head_key_output"}, "heads: needed for the sites of one head"),
    ],
)  # fmt: skip
def test_sites_that_are_not_there(family, config, match):
    model = model_of(family)
    reft = rk.patch(model)
    with pytest.raises(ValueError, match=match):
        reft.add_adapter("a", rk.ReftConfig(r=1, **config))
    assert "a" not in reft.adapters


def test_a_module_that_is_never_called_is_no_site():
    """An adapter there would edit nothing, without a word."""
    model = model_of("llama")
    model.model.layers[1].mlp.spare = torch.nn.Linear(WIDTH, WIDTH)
    rk.patch(model).add_adapter(
        "a", rk.ReftConfig(r=1, site="*.mlp.spare.output", layers=[1], positions="all")
    )
    with pytest.raises(RuntimeError, match=r"does not call the module of '\*.mlp.spare.output' in layer 1"):
        model(**batch_of([4]))
    model.reft.delete_adapter("a")
    model(**batch_of([4]))


def test_widths_that_differ_stand_side_by_side():
    """One pool a width; rows of all widths in one batch, each as it is alone."""
    model, bare = model_of("llama"), model_of("llama")
    reft = rk.patch(model)
    names = ["block_output", "mlp_activation", "key_output", "head_query_output"]
    for site in names:
        reft.add_adapter(site, adapter_at(bare, "llama", site, positions="all")[0])
    batch = batch_of([5] * 4)
    with torch.no_grad():
        together = model(**batch, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            one = model(**alone, adapter_names=[name]).logits
            torch.testing.assert_close(together[row : row + 1], one, atol=1e-4, rtol=1e-4)
    assert sorted(pool.width for pool in reft._store.pools.values()) == [8, 16, 32, 48]


def test_a_head_that_the_model_lacks_is_refused():
    model = make_model()
    patch_with_mixed(model)
    site = "head_attention_value_output"
    config = rk.ReftConfig(r=1, layers=[0], site=site, positions="f1", heads=[4], share_weights=True)
    with pytest.raises(ValueError, match="head 4; the model has 4 heads"):
        model.reft.add_adapter("a", random_adapter(config, 8))
    assert "a" not in model.reft.adapters
