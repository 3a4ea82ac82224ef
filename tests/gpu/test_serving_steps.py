"""A serving engine's steps on a GPU: graphs, captured once, read the tables that each step refills."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import random_adapter
from support.cases import same_bits

import reft_kernels as rk
from reft_kernels import ops
from reft_kernels.batch import Place
from reft_kernels.serving.catalog import Catalog, Model
from reft_kernels.serving.config import ServingConfig
from reft_kernels.serving.worker import Worker

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
WIDTH, LAYERS, TOKENS = 512, 2, 24


@pytest.fixture
def tickets(tmp_path: Path) -> dict:
    for seed, (name, positions) in enumerate({"a": "all", "b": "l2", "c": "f1+l1", "d": "all"}.items()):
        config = rk.ReftConfig(r=4, layers="all", positions=positions)
        random_adapter(config, WIDTH, LAYERS, 1.0, seed).save_pretrained(tmp_path / name)
    names = Catalog(ServingConfig.parse({"directory": str(tmp_path)}), Model(WIDTH, LAYERS))
    return {name: names.ticket({"reft_adapter": name}) for name in "abcd"}


class Steps:
    """Two layers as an engine captures them: each edits the sum of two tensors of TOKENS rows."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.h, self.addend = torch.zeros(2, LAYERS, TOKENS, WIDTH, dtype=torch.bfloat16, device=DEVICE)
        worker.idle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run(self.h, self.addend)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run(self.h, self.addend)

    def run(self, h: torch.Tensor, addend: torch.Tensor, backend: str = "", captured: bool = True) -> None:
        worker = self.worker
        rows, tiles = worker.tables.tables(TOKENS, captured)
        edit = ops.INTERVENE_SUM_[backend] if backend else worker.edit_sum
        for layer in range(LAYERS):
            spans = worker.tables.spans[worker.sites[layer]]
            edit(h[layer], addend[layer], *worker.pool.rows, rows, tiles, spans)

    def step(self, seed: int, batch: list[str], starts: list[int], counts: list[int]) -> torch.Tensor:
        """Replays a step; it has the bits of a call outside a graph, and the reference's values."""
        self.worker.step(batch, np.array(starts), np.array(counts))
        given = torch.randn(2, LAYERS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        given = given.to(self.h)
        self.h.copy_(given[0]), self.addend.copy_(given[1])
        self.graph.replay()
        plain, wanted = given.clone(), given.clone()
        self.run(*plain, captured=False)
        assert same_bits(self.h, plain[0]) and same_bits(self.addend, plain[1])
        self.run(*wanted, backend="reference", captured=False)
        torch.testing.assert_close(self.h, wanted[0], rtol=2e-2, atol=2e-2)
        assert same_bits(self.addend, wanted[1])
        return (self.h != given[0]).any(-1).any(0)


def test_a_captured_step_edits_the_requests_of_now(fused: str, tickets: dict) -> None:
    """Requests come, decode and go; more tokens than at capture, fewer, and none that is edited."""
    place = Place(torch.device(DEVICE), torch.bfloat16)
    worker = Worker(range(LAYERS), WIDTH, place, 2, max_requests=4, max_tokens=TOKENS, max_rank=8)
    steps = Steps(worker)
    worker.add("one", tickets["a"], 7)
    worker.add("two", tickets["b"], 5)
    edited = steps.step(1, ["one", "bare", "two"], [0, 0, 0], [7, 4, 5])
    assert edited.nonzero().flatten().tolist() == [*range(7), 14, 15]
    edited = steps.step(2, ["two", "one"], [5, 7], [1, 1])
    assert edited.nonzero().flatten().tolist() == [1]
    worker.remove("one")
    assert not steps.step(3, ["two", "bare"], [6, 4], [1, 1]).any()
    worker.add("three", tickets["d"], 20)  # in the place of the first one's adapter
    edited = steps.step(4, ["three", "two"], [0, 7], [20, 1])
    assert edited.nonzero().flatten().tolist() == [*range(20)]
    worker.remove("two"), worker.remove("three")
    assert not steps.step(5, ["bare"], [0], [TOKENS]).any()
    worker.add("four", tickets["c"], 3)
    edited = steps.step(6, ["four"], [0], [3])
    assert edited.nonzero().flatten().tolist() == [0, 2]
