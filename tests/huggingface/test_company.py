"""In company: other people's hooks, copies, threads, PEFT, checkpointing, accelerate, autograd, dtypes."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import transformers
from support import model_oracle as oracle
from support.adapters import patch_with_mixed, random_adapter
from support.models import batch_of, make_model, row_alone

import reft_kernels as rk

pytestmark = pytest.mark.models
WIDTH = 32
NAMES = ["everywhere", "untied"]


def patched(seed=0):
    model = make_model(seed=seed)
    patch_with_mixed(model)
    return model


@pytest.fixture
def model():
    return patched()


@pytest.fixture
def batch():
    return batch_of([6, 4])


def logits(model, batch, names=NAMES, **kwargs):
    with torch.no_grad():
        return model(**batch, adapter_names=names, **kwargs).logits


def test_hooks_of_others_see_the_edit_and_stay(batch):
    """pyvene deletes them; here they run, before and after ours, and are there after unpatch."""
    model = make_model()
    seen = {}
    early = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.__setitem__("early", o))
    patch_with_mixed(model)
    late = model.model.layers[1].register_forward_hook(lambda m, a, o: seen.__setitem__("late", o.clone()))
    out = logits(model, batch)
    with torch.no_grad():
        hidden = model(**batch, adapter_names=NAMES, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen["late"], hidden[2])
    assert torch.equal(out, logits(model, batch))
    rk.unpatch(model)
    assert early.id in model.model.layers[1]._forward_hooks
    assert late.id in model.model.layers[1]._forward_hooks


def test_output_hidden_states_hold_the_edited_states(model, batch):
    """On every layer, whatever order transformers collects them in."""
    bare = make_model()
    with torch.no_grad():
        hidden = model(**batch, adapter_names=["everywhere"] * 2, output_hidden_states=True).hidden_states
    adapter = model.reft.adapters["everywhere"]
    states = {}
    handles = []
    with oracle.eager_hooks(bare, adapter, 6), torch.no_grad():
        for layer, block in enumerate(bare.model.layers):
            hook = block.register_forward_hook(
                lambda m, a, o, layer=layer: states.__setitem__(layer, o.clone())
            )
            handles.append(hook)
        bare(**row_alone(batch, 0))
    for layer in (0, 1):  # the last one comes after the final norm
        torch.testing.assert_close(hidden[layer + 1][0], states[layer][0], atol=1e-4, rtol=1e-4)


def test_a_deepcopy_is_a_patched_model_of_its_own(model, batch):
    want = logits(model, batch)
    twin = copy.deepcopy(model)
    model.reft.delete_adapter("everywhere")
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin, batch), want)
    out = twin.generate(**batch, adapter_names=NAMES, max_new_tokens=2, do_sample=False)
    assert out.shape == (2, 8)
    rk.unpatch(twin)
    assert torch.equal(twin(**batch).logits, make_model()(**batch).logits)


def test_pickle_and_torch_save(model, batch):
    want = logits(model, batch)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), batch), want)


def test_state_dict_and_save_pretrained_are_the_base_models(model, tmp_path):
    bare = make_model()
    assert list(model.state_dict()) == list(bare.state_dict())
    model.load_state_dict(bare.state_dict())
    torch.nn.ModuleDict({"inner": model}).load_state_dict(
        {f"inner.{k}": v for k, v in bare.state_dict().items()}
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in bare.state_dict().items() if "embed" not in k})
    model.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    assert list(again.state_dict()) == list(bare.state_dict())
    model.reft.save_pretrained(tmp_path / "adapter", "untied")
    reft = rk.patch(again)
    reft.load_adapter(tmp_path / "adapter", "untied")
    batch = batch_of([5])
    again.eval()
    assert torch.equal(logits(again, batch, ["untied"]), logits(model, batch, ["untied"]))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_two_threads_generate_at_once(cache):
    if cache == "static" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 keeps one static cache on the model, whichever thread it is for")
    model = patched()
    jobs = {"everywhere": batch_of([7, 3], seed=3), "generated": batch_of([4, 5], seed=4)}

    def run(name):
        return model.generate(
            **jobs[name],
            adapter_names=[name, "__base__"],
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
        ).tolist()

    want = {name: run(name) for name in jobs}
    for _ in range(3):
        got: dict = {}
        threads = [threading.Thread(target=lambda n=n, got=got: got.update({n: run(n)})) for n in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == want


def test_a_streamer_in_another_thread(model, batch):
    from transformers import TextIteratorStreamer

    class Tokenizer:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids)) + "\n"

    streamer = TextIteratorStreamer(Tokenizer())
    one = row_alone(batch, 0)
    want = model.generate(**one, adapter_names=["everywhere"], max_new_tokens=4, do_sample=False)
    thread = threading.Thread(
        target=model.generate,
        kwargs={
            **one,
            "adapter_names": ["everywhere"],
            "max_new_tokens": 4,
            "do_sample": False,
            "streamer": streamer,
        },
    )
    thread.start()
    text = "".join(streamer).split()
    thread.join()
    assert [int(t) for t in text][-4:] == want[0, -4:].tolist()


@pytest.mark.parametrize("order", ["patch first", "PEFT first"])
def test_lora_on_the_same_model(order, batch):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    bare = peft.get_peft_model(make_model(), config)
    weights = peft.get_peft_model_state_dict(bare)
    if order == "patch first":
        inner = patched()
        model = peft.get_peft_model(inner, config)
    else:
        inner = make_model()
        model = peft.get_peft_model(inner, config)
        patch_with_mixed(inner)
    peft.set_peft_model_state_dict(model, weights)
    model.eval(), bare.eval()
    with torch.no_grad():
        got = model(**batch, reft_adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        adapter = inner.reft.adapters[name]
        want = oracle.forward(bare.get_base_model(), row_alone(batch, row), adapter)
        torch.testing.assert_close(got[row][batch["attention_mask"][row].bool()], want, atol=2e-4, rtol=1e-4)
    out = model.generate(**batch, reft_adapter_names=NAMES, max_new_tokens=3, do_sample=False)
    tokens, _ = oracle.greedy(bare.get_base_model(), row_alone(batch, 1), inner.reft.adapters["untied"], 3)
    assert out[1, -3:].tolist() == tokens.tolist()
    mixed = model(**batch, adapter_names=["default", "__base__"], reft_adapter_names=NAMES).logits
    assert not torch.equal(mixed[1], got[1])  # PEFT took its names, ours took ours
    merged = model.merge_and_unload()
    with torch.no_grad():
        again = merged(**batch, adapter_names=NAMES).logits
    torch.testing.assert_close(again, got, atol=2e-4, rtol=1e-4)


def training_model():
    model = make_model()
    reft = rk.patch(model)
    torch.manual_seed(3)
    reft.add_adapter("a", rk.ReftConfig(r=2, positions="f2+l1"))
    reft.add_adapter("b", rk.ReftConfig(method="direft", r=3, layers=[0, 2], positions="all", act_fn="relu"))
    return model.train()


def gradients(model, batch, names):
    model.zero_grad()
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    model(**batch, labels=labels, adapter_names=names, use_cache=False).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.reft.named_parameters()}


def dense_gradients(model, batch, names):
    """The same through eager hooks out of place: nothing of ours but the parameters."""
    model.zero_grad()
    bare = model.reft._runtime.blocks.layers
    adapters = [model.reft.adapters[name] for name in names]
    handles = []
    for layer, block in enumerate(bare):

        def hook(module, args, output, layer=layer):
            h = output[0] if isinstance(output, tuple) else output
            rows = []
            for row, adapter in enumerate(adapters):
                x = h[row]
                for intervention in adapter.interventions:
                    if intervention.layer == layer:
                        fold = intervention.fold()
                        index = oracle.columns(intervention.positions, 3, x.shape[0])
                        z = x @ fold.down.T + fold.bias
                        v = torch.where(fold.kind == 1, torch.relu(z), z)
                        some = torch.zeros(x.shape[0], 1)
                        some[index] = 1
                        x = x + some * (v @ fold.up)
                rows.append(x)
            h = torch.stack(rows)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append(block.register_forward_hook(hook))
    with model.reft.disable_adapter():
        got = gradients(model, batch, ["__base__"] * len(names))
    for handle in handles:
        handle.remove()
    return got


def test_training_gradients_of_a_mixed_batch():
    model = training_model()
    batch = batch_of([6, 6, 6])
    want = dense_gradients(model, batch, ["a", "b", "a"])
    got = gradients(model, batch, ["a", "b", "a"])
    assert all(p.grad is None for n, p in model.named_parameters() if "reft" not in n)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-3, msg=name)
    alone = gradients(model, batch, ["a", "a", "a"])
    used = {id(p) for p in model.reft.adapters["a"].parameters()}
    for name, parameter in model.reft.named_parameters():
        assert (alone[name] is not None) == (id(parameter) in used), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = training_model()
    batch = batch_of([6, 6])
    want = gradients(model, batch, ["a", "b"])
    model.enable_input_require_grads()
    for _ in range(2):  # enabled again, it must be wrapped again
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = gradients(model, batch, ["a", "b"])
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-5, msg=name)
    # Another forward between forward and backward: the recomputation still has its own plan.
    model.zero_grad()
    labels = batch["input_ids"].clone()
    labels[:, :3] = -100
    loss = model(**batch, labels=labels, adapter_names=["a", "b"], use_cache=False).loss
    with torch.no_grad():
        model(**batch_of([3]), adapter_names=["b"], use_cache=False)
    loss.backward()
    for name, parameter in model.reft.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("fused", [False, True])  # fused steps don't count a tensor's versions up
def test_evaluation_in_the_middle_of_training_sees_the_new_weights(fused):
    model = training_model()
    batch = batch_of([6, 6])
    optimizer = torch.optim.AdamW(model.reft.parameters(), lr=0.1, fused=fused)
    model.eval()
    before = logits(model, batch, ["a", "b"])
    gradients(model, batch, ["a", "b"])
    optimizer.step()
    after = logits(model, batch, ["a", "b"])
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    bare = make_model()
    for row, name in enumerate(("a", "b")):
        adapter = copy.deepcopy(model.reft.adapters[name])
        adapter.trainable = False
        want = oracle.forward(bare, row_alone(batch, row), adapter)
        torch.testing.assert_close(after[row], want, atol=2e-4, rtol=1e-4)


def test_unpatch_gives_requires_grad_back():
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    rk.patch(model).add_adapter("a", rk.ReftConfig())
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith("reft"))
    rk.unpatch(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_dropout_falls_on_edited_rows_in_training_only():
    model = make_model()
    reft = rk.patch(model)
    reft.add_adapter("a", rk.ReftConfig(r=1, layers=[1], positions="f1", dropout=0.5))
    batch = batch_of([6])
    seen = []
    model.model.layers[1].register_forward_hook(lambda m, a, o: seen.append(o.detach().clone()))
    model.eval()
    with torch.no_grad():
        model(**batch)
    model.train()
    model(**batch)
    kept, dropped = seen[0][0], seen[1][0]
    torch.testing.assert_close(dropped[1:], kept[1:])
    zero = dropped[0] == 0
    assert 0 < zero.sum() < WIDTH
    torch.testing.assert_close(dropped[0][~zero], 2 * kept[0][~zero])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_and_pools(dtype, batch):
    exact = logits(patched(), batch)
    errors = []
    for pool_dtype in (None, torch.float32):
        model = make_model().to(dtype)
        reft = patch_with_mixed(model, pool_dtype=pool_dtype)
        assert next(iter(reft._store.pools.values())).dtype == (pool_dtype or dtype)
        assert next(reft.adapters["tied"].parameters()).dtype == torch.float32
        seen = batch["attention_mask"].bool()
        errors.append((logits(model, batch).float() - exact)[seen].norm() / exact[seen].norm())
    assert all(error < 0.1 for error in errors), errors


def test_a_model_cast_after_patching_moves_its_pool(model, batch):
    exact = logits(model, batch)
    model.to(torch.bfloat16)
    got = logits(model, batch)
    assert got.dtype == torch.bfloat16
    seen = batch["attention_mask"].bool()
    assert (got.float() - exact)[seen].norm() < 0.1 * exact[seen].norm()
    assert next(model.reft.adapters["tied"].parameters()).dtype == torch.float32
    model.to(torch.float32)


def test_autocast(model, batch):
    exact = logits(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, batch)
    seen = batch["attention_mask"].bool()
    assert (got.float() - exact)[seen].norm() < 0.1 * exact[seen].norm()


def test_accelerates_offload_hooks(batch, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    want = logits(patched(), batch)
    model = make_model()
    accelerate.cpu_offload(model, execution_device="cpu")
    patch_with_mixed(model)
    torch.testing.assert_close(logits(model, batch), want)
    rk.unpatch(model)
    torch.testing.assert_close(model(**batch).logits, make_model()(**batch).logits)


def test_accelerates_hooks_taken_off_after_the_patch(batch):
    """It sets each module's own forward on the instance again, past what was put there since."""
    hooks = pytest.importorskip("accelerate.hooks")
    import accelerate

    names = ["block_output", "head_attention_value_output", "mlp_output"]

    def patched_at_many_sites(model):
        reft = rk.patch(model)
        for site in names:
            heads = [1] if site.startswith("head") else None
            config = rk.ReftConfig(r=2, layers="all", positions="all", site=site, heads=heads)
            reft.add_adapter(site, random_adapter(config, WIDTH // 4 if heads else WIDTH))
        return model

    small = batch_of([5, 4, 3])
    want = logits(patched_at_many_sites(make_model()), small, names)
    model = make_model()
    bare = logits(patched_at_many_sites(make_model()), small, ["__base__"] * 3)
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in zip(want, bare))
    accelerate.cpu_offload(model, execution_device="cpu")
    patched_at_many_sites(model)
    torch.testing.assert_close(logits(model, small, names), want)
    hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(logits(model, small, names), want)
    rk.unpatch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**small).logits, make_model()(**small).logits)


@pytest.mark.parametrize(
    "site", ["block_output", "block_input", "mlp_output", "attention_output", "head_attention_value_output"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_sites(site, family):
    """Against a plain hook at the module that pyvene's component name means."""
    model, bare = make_model(family), make_model(family)
    heads = [1, 3] if site == "head_attention_value_output" else None
    width = 8 if heads else WIDTH
    config = rk.ReftConfig(r=2, layers=[0, 2], site=site, positions="f2", share_weights=True, heads=heads)
    adapter = random_adapter(config, width)
    rk.patch(model).add_adapter("a", adapter)
    batch = batch_of([5])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    kept = embeds.clone()
    with torch.no_grad():
        got = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(embeds, kept)  # block_input of layer 0 must not write into the caller's tensor
    from reft_kernels.huggingface.blocks import find_blocks, site_module

    layers = find_blocks(bare).layers

    def edited(h, intervention):
        h = h.clone()
        if intervention.head is None:
            h[:, :2] = oracle.formula(intervention, h[:, :2].double()).to(h.dtype)
        else:
            part = h.view(*h.shape[:-1], -1, 8)
            x = part[:, :2, intervention.head].double()
            part[:, :2, intervention.head] = oracle.formula(intervention, x).to(h.dtype)
        return h

    for intervention in adapter.interventions:
        module = site_module(layers[intervention.layer], site)
        if site in ("block_input", "head_attention_value_output"):

            def pre(m, args, kwargs, intervention=intervention):
                if args:
                    return (edited(args[0], intervention), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"], intervention)}

            module.register_forward_pre_hook(pre, with_kwargs=True)
        else:

            def post(m, args, out, intervention=intervention):
                if isinstance(out, tuple):
                    return (edited(out[0], intervention), *out[1:])
                return edited(out, intervention)

            module.register_forward_hook(post)
    with torch.no_grad():
        want = bare(**batch).logits
        plain = make_model(family)(**batch).logits
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(want, plain, atol=1e-3)
