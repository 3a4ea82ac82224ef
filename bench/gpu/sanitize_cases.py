"""A small fixed set of calls of the CUDA kernels, for compute-sanitizer: python bench/gpu/sanitize_cases.py

Every form once: rows and tiles (8 and 16 rows at once), one unit of d a block and several, aligned and not,
all dtypes, padding, ranks beyond what is kept; forward, with and without the norm that follows, of a sum of
two tensors, and backward; and the elementwise edit. Then the forward in the ways that stand beside the usual
one.
Everything but our kernels runs on the CPU: the GPU copies and computes nothing else. Values are compared
with the reference backend, so that a run proves that the kernels ran.

Each case is announced before it begins. The last line is "N of N cases, 0 wrong results" where all is well.
Exit status 1 if a result is wrong, 3 if --seconds (of all cases together) did not suffice for all.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from bench.kernels.ways import WAYS, in_way  # noqa: E402
from reft_kernels import ops  # noqa: E402
from reft_kernels.plan import Plan  # noqa: E402

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
#: One block, a cluster of two, one whose blocks have several units each, unaligned.
WIDTHS = (512, 1024, 5120, 1031)
RANKS = (8, 3, 70)

#: Rows of each segment; −1 is padding, and some rows belong to nobody. The host takes 16 rows at once where
#: tiles have more than 4 on average, the empty tile counted in, else 8.
MANY = [[*range(25), -1], [25, 30], [33]]
FEW = [[*range(3), -1], [4], [6]]

#: Of what `run` returns.
NAMES = (
    *("h", "normed h", "norm", "dh", "ddown", "dup", "dbias", "summed h", "addend"),
    *("scaled h", "scaled dh", "dscale", "dshift"),
)


class Case(NamedTuple):
    """way, normed: only the forward, in another way than the usual one (a name of `WAYS`), without the norm
    or with it."""

    dtype: torch.dtype
    pool: torch.dtype
    width: int
    rows: list[list[int]]
    way: str = ""
    normed: bool = False

    def __str__(self) -> str:
        many = "many rows" if self.rows is MANY else "few rows"
        way = f", {self.way}{' with the norm' * self.normed}" if self.way else ""
        return f"{self.dtype} with {self.pool}, d={self.width}, {many}{way}"


def cases() -> list[Case]:
    """What serves a decode step comes first."""
    same = [
        Case(dtype, dtype, width, rows) for dtype in (BF16, HALF) for width in WIDTHS for rows in (FEW, MANY)
    ]
    ways = [
        Case(BF16, BF16, 1024, FEW, "push"),
        Case(BF16, BF16, 1024, FEW, "push", True),
        Case(BF16, BF16, 5120, FEW, "push", True),
        Case(BF16, BF16, 5120, FEW, "ring"),
        Case(BF16, BF16, 5120, MANY, "ring"),
    ]
    others = [Case(*dtypes, width, MANY) for dtypes in ((BF16, FLOAT), (FLOAT, FLOAT)) for width in WIDTHS]
    return same + ways + others


class Inputs(NamedTuple):
    """On the CPU."""

    h: torch.Tensor
    grad: torch.Tensor
    pool: list[torch.Tensor]
    plan: Plan
    covering: list[torch.Tensor]  # rows and tiles that name every row of h, and spans
    weights: list[torch.Tensor | None]
    norm: int


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.width)
    count, size = 3 + max(max(mine) for mine in case.rows), sum(RANKS)
    h, grad = torch.randn(2, count, case.width, generator=generator).to(case.dtype)
    down, up = (torch.randn(2, size, case.width, generator=generator) / case.width**0.5).to(case.pool)
    bias = torch.randn(size, generator=generator)
    kind = torch.arange(size, dtype=torch.int32) % len(ops.Act)
    kind[::5] |= ops.NO_PRODUCT
    firsts = [sum(RANKS[:i]) for i in range(len(RANKS))]
    plan = Plan(*_tables(case.rows, list(zip(firsts, RANKS))))
    weight, shift = (torch.randn(2, case.width, generator=generator) + 1).to(case.dtype)
    centred = case.rows is MANY
    return Inputs(
        h,
        grad,
        [down, up, bias, kind],
        plan,
        _covering(plan, count),
        [weight, shift if centred else None],
        ops.Norm.CENTRED | ops.Norm.ROUND if centred else ops.Norm.RMS,
    )


def _tables(rows: list[list[int]], spans: list[tuple[int, int]]) -> list[torch.Tensor]:
    flat, tiles, offsets = [], [], [0]
    for segment, mine in enumerate(rows):
        tiles += [(segment, len(flat) + at, min(16, len(mine) - at)) for at in range(0, len(mine), 16)]
        flat += mine
        offsets.append(len(flat))
    tiles.append((0, 0, 0))
    return [torch.tensor(it, dtype=torch.int32) for it in (flat, tiles, spans, offsets)]


def _covering(plan: Plan, count: int) -> list[torch.Tensor]:
    """The plan's tables with all other rows of h in tiles that edit nothing."""
    used = set(plan.rows.tolist())
    rest = [row for row in range(count) if row not in used]
    start = len(plan.rows)
    tiles = [(-1, start + at, min(16, len(rest) - at)) for at in range(0, len(rest), 16)]
    more = (torch.tensor(it, dtype=torch.int32) for it in (rest, tiles))
    return [*(torch.cat(pair) for pair in zip(plan[:2], more)), plan.spans]


def run(
    backend: str, case: Case, it: Inputs, to: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """The ops' results, in the order of NAMES. `to` copies an input to where the backend takes it."""
    pool, plan = [to(t) for t in it.pool], [to(t) for t in it.plan]
    edited, normed = to(it.h), to(it.h)
    in_another = bool(case.way) and backend == "native" and edited.is_cuda
    with in_way(WAYS[case.way][0]) if in_another else contextlib.nullcontext():
        if not case.normed:
            ops.INTERVENE_[backend](edited, *pool, *plan[:3])
            if case.way:
                return [edited]
        weight, shift = (None if t is None else to(t) for t in it.weights)
        covering = [to(t) for t in it.covering]
        every_row = ops.INTERVENE_NORM_[backend](normed, *pool, *covering, weight, shift, 1e-6, it.norm)
        if case.way:
            return [normed, every_row]
    hs = to(it.h[it.plan.rows.clamp(min=0).long()])
    gradients = ops.INTERVENE_BACKWARD[backend](to(it.grad), hs, *pool, *plan, True, True)
    summed, addend = to(it.h), to(it.grad)
    ops.INTERVENE_SUM_[backend](summed, addend, *pool, *plan[:3])
    return [edited, normed, every_row, *gradients, summed, addend, *_elementwise(backend, it, hs, to)]


def _elementwise(
    backend: str, it: Inputs, hs: torch.Tensor, to: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """The edited h and the gradients of the elementwise edit; D and U serve as its pool, a row a segment."""
    pool = [to(t.float()) for t in it.pool[:2]]
    spans = torch.tensor([(segment, 1) for segment in range(len(RANKS))], dtype=torch.int32)
    rows, tiles, spans, offsets = (to(t) for t in it.plan._replace(spans=spans))
    scaled = to(it.h)
    ops.SCALE_SHIFT_[backend](scaled, *pool, rows, tiles, spans)
    given = (to(it.grad), hs, *pool, rows, tiles, spans, offsets)
    return [scaled, *ops.SCALE_SHIFT_BACKWARD[backend](*given, True, True)]


def compare(case: Case, device: str) -> int:
    """The number of wrong results."""
    it, wrong = inputs(case), 0
    results = [result.cpu() for result in run("native", case, it, lambda t: t.to(device, copy=True))]
    wanted = run("reference", case, it, torch.clone)
    for name, got, want in zip(NAMES[case.normed :], results, wanted):
        # By norms: one wrong row or column of a case is orders of magnitude beyond this.
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if not error < (1e-5 if got.dtype is FLOAT and case.dtype is FLOAT else 2e-2):
            wrong += 1
            print(f"WRONG {name} of {case}: relative error {error:.3g}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--device", default="cuda", help="cpu: the kernels for CPUs (default: %(default)s)")
    args = parser.parse_args()
    begun, done, wrong = time.monotonic(), 0, 0
    for case in cases():
        seconds = time.monotonic() - begun
        if seconds > args.seconds:
            break
        print(f"{seconds:6.1f} s  {case}", flush=True)
        wrong += compare(case, args.device)
        done += 1
    print(f"{done} of {len(cases())} cases, {wrong} wrong results", flush=True)
    return 1 if wrong else 0 if done == len(cases()) else 3


if __name__ == "__main__":
    sys.exit(main())
