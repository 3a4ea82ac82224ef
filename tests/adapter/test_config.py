"""ReftConfig: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_kernels.adapter.config import ReftConfig
from reft_kernels.positions import Positions


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "lora"}, ("method", "loreft", "lora")),
        ({"method": ["loreft"]}, ("method", "['loreft']")),
        ({"r": 0}, ("r:", "0")),
        ({"r": True}, ("r:", "True")),
        ({"r": 2.0}, ("r:", "2.0")),
        ({"layers": "some"}, ("layers", "all", "some")),
        ({"layers": []}, ("layers", "[]")),
        ({"layers": [1, 1]}, ("layers", "twice")),
        ({"layers": [1.5]}, ("layers", "1.5")),
        ({"site": "residual"}, ("site", "block_output", "residual")),
        ({"positions": "x3"}, ("positions", "f3+l3", "x3")),
        ({"positions": 3}, ("positions", "3")),
        ({"share_weights": "no"}, ("share_weights", "no")),
        ({"act_fn": "mish"}, ("act_fn", "relu", "mish")),
        ({"method": "consreft", "act_fn": "relu"}, ("act_fn", "consreft", "relu")),
        ({"dropout": 1.0}, ("dropout", "[0, 1)", "1.0")),
        ({"dropout": float("nan")}, ("dropout", "nan")),
        ({"last_position": "end"}, ("last_position", "length-1", "end")),
        ({"heads": [0]}, ("heads", "head_attention_value_output")),
        ({"site": "head_attention_value_output"}, ("heads", "None")),
        ({"site": "head_attention_value_output", "heads": [-1]}, ("heads", "-1")),
    ],
)
def test_a_bad_field_is_named(fields: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        ReftConfig(**fields)
    for word in words:
        assert word in str(caught.value)


def test_layers_resolve_from_either_end() -> None:
    assert ReftConfig().resolve_layers(3) == [0, 1, 2]
    assert ReftConfig(layers=[2, -4]).resolve_layers(4) == [2, 0]


@pytest.mark.parametrize(("layers", "named"), [([0, 4], "4"), ([-5], "-5"), ([1, -3], "layer 1 twice")])
def test_a_layer_that_the_model_lacks_is_named(layers: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ReftConfig(layers=layers).resolve_layers(4)


def test_untied_positions_are_two_groups() -> None:
    untied = ReftConfig(positions="f3+l2", last_position="length-1").position_groups()
    assert untied == (
        Positions(first=3, last_position="length-1"),
        Positions(last=2, last_position="length-1"),
    )
    assert ReftConfig(positions="f3+l2", share_weights=True).position_groups() == (
        Positions(first=3, last=2),
    )
    assert ReftConfig(positions="f3").position_groups() == (Positions(first=3),)


def test_a_parsed_spec_keeps_its_last_position() -> None:
    config = ReftConfig(positions=Positions.parse("l1", "length-1"))
    assert (config.positions, config.last_position) == ("l1", "length-1")


@given(
    method=st.sampled_from(["loreft", "direft"]),
    r=st.integers(1, 64),
    layers=st.one_of(st.just("all"), st.lists(st.integers(-9, 9), min_size=1, unique=True)),
    positions=st.one_of(
        st.sampled_from(["f3+l3", "f5", "l1", "all", "prompt", "generated"]),
        st.lists(st.integers(-9, 9), min_size=1, unique=True),
    ),
    act_fn=st.sampled_from([None, "relu", "gelu_new"]),
    dropout=st.floats(0, 1, exclude_max=True),
    last_position=st.sampled_from(["length", "length-1"]),
)
def test_json_gives_an_equal_config(**fields) -> None:
    config = ReftConfig(**fields)
    assert ReftConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(ReftConfig(**config.to_dict()))
