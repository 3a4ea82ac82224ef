"""`Worker`: adapters laid down as requests come, by the tables of one step after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import random_adapter

import reft_kernels as rk
from reft_kernels.batch import Place
from reft_kernels.ops import NO_PRODUCT  # noqa: F401  (the ops are registered)
from reft_kernels.serving.catalog import Catalog, Model
from reft_kernels.serving.config import ServingConfig, Source
from reft_kernels.serving.worker import Worker

WIDTH, LAYERS = 16, 3
PLACE = Place(torch.device("cpu"), torch.float32)


@pytest.fixture
def tickets(tmp_path: Path) -> dict:
    ranks = {"a": 1, "b": 3, "c": 4, "d": 2, "e": 4}
    for seed, (name, rank) in enumerate(ranks.items()):
        layers = [0] if name == "a" else "all"
        config = rk.ReftConfig(r=rank, layers=layers, positions="all" if name in "abc" else "l2")
        random_adapter(config, WIDTH, LAYERS, 1.0, seed).save_pretrained(tmp_path / name)
    names = Catalog(ServingConfig.parse({"directory": str(tmp_path)}), Model(WIDTH, LAYERS))
    return {name: names.ticket({"reft_adapter": name}) for name in ranks} | {None: None}


def make(layers: list[int] | None = None, max_adapters: int = 2, max_rank: int = 4, **more: int) -> Worker:
    chosen = list(range(LAYERS)) if layers is None else layers
    return Worker(
        chosen, WIDTH, PLACE, max_adapters, max_requests=4, max_tokens=32, max_rank=max_rank, **more
    )


def edits(worker: Worker, layer: int, tokens: int) -> torch.Tensor:
    """What a step adds to hidden states of ones at a layer."""
    h = torch.ones(tokens, WIDTH)
    pool = worker.pool
    rows, tiles = worker.tables.tables(tokens)
    worker.edit(
        h, pool.down, pool.up, pool.bias, pool.kind, rows, tiles, worker.tables.spans[worker.sites[layer]]
    )
    return h - 1


def expected(ticket, layer: int) -> torch.Tensor:
    adapter = ticket.load()
    found = torch.zeros(WIDTH)
    for one, fold in zip(adapter.interventions, adapter.folds()):
        if one.layer == layer:
            found += fold.up.T @ (fold.down @ torch.ones(WIDTH) + fold.bias)
    return found


def step(worker: Worker, batch: list[str], starts: list[int], counts: list[int]) -> None:
    worker.step(batch, np.array(starts), np.array(counts))


def test_requests_come_and_go_and_each_gets_its_own(tickets: dict) -> None:
    worker = make()
    worker.add("one", tickets["b"], 4)
    worker.add("bare", None, 3)
    worker.add("two", tickets["d"], 5)  # edits the last two of five
    step(worker, ["one", "bare", "two"], [0, 0, 2], [2, 2, 3])
    for layer in range(LAYERS):
        found = edits(worker, layer, 7)
        wanted = torch.zeros(7, WIDTH)
        wanted[:2], wanted[5:] = expected(tickets["b"], layer), expected(tickets["d"], layer)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    worker.remove("one")
    step(worker, ["two", "bare"], [5, 3], [1, 1])
    assert worker.tables.used == (0, 0)
    worker.remove("two")
    worker.remove("never heard of")
    step(worker, ["bare"], [3], [1])
    assert worker.tables.used == (0, 0)


def test_the_last_used_stay_and_room_is_found_where_the_pool_is_in_pieces(tickets: dict) -> None:
    """Ranks of every size in a pool that is exactly large enough, in any order, hundreds of times."""
    worker = make()
    generator = np.random.default_rng(0)
    for number in range(150):
        names = generator.choice(list("abcde"), size=2)
        for place, name in enumerate(names):
            worker.add(f"{number} {place}", tickets[str(name)], 3)
        step(worker, [f"{number} 0", f"{number} 1"], [2, 2], [1, 1])
        assert len(worker.residents) <= 2
        layer = int(generator.integers(LAYERS))
        found = edits(worker, layer, 2)
        for row, name in enumerate(names):
            wanted = expected(tickets[str(name)], layer) if number % 10 == 0 else found[row]
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)
        for place in range(2):
            worker.remove(f"{number} {place}")


def test_a_pool_in_pieces_is_packed(tickets: dict) -> None:
    """Room for two adapters of rank 4 at one layer: eight rows, 3 + 3 are free when 4 are asked for."""
    worker = make([0])
    worker.add("first", tickets["b"], 3)
    worker.add("stays", tickets["d"], 3)
    worker.remove("first")
    worker.add("large", tickets["c"], 3)
    step(worker, ["stays", "large"], [2, 2], [1, 1])
    wanted = torch.stack([expected(tickets[name], 0) for name in "dc"])
    torch.testing.assert_close(edits(worker, 0, 2), wanted, rtol=1e-4, atol=1e-5)


def test_a_stage_of_a_pipeline_edits_its_own_layers(tickets: dict) -> None:
    first, last = make([0]), make([1, 2])
    for worker in (first, last):
        worker.add("a", tickets["a"], 4)  # edits layer 0 alone
        worker.add("b", tickets["b"], 4)
        step(worker, ["a", "b"], [0, 0], [1, 1])
    torch.testing.assert_close(
        edits(first, 0, 2), torch.stack([expected(tickets[n], 0) for n in "ab"]), rtol=1e-4, atol=1e-5
    )
    found = edits(last, 2, 2)
    assert not found[0].any()
    torch.testing.assert_close(found[1], expected(tickets["b"], 2), rtol=1e-4, atol=1e-5)
    last.remove("a")
    last.remove("b")


def test_an_engine_that_tells_only_who_is_there(tickets: dict) -> None:
    """Put off and come again, and a finished request's name given to another."""
    worker = make()
    known = {"x": (tickets["b"], 4), "y": (None, 4), "z": (tickets["d"], 4)}
    worker.follow(["x", "y"], known.__getitem__)
    worker.follow(["y", "z"], known.__getitem__)
    assert set(worker._rows) == {"z"}
    worker.follow(["z", "x"], known.__getitem__)
    step(worker, ["z", "x"], [3, 3], [1, 1])
    torch.testing.assert_close(edits(worker, 1, 2)[1], expected(tickets["b"], 1), rtol=1e-4, atol=1e-5)
    known["x"] = (tickets["d"], 4)
    worker.forget(["x"])
    worker.follow(["z", "x"], known.__getitem__)
    step(worker, ["z", "x"], [3, 3], [1, 1])
    torch.testing.assert_close(edits(worker, 1, 2)[1], expected(tickets["d"], 1), rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_gone_is_that_requests_error_alone(tickets: dict, tmp_path: Path) -> None:
    worker = make()
    worker.add("good", tickets["b"], 4)
    file = tmp_path / "c" / "reft_config.json"
    text = file.read_text()
    file.unlink()
    worker.stage(tickets["c"])
    assert "reft_config" in (worker.staged(tickets["c"].key) or "")
    with pytest.raises((ValueError, OSError)):
        worker.add("bad", tickets["c"], 4)
    step(worker, ["good", "bad"], [0, 0], [1, 1])
    assert edits(worker, 0, 2)[0].any() and not edits(worker, 0, 2)[1].any()
    file.write_text(text)
    worker.add("bad", tickets["c"], 4)
    assert worker.staged(tickets["c"].key) == ""


def test_what_was_read_ahead_is_kept_up_to_a_number(tickets: dict) -> None:
    worker = make(staged=2)
    for name in "bcd":
        worker.stage(tickets[name])
    assert [worker.staged(tickets[name].key) for name in "bcd"] == [None, "", ""]


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_adapters_are_read_beside_the_steps(tickets: dict, tmp_path: Path) -> None:
    """Each once; those of the config before anyone asks, and a bad one is the error of who asks for it."""
    worker = make()
    reads = []
    stage = worker.stage
    worker.stage = lambda ticket, *more: (reads.append(ticket.key), stage(ticket, *more))  # type: ignore[method-assign, assignment]
    (tmp_path / "a" / "reft_config.json").write_text("{")
    worker.stage_first([Source(str(tmp_path / name)) for name in "ab"])
    until(lambda: worker.staged(tickets["b"].key) == "")
    for name in "ca":
        assert worker.stage_beside(tickets[name].key, tickets[name].to_dict()) is None
    until(lambda: worker.stage_beside(tickets["c"].key, tickets["c"].to_dict()) == "")
    until(lambda: bool(worker.staged(tickets["a"].key) is not None))
    assert reads.count(tickets["b"].key) == reads.count(tickets["c"].key) == 1
    worker.add("one", tickets["b"], 4)
    worker.add("two", tickets["c"], 4)
    step(worker, ["one", "two"], [0, 0], [1, 1])
    wanted = torch.stack([expected(tickets[name], 0) for name in "bc"])
    torch.testing.assert_close(edits(worker, 0, 2), wanted, rtol=1e-4, atol=1e-5)


def test_the_arguments_of_a_step_are_those_of_its_tables(tickets: dict) -> None:
    worker = make()
    worker.add("one", tickets["d"], 4)  # edits positions 2 and 3
    for start, count in ((0, 3), (3, 1), (0, 4), (2, 1), (3, 1)):
        step(worker, ["one"], [start], [count])
        h = torch.ones(count, WIDTH)
        worker.edit(h, *worker.arguments(count)[1])
        assert torch.equal(h - 1, edits(worker, 1, count)) and h.ne(1).any()
