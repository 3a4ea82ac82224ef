"""Subspaces by name: some of an adapter's rows, edited and trained alone, one or several in a row."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
import transformers as tf
from support import model_oracle
from support.models import batch_of, make_model, row_alone
from support.runs import recorded_steps

import reft_kernels as rk
from reft_kernels.adapter.orthonormal import orthonormal_rows

pytestmark = pytest.mark.models
WIDTH, RANK, LAYERS = 32, 5, [0, 2]
SUBSPACES = {"happy": [3, 0], "formal": [1, 4], "odd": [0, 1, 2]}  # odd shares rows with the others
#: What each row of a batch takes, and which rows of R, W and b that is, with their factors.
ROWS = {
    "style": [(range(RANK), 1.0)],
    "style/happy": [([0, 3], 1.0)],
    "style/formal": [([1, 4], 1.0)],
    "style/odd": [([0, 1, 2], 1.0)],
    ("style/happy", "style/formal"): [([0, 3], 1.0), ([1, 4], -2.0)],
    ("style/odd", "style/happy"): [([0, 1, 2], 1.0), ([0, 3], -2.0)],
    "__base__": [],
}
NAMES = [list(one) if isinstance(one, tuple) else one for one in ROWS]
SCALES = [[1.0, -2.0] if isinstance(one, tuple) else 1.0 for one in ROWS]


def adapter_of(act_fn: str | None = None, dtype: torch.dtype = torch.float64, **more) -> rk.Adapter:
    options = {"r": RANK, "layers": LAYERS, "positions": "f2+l1", "act_fn": act_fn, "subspaces": SUBSPACES}
    generator = torch.Generator().manual_seed(0)
    adapter = rk.Adapter.from_config(rk.ReftConfig(**options | more), 3, WIDTH, dtype, generator)
    adapter.trainable = False
    with torch.no_grad():
        for one in adapter.interventions:
            one.W.copy_(torch.randn(one.W.shape, generator=generator, dtype=dtype) / 4)
            one.b.copy_(torch.randn(one.b.shape, generator=generator, dtype=dtype))
    return adapter


def tensors_of(one, leaves=None):
    return (leaves or {}).get(one) or [getattr(one, name).detach() for name in ("R", "W", "b")]


@contextlib.contextmanager
def hooks(model, adapter, terms, prompt: int, leaves=None):
    """h + Σ factor R[S]ᵀ(φ(W[S] h + b[S]) − R[S] h) in plain hooks, each of the h that came."""
    act = {None: lambda z: z, "relu": torch.relu}[adapter.interventions[0].act_fn]

    def hook(layer, module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        after = h.clone()
        for one in adapter.interventions:
            at = model_oracle.columns(one.positions, prompt, h.shape[1])
            for rows, factor in terms if one.layer == layer else ():
                R, W, b = tensors_of(one, leaves)
                if leaves is not None:  # the rows of R stay orthonormal, and those of others stay as they are
                    R = orthonormal_rows(
                        torch.stack([R[i] if i in rows else R[i].detach() for i in range(len(R))])
                    )
                R, W, b = (tensor[list(rows)] for tensor in (R, W, b))
                after[:, at] += factor * (act(h[:, at] @ W.T + b) - h[:, at] @ R.T) @ R
        return (after, *output[1:]) if isinstance(output, tuple) else after

    blocks = enumerate(model.model.layers)
    handles = [block.register_forward_hook(functools.partial(hook, layer)) for layer, block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("act_fn", [None, "relu"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_row_takes_a_subspace(backend, act_fn, tmp_path):
    """Saved and loaded first. As the formula says; what lies side by side takes no room of its own."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    model, bare = make_model(gain=1.0).to(dtype), make_model(gain=1.0).to(dtype)
    made = adapter_of(act_fn, dtype)
    made.save_pretrained(tmp_path)
    reft = rk.patch(model)
    adapter = reft.load_adapter(tmp_path, "style")
    assert dict(adapter.subspaces) == {name: tuple(rows) for name, rows in SUBSPACES.items()}
    assert adapter.config == made.config
    (pool,) = reft._store.pools.values()
    used = pool.used
    assert used == RANK * len(LAYERS) * 2 * (2 if act_fn else 1)
    batch = batch_of([6 + row % 3 for row in range(len(NAMES))], "right")
    with torch.no_grad(), rk.backend(backend):
        model(**batch, adapter_names=["style/happy", "style/formal", *["style"] * (len(NAMES) - 2)])
        assert pool.used == used
        found = model(**batch, adapter_names=NAMES, scale=SCALES).logits
        plain = bare(**batch).logits
    close = {"rtol": 1e-9, "atol": 1e-9} if backend == "reference" else {"rtol": 1e-4, "atol": 1e-4}
    for row, terms in enumerate(ROWS.values()):
        alone = row_alone(batch, row)
        length = alone["input_ids"].shape[1]
        with torch.no_grad(), hooks(bare, made, terms, length):
            want = bare(**alone).logits[0]
        torch.testing.assert_close(found[row, :length], want, **close)
        assert bool(terms) == (not torch.allclose(found[row, :length], plain[row, :length], atol=1e-3))


def test_scale_by_name_and_lists_of_positions():
    model = make_model(gain=1.0)
    reft = rk.patch(model)
    adapter = reft.add_adapter("style", adapter_of(None, torch.float32, positions="all"))
    reft.add_adapter("part", adapter.select_subspace("odd"))
    batch = batch_of([6, 6])
    with torch.no_grad():
        for more in ({"reft_positions": [[0, -2], None]}, {"scale": 0.5}):
            found = model(**batch, adapter_names=["style/odd"] * 2, **more).logits
            wanted = model(**batch, adapter_names=["part"] * 2, **more).logits
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        names = ["style/odd", "style/happy"]
        found = model(**batch, adapter_names=names, scale={"style/odd": 0.5}).logits
        assert torch.equal(found, model(**batch, adapter_names=names, scale=[0.5, 1.0]).logits)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_generate_and_the_active_adapter():
    model = make_model(gain=1.0)
    reft = rk.patch(model)
    adapter = reft.add_adapter("style", adapter_of(None, torch.float32, positions="all"))
    for name in SUBSPACES:
        reft.add_adapter(name, adapter.select_subspace(name))
    call = {**batch_of([6, 5, 4]), "max_new_tokens": 5, "do_sample": False}
    want = model.generate(**call, adapter_names=["happy", "formal", "odd"])
    assert torch.equal(model.generate(**call, adapter_names=[f"style/{name}" for name in SUBSPACES]), want)
    reft.set_adapter("style/formal")
    assert reft.active_adapter == "style/formal"
    assert torch.equal(model.generate(**call)[1], want[1])
    with reft.disable_adapter():
        bare = model.generate(**call)
    assert torch.equal(bare, model.generate(**call, adapter_names=["__base__"] * 3))
    assert reft.active_adapter == "style/formal" and not torch.equal(bare[1], want[1])


def test_the_compiled_decode_step_and_copies():
    """One graph for any mix of subspaces, whether they lie side by side or not; and in a copy."""
    torch._dynamo.reset()
    model = make_model(gain=1.0)
    rk.patch(model).add_adapter("style", adapter_of(None, torch.float32, positions="all"))
    compiled, graphs = recorded_steps()
    call = {**batch_of([5] * 3), "max_new_tokens": 4, "do_sample": False}
    other = copy.deepcopy(model)
    for names in (["style/happy", "style/odd", "style"], ["style", "style/formal", "style/happy"]):
        wanted = model.generate(**call, adapter_names=names)
        assert torch.equal(model.generate(**call, adapter_names=names, **compiled), wanted)
        assert torch.equal(other.generate(**call, adapter_names=names), wanted)
    assert len(graphs) == 1


@pytest.mark.parametrize("act_fn", [None, "relu"])
def test_gradients_come_to_a_subspaces_rows_alone(act_fn):
    """Of one batch in which rows train subspaces each of their own, against the formula's."""
    model, bare = make_model(gain=1.0).double(), make_model(gain=1.0).double()
    bare.requires_grad_(False)
    adapter = rk.patch(model).add_adapter("style", adapter_of(act_fn, positions="all"))
    adapter.trainable = True
    names = ["style/happy", ["style/formal", "style/odd"], "style/odd"]
    terms = [[([0, 3], 1.0)], [([1, 4], 1.0), ([0, 1, 2], 1.0)], [([0, 1, 2], 1.0)]]
    batch = batch_of([6, 6, 6])

    def loss(logits):
        return logits.square().mean()

    sums = [torch.zeros_like(parameter) for parameter in adapter.parameters()]
    with rk.backend("reference"):
        for row, name in enumerate(names):
            alone = row_alone(batch, row)
            adapter.zero_grad()
            loss(model(**alone, adapter_names=[name]).logits).backward()
            leaves = {
                one: [getattr(one, n).detach().clone().requires_grad_() for n in ("R", "W", "b")]
                for one in adapter.interventions
            }
            with hooks(bare, adapter, terms[row], 6, leaves):
                loss(bare(**alone).logits).backward()
            mine = sorted({i for rows, _ in terms[row] for i in rows})
            others = [i for i in range(RANK) if i not in mine]
            for one, tensors in leaves.items():
                for parameter, leaf in zip((one.R, one.W, one.b), tensors):
                    torch.testing.assert_close(parameter.grad, leaf.grad, rtol=1e-8, atol=1e-12)
                for parameter in (one.R, one.W, one.b):
                    assert parameter.grad[mine].any()
                    assert not parameter.grad[others].any()
            sums = [total + p.grad / len(names) for total, p in zip(sums, adapter.parameters())]
        adapter.zero_grad()
        loss(model(**batch, adapter_names=names).logits).backward()
    for parameter, total in zip(adapter.parameters(), sums):
        torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-8)  # norms are in float32


def test_training_one_leaves_what_stands_before_it():
    """R stays orthonormal; the raw rows of the others do not move, nor those of R that come before."""
    model = make_model(gain=1.0)
    config = rk.ReftConfig(r=4, layers=[1], positions="all", subspaces={"a": [0, 1], "b": [2, 3]})
    reft = rk.patch(model)
    adapter = reft.add_adapter("two", config)
    one = adapter.interventions[0]
    before = {name: tensor.detach().clone() for name, tensor in one.materialized().items()}
    edits = one.fold()
    optimizer = torch.optim.Adam(reft.parameters(), lr=0.05)
    batch = batch_of([6, 6])
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=batch["input_ids"], adapter_names=["two/b"] * 2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = one.materialized()
    assert losses[-1] < losses[0]
    for name in ("R", "W", "b"):
        assert torch.equal(after[name][:2], before[name][:2]) and not torch.equal(
            after[name][2:], before[name][2:]
        )
    torch.testing.assert_close(after["R"] @ after["R"].T, torch.eye(4), atol=1e-6, rtol=0)
    assert torch.equal(one.fold().down[:2], edits.down[:2])
    with torch.no_grad():  # what was trained is seen, in the pool too
        got = model(**batch, adapter_names=["two/b"] * 2).logits
        reft.add_adapter("b", adapter.select_subspace("b"))
        torch.testing.assert_close(model(**batch, adapter_names=["b"] * 2).logits, got, rtol=1e-5, atol=1e-5)


def test_pyreft_composes_the_same():
    """Its subspaces of LoReFT, as its notebook on composition forms them, in float64; and their gradients."""
    pyreft = pytest.importorskip("pyreft", exc_type=ImportError)
    from pyreft.interventions import LoreftIntervention

    class Composed(LoreftIntervention):
        def forward(self, base, source=None, subspaces=None):
            difference = self.learned_source(base) - self.rotate_layer(base)
            picked = []
            for row, rows in zip(difference, subspaces):
                picked.append(row[..., rows] @ self.rotate_layer.weight[:, rows].T)
            return base + torch.stack(picked)

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # R's too, which takes no dtype
    try:
        theirs = [Composed(embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float64) for _ in LAYERS]
    finally:
        torch.set_default_dtype(torch.float32)
    config = pyreft.ReftConfig(
        representations=[
            {"component": f"model.layers[{layer}].output", "low_rank_dimension": RANK, "intervention": one}
            for layer, one in zip(LAYERS, theirs)
        ]
    )
    wrapped = pyreft.get_reft_model(make_model(gain=1.0).double(), config)
    model = make_model(gain=1.0).double()
    made = adapter_of(None, positions="all")
    with torch.no_grad():
        for one, other in zip(made.interventions, theirs):
            one.R.copy_(other.rotate_layer.weight.T)
            one.W.copy_(other.learned_source.weight)
            one.b.copy_(other.learned_source.bias)
    adapter = rk.patch(model).add_adapter("style", made)
    adapter.trainable = True
    batch = batch_of([6, 6, 6])
    rows = [SUBSPACES["happy"], SUBSPACES["formal"], SUBSPACES["odd"]]
    places = [[list(range(6))] * 3] * len(LAYERS)
    _, out = wrapped(
        dict(batch), unit_locations={"sources->base": (None, places)}, subspaces=[rows] * len(LAYERS)
    )
    with rk.backend("reference"):
        got = model(**batch, adapter_names=["style/happy", "style/formal", "style/odd"]).logits
    torch.testing.assert_close(got, out.logits, rtol=1e-10, atol=1e-10)
    out.logits.square().mean().backward()
    got.square().mean().backward()
    for one, other in zip(adapter.interventions, theirs):
        torch.testing.assert_close(one.W.grad, other.learned_source.weight.grad, rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(one.b.grad, other.learned_source.bias.grad, rtol=1e-8, atol=1e-14)


def test_subspaces_share_their_adapters_modules():
    """A row of two runs through the one copy of the head; all rows of an adapter are the adapter."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=97, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = tf.LlamaForSequenceClassification(config).eval()
    reft = rk.patch(model)
    halves = {"x": [0, 2], "y": [3, 1]}
    adapter = reft.add_adapter(
        "a", rk.ReftConfig(r=4, positions="all", subspaces=halves, modules_to_save=["score"])
    )
    batch = batch_of([6, 6, 6])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        found = model(**batch, adapter_names=[["a/x", "a/y"], "a", "a/x"]).logits
        whole = model(**batch, adapter_names=["a"] * 3).logits
        bare = model(**batch, adapter_names=["__base__"] * 3).logits
    torch.testing.assert_close(found[:2], whole[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[2], whole[2], atol=1e-3) and not torch.allclose(whole, bare, atol=1e-2)


def test_names_do_not_clash():
    model = make_model(gain=1.0)
    reft = rk.patch(model)
    reft.add_adapter("style/happy", rk.ReftConfig(r=1))
    with pytest.raises(ValueError, match="^name: its subspace would be called 'style/happy'"):
        reft.add_adapter("style", adapter_of(None, torch.float32))
    assert list(reft) == ["style/happy"]
    reft.delete_adapter("style/happy")
    reft.add_adapter("style", adapter_of(None, torch.float32))
    with pytest.raises(ValueError, match="^name: there is an adapter 'style/happy' already"):
        reft.add_adapter("style/happy", rk.ReftConfig(r=1))
    batch = batch_of([5])
    with pytest.raises(
        ValueError, match="adapter 'style' has no subspace 'hapy'; it has 'happy', 'formal', 'odd'"
    ):
        model(**batch, adapter_names=["style/hapy"])
    with pytest.raises(ValueError, match="^name: adapter 'style' has no subspace 'hapy'; it has 'happy'"):
        reft.set_adapter("style/hapy")
    assert "subspace happy of rows 0,3" in repr(reft)
    reft.set_adapter("style/odd")
    with torch.no_grad():
        model(**batch)
    reft.delete_adapter("style")
    assert reft.active_adapter is None and not reft._store.subspaces and not reft._store._stacks
    assert all(not pool.used for pool in reft._store.pools.values())
    with pytest.raises(ValueError, match="there is no adapter 'style/happy'"):
        model(**batch, adapter_names=["style/happy"])


def test_a_merged_adapters_subspaces_are_in_the_weights():
    model = make_model(gain=1.0)
    reft = rk.patch(model)
    reft.add_adapter("style", adapter_of(None, torch.float32, positions="all", site="mlp_output"))
    reft.set_adapter("style/happy")
    reft.merge_adapter("style")
    assert reft.active_adapter is None
    for ask in (reft.set_adapter, lambda name: model(**batch_of([5]), adapter_names=[name])):
        with pytest.raises(ValueError, match="merged into the weights"):
            ask("style/happy")
    reft.unmerge_adapter()
    assert reft.active_adapter == "style/happy"


def test_a_subspace_alone_is_saved(tmp_path):
    reft = rk.patch(make_model())
    adapter = reft.add_adapter("style", adapter_of(None, torch.float32))
    reft.save_pretrained(tmp_path, "style/formal")
    part = rk.Adapter.from_pretrained(tmp_path)
    assert not part.subspaces and part.config.r == 2
    for one, whole in zip(part.interventions, adapter.interventions):
        assert torch.equal(one.W, whole.W[[1, 4]]) and torch.equal(one.R, whole.R[[1, 4]])


@pytest.mark.parametrize(
    ("subspaces", "words"),
    [
        (["happy"], "must be rows by name"),
        ({"a/b": [0]}, "without '/'"),
        ({"": [0]}, "without '/'"),
        ({"a": []}, "must be a list of row numbers"),
        ({"a": [0, True]}, "must be a list of row numbers"),
        ({"a": "01"}, "must be a list of row numbers"),
        ({"a": [0, 4]}, "from 0 to 3, was"),
        ({"a": [1, 1]}, "must be distinct"),
    ],
)
def test_wrong_subspaces_are_named(subspaces, words):
    with pytest.raises(ValueError, match=f"^subspaces: .*{words}"):
        rk.ReftConfig(r=4, subspaces=subspaces)


def test_methods_without_subspaces_say_why():
    with pytest.raises(ValueError, match="^subspaces: the rows of ablation are made into its edit together"):
        rk.ReftConfig(method="ablation", r=2, positions="all", subspaces={"a": [0]})
    config = rk.ReftConfig(method="adapter", r=2, positions="all", subspaces={"a": [0]})
    with pytest.raises(ValueError, match="^subspaces: adapter has b_up, which belongs to no row"):
        rk.Adapter.from_config(config, 1, 8)
    bare = rk.ReftConfig(
        method="adapter", r=2, positions="all", subspaces={"a": [0]}, options={"bias": False}
    )
    assert rk.Adapter.from_config(bare, 1, 8).subspace("a").folds()[0].rank == 1
    vectors = rk.Adapter.from_tensors("vector", {0: torch.randn(3, 8), 1: torch.randn(2, 8)})
    with pytest.raises(ValueError, match="^subspaces: the interventions have several ranks"):
        vectors.subspaces = {"a": [0]}
    vectors = rk.Adapter.from_tensors("vector", {0: torch.randn(3, WIDTH)}, n_layers=3)
    vectors.subspaces = {"a": [2]}
    rk.patch(make_model()).add_adapter("v", vectors)
    with pytest.raises(ValueError, match="^subspaces: are laid down"):
        vectors.subspaces = {}
