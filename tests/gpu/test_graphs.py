"""CUDA graphs: a replay with other rows, fewer rows, other adapters and other activations than at capture."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.cases import same_bits

import reft_kernels as rk
from reft_kernels.plan import Plan

pytestmark = pytest.mark.gpu

WIDTH, ROWS, RANK, ADAPTERS = 512, 40, 8, 6


def _fold(seed: int, rank: int = RANK) -> rk.Fold:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, rank, WIDTH, generator=generator) / WIDTH**0.5
    kind = torch.randint(0, len(rk.ops.Act), (rank,), generator=generator, dtype=torch.int32)
    return rk.Fold(down, up, torch.randn(rank, generator=generator), kind)


class Captured:
    """intervene_ on buffers of a fixed size, in a graph: a row a tile, the rest of the tables padding."""

    def __init__(self) -> None:
        self.pool = rk.Pool(WIDTH, torch.bfloat16, "cuda", capacity=ADAPTERS * RANK)
        self.spans = [self.pool.add(_fold(seed)) for seed in range(ADAPTERS)]
        self.h = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
        ints = {"dtype": torch.int32, "device": "cuda"}
        self.plan = Plan(
            torch.full((ROWS,), -1, **ints),
            torch.zeros(ROWS, 3, **ints),
            torch.zeros(ADAPTERS, 2, **ints),
            torch.zeros(ADAPTERS + 1, **ints),
        )
        self.fill([])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.edit(self.h)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.edit(self.h)

    def fill(self, chosen: list[tuple[int, int]]) -> None:
        """(row, adapter) pairs: refills the tables in place, as a server does between steps."""
        rows, tiles = torch.full((ROWS,), -1), torch.zeros(ROWS, 3)
        for place, (row, adapter) in enumerate(chosen):
            rows[place] = row
            tiles[place] = torch.tensor([adapter, place, 1])
        self.plan.rows.copy_(rows)
        self.plan.tiles.copy_(tiles)
        self.plan.spans.copy_(torch.tensor([tuple(span) for span in self.spans]))

    def edit(self, h: torch.Tensor) -> torch.Tensor:
        return rk.functional.intervene_(h, self.pool, self.plan)

    def replay_and_compare(self, seed: int) -> None:
        before = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(self.h)
        self.h.copy_(before)
        self.graph.replay()
        assert same_bits(self.h, self.edit(before.clone()))


@pytest.mark.parametrize("count", [ROWS, 7, 1, 0])
def test_replay_with_other_rows_than_at_capture(fused: str, count: int) -> None:
    captured = Captured()
    captured.fill([(row, (3 * row) % ADAPTERS) for row in torch.randperm(ROWS)[:count].tolist()])
    captured.replay_and_compare(1)
    if count == 0:
        noise = torch.randint(-(2**15), 2**15, (ROWS, WIDTH), dtype=torch.int16).view(torch.bfloat16)
        captured.h.copy_(noise)
        captured.graph.replay()
        assert same_bits(captured.h.cpu(), noise)


def test_replay_after_adapters_came_and_went(fused: str) -> None:
    """Written over in place, deleted, and another of a smaller rank in the free range."""
    captured = Captured()
    chosen = [(row, row % ADAPTERS) for row in range(ROWS)]
    captured.fill(chosen)
    captured.replay_and_compare(1)
    captured.pool.write(captured.spans[2], _fold(77))
    captured.replay_and_compare(2)
    captured.pool.remove(captured.spans[4])
    captured.spans[4] = captured.pool.add(_fold(78, rank=3))
    captured.fill(chosen)
    captured.replay_and_compare(3)


@pytest.mark.parametrize("count", [ROWS, 7, 0])
def test_replay_of_the_edit_with_its_norm(fused: str, count: int) -> None:
    """The norm of every row, also where other rows are edited than at capture."""
    captured = Captured()
    weight = torch.linspace(0.5, 1.5, WIDTH).to(captured.h)
    # A row a tile; the tiles of rows that nobody edits have no segment.
    plan = Plan(captured.plan.rows, torch.zeros_like(captured.plan.tiles), *captured.plan[2:])

    def fill(chosen: dict[int, int]) -> None:
        captured.fill([(row, chosen.get(row, 0)) for row in range(ROWS)])
        tiles = captured.plan.tiles.clone()
        tiles[[row for row in range(ROWS) if row not in chosen], 0] = -1
        plan.tiles.copy_(tiles)

    def run(h: torch.Tensor) -> torch.Tensor:
        return rk.functional.intervene_norm_(h, captured.pool, plan, weight, None, 1e-6, rk.ops.Norm.ROUND)

    fill({})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(captured.h)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(captured.h)
    fill({row: (3 * row) % ADAPTERS for row in torch.randperm(ROWS)[:count].tolist()})
    before = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(4)).to(captured.h)
    captured.h.copy_(before)
    graph.replay()
    expected = run(before)
    assert same_bits(captured.h, before) and same_bits(out, expected)


#: Kernels are loaded when they are first launched; here that is in a capture, and more than 48 KB of shared
#: memory is asked for there.
FIRST_LAUNCH = """
import torch
import reft_kernels as rk
pool = rk.Pool(512, torch.bfloat16, "cuda", capacity=16000)
row = torch.ones(1, 512)
span = pool.add(rk.Fold(row, row, torch.ones(1), torch.zeros(1, dtype=torch.int32)))
plan = rk.make_plan([(span, [0, 2])], "cuda")
h = torch.zeros(3, 512, dtype=torch.bfloat16, device="cuda")
graph = torch.cuda.CUDAGraph()
with rk.backend("native"), torch.cuda.graph(graph):
    rk.functional.intervene_(h, pool, plan)
assert not h.any()
graph.replay()
assert (h[[0, 2]] == 1).all() and not h[1].any()
"""


def test_first_launch_of_native_in_a_capture() -> None:
    reason = rk.ops.why_not("native", "cuda")
    if reason is not None:
        pytest.skip(f"native: {reason}")
    done = subprocess.run([sys.executable, "-c", FIRST_LAUNCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiled_with_graphs(fused: str) -> None:
    """torch.compile's own graphs, around an edit of what the compiled code made."""
    captured = Captured()
    captured.fill([(row, row % ADAPTERS) for row in range(0, ROWS, 2)])
    torch._dynamo.reset()
    compiled = torch.compile(lambda h: captured.edit(h * 2) + 1, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        h = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(captured.h)
        torch.compiler.cudagraph_mark_step_begin()
        assert same_bits(compiled(h).clone(), captured.edit(h * 2) + 1)
