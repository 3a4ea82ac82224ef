"""The layers of a model in vLLM's style: found by structure, and told apart by what they return."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reft_kernels.serving.vllm.layers import Unsupported, find_layers, returns_sum

WIDTH = 8


class Norm(nn.Module):
    """As vLLM's: with a residual it adds first, and returns both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, h, residual=None):
        if residual is None:
            return h * self.weight
        total = h + residual
        return total * self.weight, total


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, positions=None):
        return self.up(hidden_states)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other_norm, self.self_attn, self.mlp = Norm(), Norm(), Part(), Part()

    def forward(self, positions, hidden_states, residual):
        hidden_states, residual = self.norm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.other_norm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Whole(Layer):
    """Returns the block's output."""

    def forward(self, positions, hidden_states):
        h = hidden_states + self.self_attn(hidden_states=self.norm(hidden_states), positions=positions)
        return h + self.mlp(self.other_norm(h))


class InATuple(Whole):
    def forward(self, positions, hidden_states):
        return (super().forward(positions, hidden_states),)


class Beside(Layer):
    """Parallel attention and MLP; what it returns second is not a summand."""

    def forward(self, positions, hidden_states, residual):
        residual = hidden_states
        h = self.norm(hidden_states)
        return residual + self.self_attn(hidden_states=h) + self.mlp(h), residual


class Odd(Layer):
    def forward(self, hidden_states, cache, table):
        return hidden_states


class PPMissingLayer(nn.Identity):
    pass


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


@pytest.mark.parametrize(("layer", "summed"), [(Layer, True), (Whole, False), (InATuple, False)])
def test_both_forms_are_told_apart(layer: type, summed: bool) -> None:
    one = layer()
    before = [parameter.clone() for parameter in one.parameters()]
    assert returns_sum(one, WIDTH, torch.float32) is summed
    assert "forward" not in one.mlp.__dict__
    assert all(map(torch.equal, one.parameters(), before))


@pytest.mark.parametrize("layer", [Beside, Odd])
def test_what_would_be_edited_wrongly_is_refused(layer: type) -> None:
    with pytest.raises(Unsupported, match=layer.__name__):
        returns_sum(layer(), WIDTH, torch.float32)


def test_the_layers_of_this_process_have_their_numbers() -> None:
    model = Model(PPMissingLayer(), Layer(), Layer())
    found = find_layers(model, 3, WIDTH, torch.float32)
    assert list(found.modules) == [1, 2] and found.summed


def test_lists_within_a_layer_and_others_are_passed_by() -> None:
    layers = [Layer(), Layer()]
    layers[0].experts = nn.ModuleList([Part(), Part()])
    model = Model(*layers)
    model.others = nn.ModuleList([Layer()])
    assert list(find_layers(model, 2, WIDTH, torch.float32).modules) == [0, 1]


def test_no_list_or_two_are_refused() -> None:
    with pytest.raises(Unsupported, match="found are none"):
        find_layers(Model(Layer()), 2, WIDTH, torch.float32)
    both = nn.ModuleDict({"encoder": Model(Layer(), Layer()), "decoder": Model(Layer(), Layer())})
    with pytest.raises(Unsupported, match="encoder.layers, decoder.layers"):
        find_layers(both, 2, WIDTH, torch.float32)
    with pytest.raises(Unsupported, match="different things"):
        find_layers(Model(Layer(), Whole()), 2, WIDTH, torch.float32)
