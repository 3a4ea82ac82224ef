"""Folders of every format version, as earlier code wrote them: they load to what was saved, and save again
to the same bytes.

The files under fixtures/ are never written anew: what they hold is `pattern`, spelled out below.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reft_kernels import Adapter, ReftConfig
from reft_kernels.adapter.orthonormal import orthonormal_rows
from reft_kernels.checkpoint import native
from reft_kernels.positions import Positions

FIXTURES = Path(__file__).parent / "fixtures"
CONFIGS = {
    "version1": ReftConfig(
        r=2, layers=[0, -1], positions="f2+l1", act_fn="relu", dropout=0.1, last_position="length-1"
    ),
    "version2": ReftConfig(
        method="direft",
        r=2,
        layers=[1],
        positions=[0, -1],
        site="mlp_output",
        modules_to_save=["classifier"],
    ),
    "version3": ReftConfig(method="vector", layers=[0, 2], positions="all", options={"coefficient": -2.0}),
}


def pattern(index: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor of this number in a folder: sixteenths, exact in every dtype."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7 + index * 13) % 31 - 15).div(16).to(dtype).reshape(shape)


def parameters(index: int) -> dict[str, Tensor]:
    """What the intervention of this number has."""
    return {
        "R": pattern(3 * index, 2, 8),
        "W": pattern(3 * index + 1, 2, 8, dtype=torch.bfloat16),
        "b": pattern(3 * index + 2, 2, dtype=torch.bfloat16),
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def check_modules(adapter: Adapter) -> None:
    (path,) = adapter.saved_modules.tensors()
    assert path == "classifier" and adapter.saved_modules.names == ("classifier",)
    same(adapter.saved_modules.tensors()[path], {"weight": pattern(50, 3, 8), "bias": pattern(51, 3)})


def test_version_1() -> None:
    adapter = Adapter.from_pretrained(FIXTURES / "version1")
    assert adapter.config == CONFIGS["version1"] and (adapter.n_layers, adapter.width) == (3, 8)
    first, last = Positions.parse("f2", "length-1"), Positions.parse("l1", "length-1")
    places = [(one.layer, one.positions) for one in adapter.interventions]
    assert places == [(0, first), (2, first), (0, last), (2, last)]
    for index, one in enumerate(adapter.interventions):
        assert (one.method, one.site, one.act_fn, one.dropout) == ("loreft", "block_output", "relu", 0.1)
        same(one.materialized(), parameters(index))
    assert not adapter.trainable and not adapter.saved_modules


def test_version_2_with_saved_modules() -> None:
    adapter = Adapter.from_pretrained(FIXTURES / "version2")
    assert adapter.config == CONFIGS["version2"]
    (one,) = adapter.interventions
    assert (one.method, one.layer, one.site, str(one.positions)) == ("direft", 1, "mlp_output", "[0, -1]")
    same(one.materialized(), parameters(0))
    check_modules(adapter)


def test_version_2_of_a_training() -> None:
    """Raw parameters: training goes on from them, and inference has the orthonormal rows made of them."""
    training = Adapter.from_record(native.read(FIXTURES / "version2_training"), keep_raw=True)
    assert training.trainable
    same({name: p.detach() for name, p in training.interventions[0].named_parameters()}, parameters(0))
    check_modules(training)
    ready = Adapter.from_pretrained(FIXTURES / "version2_training")
    assert not ready.trainable
    same(ready.interventions[0].materialized(), parameters(0) | {"R": orthonormal_rows(pattern(0, 2, 8))})
    check_modules(ready)


def test_version_3() -> None:
    adapter = Adapter.from_pretrained(FIXTURES / "version3")
    assert adapter.config == CONFIGS["version3"] and (adapter.n_layers, adapter.width) == (3, 8)
    for index, one in enumerate(adapter.interventions):
        assert (one.method, one.layer, one.scale, one.options) == ("vector", 2 * index, 1.5, {})
        same(one.materialized(), {"v": pattern(index, 1, 8), "coefficient": torch.tensor([-2.0])})
        fold = one.fold()
        assert torch.equal(fold.bias @ fold.up, -3 * pattern(index, 8))


@pytest.mark.parametrize("folder", CONFIGS)
def test_they_are_written_to_the_same_bytes(folder: str, tmp_path: Path) -> None:
    Adapter.from_pretrained(FIXTURES / folder).save_pretrained(tmp_path)
    for file in (native.CONFIG, native.WEIGHTS):
        assert (tmp_path / file).read_bytes() == (FIXTURES / folder / file).read_bytes()
