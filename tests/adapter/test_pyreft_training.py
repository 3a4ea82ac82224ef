"""Each of pyreft's six classes as it trains: the beginning, the function and its gradients, in float64 beside
the live pyreft."""

from __future__ import annotations

import pytest
import torch

from reft_kernels.adapter import Adapter, Intervention, ReftConfig
from reft_kernels.adapter.orthonormal import orthonormality_error
from reft_kernels.checkpoint.pyreft import _CLASSES
from reft_kernels.ops.reference import activate
from reft_kernels.ops.schema import NO_PRODUCT
from reft_kernels.positions import Positions

pyreft = pytest.importorskip(
    "pyreft", reason="pyreft, the reference library, can't be imported here", exc_type=ImportError
)
pytestmark = pytest.mark.models

D, R = 24, 3
CASES = [(name, None) for name in _CLASSES] + [
    (name, "gelu_new") for name, one in _CLASSES.items() if one.takes_act_fn
]


def theirs(name: str, width: int = D, rank: int = R, act_fn: str | None = None):
    torch.manual_seed(0)
    return getattr(pyreft.interventions, name)(
        embed_dim=width, low_rank_dimension=rank, dtype=torch.float64, add_bias=True, act_fn=act_fn
    ).double()


def ours(name: str, one, act_fn: str | None) -> Intervention:
    """The intervention of what theirs would save."""
    kind = _CLASSES[name]
    state = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    tensors = {parameter: take(state) for parameter, take in (kind.parameters | kind.optional).items()}
    place = (0, "block_output", Positions.parse("all"))
    made = Intervention(kind.method, *place, {n: t.contiguous() for n, t in tensors.items()}, act_fn=act_fn)
    return made.requires_grad_(True)


@pytest.mark.parametrize(("name", "act_fn"), CASES)
def test_function_and_gradients_are_pyrefts(name: str, act_fn: str | None) -> None:
    their = theirs(name, act_fn=act_fn)
    mine = ours(name, their, act_fn)
    h, target = torch.randn(2, 6, D, dtype=torch.float64)
    h_mine, h_their = h.clone().requires_grad_(), h.clone().requires_grad_()
    with torch.nn.utils.parametrize.cached():  # one R, whose gradient can be asked for
        if hasattr(their, "rotate_layer"):
            their.rotate_layer.weight.retain_grad()
        out_their = their(h_their)
        (out_their - target).square().sum().backward()
        rotation = their.rotate_layer.weight if hasattr(their, "rotate_layer") else None
    fold = mine.fold()
    z = torch.where((fold.kind & NO_PRODUCT) != 0, fold.bias, h_mine @ fold.down.T + fold.bias)
    out_mine = h_mine + activate(z, fold.kind) @ fold.up
    (out_mine - target).square().sum().backward()

    torch.testing.assert_close(out_mine, out_their, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(h_mine.grad, h_their.grad, rtol=1e-9, atol=1e-9)
    found = {n: p.grad for n, p in their.named_parameters() if p.grad is not None}
    wanted = {
        "W": found.get("learned_source.weight"),
        "W1": found.get("learned_source.weight"),
        "b": found.get("learned_source.bias", found.get("learned_source")),
        "b1": found.get("learned_source.bias"),
        "W2": found.get("proj_layer.weight"),
        "b2": found.get("proj_layer.bias"),
        "R": None if rotation is None else rotation.grad.T,
    }
    assert set(mine.names) <= {parameter for parameter, grad in wanted.items() if grad is not None}
    for parameter in mine.names:
        torch.testing.assert_close(getattr(mine, parameter).grad, wanted[parameter], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", _CLASSES)
def test_a_fresh_one_is_drawn_as_pyreft_draws(name: str) -> None:
    width, rank = 400, 40
    their = theirs(name, width, rank)
    options = {"add_bias": True} if name == "NoreftIntervention" else None
    config = ReftConfig(method=_CLASSES[name].method, r=rank, layers=[0], positions="all", options=options)
    adapter = Adapter.from_config(config, 1, width, generator=torch.Generator().manual_seed(0))
    mine, drawn = adapter.interventions[0], ours(name, their, None)
    assert set(mine.names) == set(drawn.names)
    for parameter in mine.names:
        found, wanted = getattr(mine, parameter), getattr(drawn, parameter)
        if parameter == "R":
            assert orthonormality_error(found) < 1e-5
        else:  # both uniform over one interval
            spread = wanted.max() - wanted.min()
            assert abs(found.max() - wanted.max()) < 0.2 * spread
            assert abs(found.min() - wanted.min()) < 0.2 * spread
            assert found.std().item() == pytest.approx(wanted.std().item(), rel=0.25)


@pytest.mark.parametrize("name", _CLASSES)
def test_it_learns_and_is_saved(name: str, tmp_path) -> None:
    """From pyreft's own beginning towards another of the same class; R stays orthonormal throughout."""
    torch.manual_seed(1)
    config = ReftConfig(method=_CLASSES[name].method, r=R, layers=[0], positions="all")
    adapter = Adapter.from_config(config, 1, D)
    h, (goal,) = torch.randn(64, D), Adapter.from_config(config, 1, D).folds()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.03)

    def edit(fold) -> torch.Tensor:
        product = 0 if name == "LobireftIntervention" else h @ fold.down.T
        return (product + fold.bias) @ fold.up

    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (edit(adapter.folds()[0]) - edit(goal).detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    adapter.save_pretrained(tmp_path)
    again = Adapter.from_pretrained(tmp_path)
    for trained, stored in zip(adapter.folds()[0], again.folds()[0]):
        assert torch.equal(trained, stored)
    if "R" in adapter.interventions[0].names:
        assert orthonormality_error(again.interventions[0].R) < 1e-5
