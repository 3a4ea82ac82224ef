"""What stands behind the plugins and needs no engine: configs, tickets, names, block keys, residents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support.adapters import random_adapter

import reft_kernels as rk
from reft_kernels.batch import intervals_of
from reft_kernels.positions import Positions
from reft_kernels.serving import catalog as catalog_module
from reft_kernels.serving.block_key import BlockKeys
from reft_kernels.serving.catalog import Catalog, Model
from reft_kernels.serving.config import ServingConfig, Source
from reft_kernels.serving.residents import NoRoom, Residents
from reft_kernels.serving.ticket import Part, Ticket, content_of, read

WIDTH, LAYERS = 16, 3


def save(folder: Path, seed: int = 0, **changes: object) -> str:
    config = rk.ReftConfig(**{"r": 2, "layers": [0, 2], "positions": "f2+l2", **changes})
    random_adapter(config, WIDTH, LAYERS, 1.0, seed).save_pretrained(folder)
    return str(folder)


def catalog(config: dict) -> Catalog:
    return Catalog(ServingConfig.parse(config), Model(WIDTH, LAYERS))


# Configs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "reft: must be a mapping"),
        ({"adaptors": {}}, "unknown 'adaptors'"),
        ({"adapters": ["a"]}, "reft.adapters: must map"),
        ({"adapters": {"a/b": "x"}}, "without '/'"),
        ({"adapters": {"..": "x"}}, "without '/'"),
        ({"adapters": {"a": {"path": "x", "rank": 3}}}, "unknown 'rank'"),
        ({"adapters": {"a": 3}}, "must be a folder"),
        ({"directory": "/nowhere/at/all"}, "reft.directory"),
        ({"max_adapters": 0}, "reft.max_adapters"),
        ({"max_rank": True}, "reft.max_rank"),
        ({"recheck": -1}, "reft.recheck"),
        ({"recheck": float("nan")}, "reft.recheck"),
    ],
)
def test_a_wrong_config_is_named(given: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ServingConfig.parse(given)


# Names and tickets -----------------------------------------------------------------------------------------


def test_requests_get_tickets_and_wrong_ones_errors(tmp_path: Path) -> None:
    path = save(tmp_path / "math")
    names = catalog({"adapters": {"math": path}, "directory": str(tmp_path)})
    assert names.ticket({}) is None
    ticket = names.ticket({"reft_adapter": "math"}, prompt_length=9)
    assert ticket is not None and [str(one) for one in ticket.groups] == ["f2", "l2"]
    same = names.ticket({"reft_adapter": ["math"], "reft_scale": 1})
    assert same is not None and same.key == ticket.key
    other = names.ticket({"reft_adapter": "math", "reft_scale": 0.5})
    assert other is not None and other.key != ticket.key
    for arguments, text in (
        ({"reft_adapter": "maths"}, "no adapter 'maths'; known are 'math'"),
        ({"reft_adapter": "../math"}, "without '/'"),
        ({"reft_adapter": []}, "a name or a list of names"),
        ({"reft_adapter": 3}, "a name or a list of names"),
        ({"reft_scale": 2.0}, "reft_adapter is not given"),
        ({"reft_adapter": "math", "reft_scale": "2"}, "finite number"),
        ({"reft_adapter": "math", "reft_scale": float("nan")}, "finite number"),
    ):
        with pytest.raises(ValueError, match=text):
            names.ticket(arguments)


def test_positions_that_a_prompt_lacks_are_refused(tmp_path: Path) -> None:
    names = catalog({"adapters": {"fourth": save(tmp_path / "a", positions=[3])}})
    assert names.ticket({"reft_adapter": "fourth"}, 4)
    with pytest.raises(ValueError, match="outside a prompt of 3"):
        names.ticket({"reft_adapter": "fourth"}, 3)


def test_a_ticket_travels_as_plain_data_and_finds_a_changed_folder_out(tmp_path: Path) -> None:
    path = save(tmp_path / "a", positions="l2", last_position="length-1")
    names = catalog({"adapters": {"a": path}, "recheck": 0})
    ticket = names.ticket({"reft_adapter": "a", "reft_scale": 3})
    assert ticket is not None
    again = Ticket.from_dict(json.loads(json.dumps(ticket.to_dict())))
    assert again == ticket and again.key == ticket.key
    fold, plain = again.load().folds()[0], read(Source(path)).folds()[0]
    assert torch.equal(fold.up, 3 * plain.up) and torch.equal(fold.down, plain.down)
    save(tmp_path / "a", seed=1, positions="l2")
    with pytest.raises(ValueError, match="changed after a request"):
        again.load()
    renewed = names.ticket({"reft_adapter": "a", "reft_scale": 3})
    assert renewed is not None and renewed.key != ticket.key and renewed.load()


def test_files_are_looked_at_every_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And at once where a name is learnt anew."""
    now, looks = [100.0], []
    monkeypatch.setattr("reft_kernels.serving.catalog.time.monotonic", lambda: now[0])
    stamp = catalog_module._stamp
    monkeypatch.setattr(catalog_module, "_stamp", lambda path: looks.append(path) or stamp(path))
    path = save(tmp_path / "a")
    names = catalog({"adapters": {"a": path}, "recheck": 2.5})

    def key() -> str:
        ticket = names.ticket({"reft_adapter": "a"})
        assert ticket is not None
        return ticket.key

    first = key()
    save(tmp_path / "a", seed=1)
    now[0] += 2
    assert key() == first and len(looks) == 1
    now[0] += 1
    second = key()
    assert second != first and key() == second and len(looks) == 2
    save(tmp_path / "a", seed=2)
    assert names.add("a", Source(path)).key == key() not in (first, second)
    assert names.of_source(Source(path)).key == key()


def test_a_list_of_names_is_the_sum_of_edits(tmp_path: Path) -> None:
    paths = [save(tmp_path / str(seed), seed, share_weights=True) for seed in (1, 2)]
    names = catalog({"adapters": dict(zip("ab", paths))})
    ticket = names.ticket({"reft_adapter": ["a", "b"]})
    assert ticket is not None and len(ticket.parts) == 2
    both = ticket.load()
    assert both.groups == ticket.groups and both.pool_rows == 8
    assert names.ticket({"reft_adapter": ["b", "a"]}).key != ticket.key  # type: ignore[union-attr]


def test_what_a_hash_depends_on(tmp_path: Path) -> None:
    """Equal for a copy elsewhere; other for another fold, layer or positions."""
    shutil.copytree(save(tmp_path / "a"), tmp_path / "copy")
    paths = [str(tmp_path / "a"), str(tmp_path / "copy"), save(tmp_path / "b", seed=1)]
    paths += [save(tmp_path / "c", layers=[0, 1]), save(tmp_path / "d", positions="f2+l1")]
    hashes = [content_of(read(Source(path))) for path in paths]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_adapters_that_the_model_can_not_have_are_refused(tmp_path: Path) -> None:
    wide = random_adapter(rk.ReftConfig(r=2, layers=[0]), WIDTH * 2, LAYERS)
    wide.save_pretrained(tmp_path / "wide")
    deep = random_adapter(rk.ReftConfig(r=2, layers=[5]), WIDTH, 6)
    deep.save_pretrained(tmp_path / "deep")
    cases = {
        str(tmp_path / "wide"): "width 32",
        str(tmp_path / "deep"): "6 layers",
        save(tmp_path / "rank", r=9, positions="f1+l1"): "18 pool rows at one layer",
        save(tmp_path / "site", site="mlp_output"): "'mlp_output'",
        save(tmp_path / "norm", options={"keep_norm": True}): "keeps the norm of each token, which is not",
        save(tmp_path / "scales", method="red", r=1): "red edits element by element, which is not served",
        str(tmp_path / "nothing"): "nothing",
    }
    for path, text in cases.items():
        with pytest.raises(ValueError, match=text):
            catalog({"adapters": {"a": path}})
    names = catalog({"directory": str(tmp_path)})
    for path, text in cases.items():
        with pytest.raises(ValueError, match=text):
            names.ticket({"reft_adapter": Path(path).name})
    assert names.ticket({"reft_adapter": Path(save(tmp_path / "good")).name})


@pytest.mark.parametrize("positions", ["generated[::2]", "generated[:4]", "token(5)", "all-token(5)"])
def test_positions_that_each_step_must_ask_for_are_refused(tmp_path: Path, positions: str) -> None:
    save(tmp_path / "a", positions=positions)
    with pytest.raises(ValueError, match="known with the prompt's length"):
        catalog({"adapters": {"a": str(tmp_path / "a")}}).ticket({"reft_adapter": "a"})
    with pytest.raises(ValueError, match="not known with the prompt's length"):
        intervals_of([Positions.parse(positions)], 9)


def test_edits_that_meet_at_a_token_are_refused(tmp_path: Path) -> None:
    """One op edits a row once: what adds up elsewhere would be two edits of one row here."""
    adapters = {name: save(tmp_path / name, positions=spec) for name, spec in (("a", "f2+l2"), ("b", "all"))}
    served = catalog({"adapters": adapters})
    with pytest.raises(ValueError, match="would edit the same token at one place"):
        served.ticket({"reft_adapter": ["a", "b"]})
    both = rk.Adapter.compose([rk.Adapter.from_pretrained(path) for path in adapters.values()])
    both.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="would edit the same token at one place"):
        catalog({"adapters": {"both": str(tmp_path / "both")}}).ticket({"reft_adapter": "both"})


def test_a_subspace_is_asked_for_by_name(tmp_path: Path) -> None:
    """As an adapter of these rows alone: by the request, in a sum, and under a name of its own."""
    config = rk.ReftConfig(r=4, layers=[0], positions="all", subspaces={"x": [3, 0], "y": [1]})
    adapter = rk.Adapter.from_config(config, LAYERS, WIDTH)
    adapter.trainable = False
    adapter.save_pretrained(tmp_path / "a")
    part = {"path": str(tmp_path / "a"), "subspace": "x"}
    names = catalog({"adapters": {"a": str(tmp_path / "a"), "x": part}})
    found = names.ticket({"reft_adapter": "a/x"})
    assert found.key == names.ticket({"reft_adapter": "x"}).key != names.ticket({"reft_adapter": "a"}).key
    fold, (want,) = (
        Ticket.from_dict(found.to_dict()).load().folds()[0],
        adapter.select_subspace([3, 0]).folds(),
    )
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(fold, want))
    both = names.ticket({"reft_adapter": ["a/x", "a/y"]}).load().folds()[0]
    assert torch.equal(both.up, adapter.interventions[0].R[[3, 0, 1]])
    for name, words in {
        "a/z": "'z'; it has 'x', 'y'",
        "b/x": "no adapter 'b'",
        "x/y": "'x' is a subspace already",
        "../a": "without '/'",
    }.items():
        with pytest.raises(ValueError, match=words):
            names.ticket({"reft_adapter": name})


def test_names_come_and_go(tmp_path: Path) -> None:
    names = catalog({})
    with pytest.raises(ValueError, match="known are none"):
        names.ticket({"reft_adapter": "a"})
    names.add("a", Source(save(tmp_path / "a")))
    assert names.ticket({"reft_adapter": "a"})
    with pytest.raises(ValueError):
        names.add("a", Source(str(tmp_path / "missing")))
    assert names.ticket({"reft_adapter": "a"})
    names.remove("a")
    with pytest.raises(ValueError, match="no adapter 'a'"):
        names.remove("a")


# Block keys ------------------------------------------------------------------------------------------------

GROUPS = [("f3+l2",), ("f1",), ("l4",), ("all",), ("prompt",), ("generated",), ("f2", "generated")]


def ticket_of(groups: tuple[str, ...], content: str = "a") -> Ticket:
    return Ticket((Part(Source("-"), content),), 1.0, tuple(map(Positions.parse, groups)))


@hypothesis.given(
    st.sampled_from(GROUPS),
    st.sampled_from(GROUPS),
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 20),
)
def test_keys_are_equal_exactly_where_the_edits_before_are(
    mine: tuple, theirs: tuple, length: int, other: int, end: int
) -> None:
    """By the positions themselves, one by one, up to the block's end."""

    def edited(groups: tuple, prompt: int) -> set[tuple[int, int]]:
        found = intervals_of([Positions.parse(one) for one in groups], prompt)
        return {(g, p) for g, first, last in found.tolist() for p in range(first, min(last, end))}

    same = edited(mine, length) == edited(theirs, other)
    a, b = (BlockKeys(ticket_of(*it[:1]), it[1]).until(end) for it in ((mine, length), (theirs, other)))
    assert (a == b) == same
    assert (a is None) == (not edited(mine, length))
    if a is not None:
        assert BlockKeys(ticket_of(mine, "b"), length).until(end) != a


# Residents -------------------------------------------------------------------------------------------------


def test_residents_put_the_least_recently_used_out_and_never_one_in_use() -> None:
    residents = Residents(3)
    for key in "abc":
        assert residents.take(key) == []
    residents.give_back("b")
    residents.give_back("a")
    assert residents.idle == ["b", "a"]
    assert residents.take("b") == [] and residents.take("d") == ["a"]
    with pytest.raises(NoRoom, match="all 3"):
        residents.take("e")
    assert "e" not in residents and len(residents) == 3
    with pytest.raises(RuntimeError, match="in use"):
        residents.drop("b")
    residents.take("c")
    residents.give_back("c")
    assert residents.idle == []  # two users, one of them left
    residents.give_back("c")
    assert residents.take("e") == ["c"]
