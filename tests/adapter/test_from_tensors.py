"""Adapters of computed tensors: where they go, what is filled in, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import reft_kernels as rk

D = 8
from_tensors = rk.Adapter.from_tensors


def test_a_vector_at_some_layers() -> None:
    v = torch.arange(D, dtype=torch.float64)
    adapter = from_tensors("vector", {3: v, -1: 2 * v}, options={"coefficient": -0.5}, n_layers=6)
    assert [one.layer for one in adapter.interventions] == [3, 5]
    assert [str(group) for group in adapter.groups] == ["all"]
    assert not adapter.trainable and adapter.n_layers == 6
    for one, factor in zip(adapter.interventions, (1, 2)):
        fold = one.fold()
        torch.testing.assert_close(fold.bias @ fold.up, -0.5 * factor * v)
        assert one.coefficient.dtype is torch.float64


def test_what_was_given_wins_over_the_option() -> None:
    v = torch.ones(2, D)
    adapter = from_tensors("vector", {0: {"v": v, "coefficient": torch.tensor([3.0, 4.0])}})
    assert adapter.interventions[0].coefficient.tolist() == [3.0, 4.0]
    assert adapter.interventions[0].options == {}  # it is in the tensor, and nowhere else


def test_heads() -> None:
    v = torch.ones(D)
    adapter = from_tensors("lofit", {(2, 0): v, (2, 3): v}, site="head_attention_value_output")
    assert [(one.layer, one.head) for one in adapter.interventions] == [(2, 0), (2, 3)]


def test_a_vector_for_each_position() -> None:
    """ActAdd: row i of the difference of two prompts' activations is added at position i."""
    difference = torch.randn(3, D)
    adapter = from_tensors("vector", {6: difference}, positions=[0, 1, 2], per_position=True)
    assert [one.positions.resolve(9).tolist() for one in adapter.interventions] == [[0], [1], [2]]
    for row, one in enumerate(adapter.interventions):
        fold = one.fold()
        torch.testing.assert_close(fold.bias @ fold.up, difference[row])


def test_options_that_the_fold_needs_are_saved(tmp_path: Path) -> None:
    rows = {name: torch.randn(2, D) for name in ("w_enc", "w_dec")}
    made = from_tensors(
        "sae", {1: {**rows, "b_enc": torch.zeros(2)}}, options={"mode": "minimum", "target": 2.5}
    )
    made.save_pretrained(tmp_path)
    again = rk.Adapter.from_pretrained(tmp_path)
    assert again.interventions[0].options == {"mode": "minimum"}
    assert again.interventions[0].target.tolist() == [2.5, 2.5]
    for mine, theirs in zip(made.folds()[0], again.folds()[0]):
        assert torch.equal(mine, theirs)


def test_a_computed_adapter_can_be_trained_on() -> None:
    adapter = from_tensors("ablation", {0: torch.randn(D)}, options={"add": 1.0})
    adapter.trainable = True
    one = adapter.interventions[0]
    adapter.folds()[0].up.sum().backward()
    assert one.v.grad is not None and one.v.grad.any()
    assert [name for name, _ in adapter.named_parameters()] == ["interventions.0.v"]
    with pytest.raises(ValueError, match="sae can't be trained"):
        sae = {"w_enc": torch.ones(D), "w_dec": torch.ones(D), "b_enc": torch.zeros(1)}
        from_tensors("sae", {0: sae}).trainable = True


def test_a_subspace_of_what_has_no_rows_is_refused() -> None:
    adapter = rk.Adapter.from_config(rk.ReftConfig(method="adapter", r=3, positions="all"), 1, D)
    with pytest.raises(ValueError, match="^rows: adapter has b_up"):
        adapter.select_subspace([0])
    plain = rk.ReftConfig(method="adapter", r=3, positions="all", options={"bias": False})
    part = rk.Adapter.from_config(plain, 1, D).select_subspace([2, 0])
    assert part.interventions[0].names == ("W_down", "W_up") and part.config.options == {"bias": False}


V = torch.ones(D)
SAE = {"w_enc": V, "w_dec": V, "b_enc": torch.zeros(1)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "caa"}, ("method", "vector", "'caa'")),
        ({"tensors": {}}, ("tensors", "at least one")),
        ({"tensors": V}, ("tensors", "by layer")),
        ({"tensors": {-1: V}}, ("layer", "-1")),
        ({"tensors": {0: {"u": V}}}, ("v", "missing", "unknown: u")),
        ({"tensors": {0: torch.ones(2, 2, D)}}, ("v", "[r, d]", "[2, 2, 8]")),
        ({"tensors": {0: V, 1: torch.ones(4)}}, ("width", "4", "8")),
        ({"tensors": {(0, 1): V}}, ("head", "None at block_output", "1")),
        ({"options": {"strength": 2}}, ("options", "vector", "'strength'", "'coefficient'")),
        ({"options": {"coefficient": "2"}}, ("options", "coefficient", "finite number", "'2'")),
        ({"act_fn": "relu"}, ("act_fn", "vector takes none")),
        ({"method": "lofit"}, ("site", "lofit", "head_attention_value_output", "block_output")),
        ({"per_position": True}, ("positions", "list of 1 indices", "all")),
        ({"per_position": True, "positions": [0, 1]}, ("positions", "list of 1 indices", "[0, 1]")),
        ({"method": "ablation", "tensors": {0: torch.zeros(D)}}, ("v", "linearly independent")),
        ({"method": "ablation", "tensors": {0: torch.ones(2, D)}}, ("v", "linearly independent")),
        (
            {"method": "sae", "tensors": {0: SAE}, "options": {"mode": "max"}},
            ("options", "mode", "'minimum'"),
        ),
        (
            {"method": "sae", "tensors": {0: SAE}, "options": {"mode": "minimum", "target": -1.0}},
            ("target", "0 or more", "-1"),
        ),
        ({"method": "concept", "options": {"mode": "replace"}}, ("other", "replace", "was given w")),
        ({"method": "concept", "tensors": {0: {"w": V, "other": V}}}, ("value", "clamp", "w, other, value")),
        (
            {
                "method": "concept",
                "tensors": {0: {"w": 0 * V, "other": V}},
                "options": {"mode": "replace"},
            },
            ("w", "zero"),
        ),
    ],
)
def test_bad_input_is_named(arguments: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        from_tensors(**{"method": "vector", "tensors": {0: V}, **arguments})
    for word in words:
        assert word in str(caught.value), caught.value
