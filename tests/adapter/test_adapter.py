"""Adapters: made fresh, kept orthonormal in training, composed, cut to a subspace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from reft_kernels.adapter import Adapter, Intervention
from reft_kernels.adapter.config import ReftConfig
from reft_kernels.adapter.orthonormal import orthonormal_rows, orthonormality_error
from reft_kernels.ops.reference import activate
from reft_kernels.ops.schema import NO_PRODUCT
from reft_kernels.positions import Positions

D = 16


def fresh(seed: int = 0, n_layers: int = 4, width: int = D, dtype=torch.float32, **fields) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter.from_config(ReftConfig(**fields), n_layers, width, dtype, generator)


def edit(adapter: Adapter, index: int, h: torch.Tensor) -> torch.Tensor:
    """U^T φ(D h + c) of one intervention, in float64."""
    fold = adapter.interventions[index].fold()
    z = h @ fold.down.double().T + fold.bias.double()
    z = torch.where((fold.kind & NO_PRODUCT) != 0, fold.bias.double(), z)
    return activate(z, fold.kind) @ fold.up.double()


def test_a_fresh_adapter_is_what_the_config_says() -> None:
    adapter = fresh(layers=[2, -1], positions="f3+l1", r=3)
    assert [(i.layer, str(i.positions), i.group) for i in adapter.interventions] == [
        (2, "f3", 0),
        (3, "f3", 0),
        (2, "l1", 1),
        (3, "l1", 1),
    ]
    assert adapter.groups == (Positions(first=3), Positions(last=1))
    assert (adapter.width, adapter.n_layers, adapter.trainable) == (D, 4, True)
    assert all(p.requires_grad for p in adapter.parameters())


def test_initialisation_is_pyrefts() -> None:
    adapter = fresh(width=400, r=40, layers=[0], positions="all")
    one = adapter.interventions[0]
    assert orthonormality_error(one.R) < 1e-5
    bound = 1 / 400**0.5
    for tensor in (one.W, one.b):
        assert tensor.abs().max() <= bound
    assert one.W.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert one.b.abs().max() > 0


def test_a_generator_decides_the_draw() -> None:
    a, b, c = (fresh(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)


def test_half_precision_keeps_r_in_float32() -> None:
    one = fresh(dtype=torch.bfloat16, layers=[0]).interventions[0]
    assert (one.R.dtype, one.W.dtype, one.b.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


def test_heads_have_interventions_of_their_own() -> None:
    adapter = fresh(
        width=4, r=2, layers=[1], positions="all", site="head_attention_value_output", heads=[0, 3]
    )
    assert [(i.head, i.width) for i in adapter.interventions] == [(0, 4), (3, 4)]


def test_a_fold_of_others_does_not_train() -> None:
    with pytest.raises(ValueError, match="folded can't be trained; loreft, "):
        fresh(method="folded")


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match="r: 17.*16"):
        fresh(r=17)
    assert orthonormality_error(fresh(r=16, layers=[0]).interventions[0].R) < 1e-5


def made(positions: str, layer: int = 0, width: int = D) -> Intervention:
    one = fresh(width=width, r=2, layers=[0], positions="all").interventions[0]
    tensors = {name: getattr(one, name) for name in one.names}
    return Intervention("loreft", layer, "block_output", Positions.parse(positions), tensors)


def test_two_interventions_of_one_place_and_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="block_output of layer 1.*'f3'.*compose"):
        Adapter([made("f3", 1), made("f3", 1)])
    assert not Adapter([made("f3", 1), made("f3", 0), made("l2", 1)]).overlapping
    assert Adapter([made("f3", 1), made("f2", 1)]).overlapping


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Adapter([])
    with pytest.raises(ValueError, match="width"):
        Adapter([made("all"), made("all", layer=1, width=8)])
    with pytest.raises(ValueError, match="layer 5"):
        Adapter([made("all", layer=5)], n_layers=5)


@pytest.mark.parametrize("act_fn", [None, "gelu"])
def test_folds_equal_fold_by_fold(act_fn: str | None) -> None:
    adapter = fresh(act_fn=act_fn)
    for trainable in (True, False):
        adapter.trainable = trainable
        for one, fold in zip(adapter.interventions, adapter.folds()):
            assert all(tensor.is_contiguous() for tensor in fold)
            for got, want in zip(fold, one.fold()):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["loreft", "direft"])
def test_training_keeps_r_orthonormal(method: str) -> None:
    adapter = fresh(method=method, r=4, layers=[0], positions="all")
    before = adapter.interventions[0].R.detach().clone()
    target = torch.randn(8, D, generator=torch.Generator().manual_seed(3))
    h = torch.randn(8, D, generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(30):
        fold = adapter.folds()[0]
        loss = (h + (h @ fold.down.T + fold.bias) @ fold.up - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert orthonormality_error(adapter.interventions[0].fold().up) < 1e-6
    assert (adapter.interventions[0].R - before).abs().max() > 0.01
    trained = [t.clone() for t in adapter.folds()[0]]
    adapter.trainable = False
    assert orthonormality_error(adapter.interventions[0].R) < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(trained, adapter.folds()[0]))


def test_orthonormal_rows_is_a_map_onto_orthonormal_rows() -> None:
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    y = orthonormal_rows(x)
    eye = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    torch.testing.assert_close(y @ y.mT, eye)
    torch.testing.assert_close(orthonormal_rows(y), y)
    assert torch.autograd.gradcheck(orthonormal_rows, x[:1])
    # No singular gradient at orthonormal rows, where all singular values coincide.
    assert torch.autograd.gradcheck(orthonormal_rows, y.detach()[:1].requires_grad_())


def test_ill_conditioned_rows_become_orthonormal_too() -> None:
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    x[1:] = x[0] + 1e-4 * x[1:]
    assert orthonormality_error(orthonormal_rows(x)) < 1e-6


def test_training_from_an_r_that_is_not_orthonormal_warns() -> None:
    one = made("all")
    one.R.data *= 2
    adapter = Adapter([one])
    with pytest.warns(UserWarning, match="R of layer 0 is not orthonormal"):
        adapter.trainable = True


def test_setting_trainable_is_a_round_trip() -> None:
    adapter = fresh()
    adapter.trainable = False
    assert not any(p.requires_grad for p in adapter.parameters())
    before = {name: t.clone() for name, t in adapter.state_dict().items()}
    adapter.trainable = True
    adapter.trainable = False
    for name, tensor in adapter.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def test_a_composition_is_the_sum_of_the_edits() -> None:
    a = fresh(1, layers=[0, 1], positions="f2", r=2, act_fn="gelu")
    b = fresh(2, layers=[1, 2], positions="f2", r=3, method="direft")
    sum_ = Adapter.compose([a, b])
    h = torch.randn(5, D, dtype=torch.float64)
    assert [i.layer for i in sum_.interventions] == [0, 1, 2]
    want = [edit(a, 0, h), edit(a, 1, h) + edit(b, 0, h), edit(b, 1, h)]
    for index, expected in enumerate(want):
        torch.testing.assert_close(edit(sum_, index, h), expected)
    assert [i.rank for i in sum_.interventions] == [4, 7, 3]
    assert not sum_.trainable and sum_.n_layers == 4 and sum_.config is None


def test_positions_of_a_composition() -> None:
    apart = Adapter.compose([fresh(layers=[0], positions="f2"), fresh(layers=[0], positions="l2")])
    assert [str(i.positions) for i in apart.interventions] == ["f2", "l2"]
    over = Adapter.compose([fresh(layers=[0], positions="f2"), fresh(layers=[0], positions="f3")])
    assert over.overlapping and not apart.overlapping


def test_a_composition_with_weights() -> None:
    a, b = (fresh(seed, layers=[0], positions="f2", act_fn="gelu") for seed in (1, 2))
    h = torch.randn(5, D, dtype=torch.float64)
    found = edit(Adapter.compose([a, b], weights=[-0.5, 2]), 0, h)
    torch.testing.assert_close(found, -0.5 * edit(a, 0, h) + 2 * edit(b, 0, h), rtol=1e-6, atol=1e-6)
    for wrong in ([1.0], 2.0, "ab", [1.0, float("nan")], [1.0, True]):
        with pytest.raises(ValueError, match="^weights:"):
            Adapter.compose([a, b], weights=wrong)  # type: ignore[arg-type]


def test_what_can_not_be_composed() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Adapter.compose([])
    with pytest.raises(ValueError, match="4, 6"):
        Adapter.compose([fresh(layers=[0]), fresh(layers=[0], n_layers=6)])
    with pytest.raises(ValueError, match="width"):
        Adapter.compose([fresh(layers=[0]), fresh(layers=[0], width=8)])


@pytest.mark.parametrize("act_fn", [None, "relu"])
def test_a_subspace_is_a_choice_of_rows(act_fn: str | None) -> None:
    adapter = fresh(r=5, layers=[0], positions="all", act_fn=act_fn)
    adapter.trainable = False
    part = adapter.select_subspace([3, 0])
    one, whole = part.interventions[0], adapter.interventions[0]
    for name in ("R", "W", "b"):
        assert torch.equal(getattr(one, name), getattr(whole, name)[[3, 0]])
    assert part.config.r == 2 and not part.trainable
    h = torch.randn(4, D, dtype=torch.float64)
    rest = adapter.select_subspace([1, 2, 4])
    torch.testing.assert_close(edit(part, 0, h) + edit(rest, 0, h), edit(adapter, 0, h))
    one.R.data.zero_()
    assert whole.R.any()


def test_a_subspace_of_a_composition_is_rows_of_its_fold() -> None:
    a, b = fresh(1, r=2, layers=[0], positions="all"), fresh(2, r=2, layers=[0], positions="all")
    h = torch.randn(4, D, dtype=torch.float64)
    part = Adapter.compose([a, b]).select_subspace([2, 3])
    torch.testing.assert_close(edit(part, 0, h), edit(b, 0, h))


@pytest.mark.parametrize("rows", [[], [5], [-1], [1, 1], [0.0], [True]])
def test_bad_rows_are_refused(rows: list) -> None:
    with pytest.raises(ValueError, match="^rows:"):
        fresh(r=5).select_subspace(rows)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_whole(again) -> None:
    adapter = fresh(act_fn="silu")
    twin = again(adapter)
    assert twin.config == adapter.config and twin.groups == adapter.groups and twin.trainable
    for a, b in zip(adapter.folds(), twin.folds()):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
