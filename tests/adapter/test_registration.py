"""Methods of one's own: the page's example trains and is saved, and what is wrong with one is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import reft_kernels as rk
from reft_kernels.adapter.method import METHODS, flag, number, word
from reft_kernels.checkpoint import CheckpointError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


@pytest.fixture
def gated() -> Iterator[rk.Adapter]:
    """The adapter that the page's example makes."""
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    yield names["adapter"]
    rk.unregister_method("gated")


def test_the_pages_example_is_its_formula(gated: rk.Adapter) -> None:
    torch.manual_seed(0)
    one = gated.interventions[0]
    assert not one.V.any() and one.W.any() and one.V.requires_grad and one.options == {"strength": 0.5}
    one.double()
    with torch.no_grad():
        one.V.normal_()
    h = torch.randn(5, 64, dtype=torch.float64)
    pool, fold = rk.Pool(64, torch.float64), one.fold()
    with rk.backend("reference"):
        found = rk.functional.intervene_(h.clone(), pool, rk.make_plan([(pool.add(fold), [0, 1, 3])]))
    wanted = h.clone()
    wanted[[0, 1, 3]] += 0.5 * torch.sigmoid(h @ one.W.T + one.b)[[0, 1, 3]] @ one.V
    torch.testing.assert_close(found, wanted.detach())


def test_its_penalty_reaches_the_parameters(gated: rk.Adapter) -> None:
    with torch.no_grad():
        gated.interventions[0].V.fill_(2.0)
    penalty = gated.penalty()
    penalty.backward()
    assert penalty.item() == pytest.approx(0.01 * 4 * 2 * 64)
    torch.testing.assert_close(gated.interventions[0].V.grad, torch.full((2, 64), 0.04))
    plain = rk.Adapter.from_config(rk.ReftConfig(r=1), 1, 8)
    assert plain.penalty().item() == 0


def test_it_survives_a_save_and_needs_its_registration(gated: rk.Adapter, tmp_path: Path) -> None:
    gated.trainable = False
    gated.save_pretrained(tmp_path)
    again = rk.Adapter.from_pretrained(tmp_path)
    assert again.config == gated.config and again.interventions[0].options == {"strength": 0.5}
    for name, tensor in gated.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    method = METHODS["gated"]
    rk.unregister_method("gated")
    try:
        with pytest.raises(CheckpointError, match="register_method.*'gated'"):
            rk.Adapter.from_pretrained(tmp_path)
    finally:
        rk.register_method("gated", method)


@pytest.mark.models
def test_it_trains_beside_others(gated: rk.Adapter) -> None:
    from support.models import batch_of, make_model

    model = make_model("llama", gain=1.0)
    reft = rk.patch(model)
    reft.add_adapter("mine", rk.ReftConfig(method="gated", r=2, positions="all"))
    reft.add_adapter("other", rk.ReftConfig(r=2, positions="l1"))
    batch = batch_of([5, 5])
    optimizer = torch.optim.Adam(reft.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        out = model(
            **batch, labels=batch["input_ids"], prompt_lengths=[3, 3], adapter_names=["mine", "other"]
        )
        (out.loss + reft.adapters["mine"].penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] and reft.adapters["mine"].interventions[0].V.any()


def with_attributes(**attributes) -> rk.Method:
    return type("Tried", (rk.Method,), {"shapes": {"V": "rd"}, **attributes})()


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("loreft", with_attributes(), ("name", "loreft", "already")),
        ("two words", with_attributes(), ("name", "two words")),
        ("tried", rk.Method, ("method", "instance")),
        ("tried", METHODS["loreft"], ("method", "registered", "loreft")),
        ("tried", with_attributes(shapes={}), ("shapes", "rd")),
        ("tried", with_attributes(shapes={"v": "d"}), ("shapes", "rd", "'d'")),
        ("tried", with_attributes(shapes={"V": "rd", "w": "rx"}), ("shapes", "w", "rx")),
        ("tried", with_attributes(shapes={"rank": "rd"}), ("shapes", "rank")),
        ("tried", with_attributes(fixed=frozenset({"W"})), ("fixed", "W")),
        ("tried", with_attributes(shapes={"V": "rd", "b": "r"}, orthonormal=("b",)), ("orthonormal", "b")),
        ("tried", with_attributes(options={"a": number("x")}), ("options", "a")),  # type: ignore[arg-type]
        ("tried", with_attributes(sites=("nowhere",)), ("sites", "nowhere", "block_output")),
    ],
)
def test_what_contradicts_itself_is_refused(name: str, method, words: tuple[str, ...]) -> None:
    before = dict(METHODS)
    with pytest.raises(ValueError) as caught:
        rk.register_method(name, method)
    assert all(word in str(caught.value) for word in words), caught.value
    assert METHODS == before


def test_options_are_checked() -> None:
    kinds = {"number": number(1.0), "flag": flag(False), "word": word("clamp", "other")}
    method = with_attributes(options=kinds, trainable=False, sites=("mlp_output",))
    rk.register_method("tried", method)
    try:
        assert method.resolve({"flag": True}) == {"number": 1.0, "flag": True, "word": "clamp"}
        for wrong, allowed in (
            ({"number": float("nan")}, "number must be a finite number, was nan"),
            ({"number": True}, "was True"),
            ({"flag": 1}, "flag must be True or False, was 1"),
            ({"word": "neither"}, "one of 'clamp', 'other', was 'neither'"),
            ({"size": 1}, "tried has no 'size'; it has 'number', 'flag', 'word'"),
            ("flag", "settings by name, was 'flag'"),
        ):
            with pytest.raises(ValueError, match=f"^options: .*{allowed}"):
                rk.ReftConfig(method="tried", site="mlp_output", options=wrong)
        with pytest.raises(ValueError, match="^site: tried.*'mlp_output' only.*'block_output'"):
            rk.ReftConfig(method="tried")
        with pytest.raises(ValueError, match="^site: tried.*'mlp_output' only.*'block_output'"):
            rk.Adapter([intervention("tried")])
    finally:
        rk.unregister_method("tried")
    with pytest.raises(ValueError, match="'tried'"):
        rk.unregister_method("tried")


def intervention(method: str):
    from reft_kernels.adapter import Intervention

    return Intervention(method, 0, "block_output", rk.Positions.parse("all"), {"V": torch.zeros(1, 8)})
