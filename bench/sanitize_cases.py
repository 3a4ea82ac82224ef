"""A small fixed set of calls of the CUDA kernels, for compute-sanitizer: python bench/sanitize_cases.py

Every form once: rows and tiles, one unit of d a block and several, aligned and not, all dtypes, few and
many rows, padding, ranks beyond what is kept; forward, with and without the norm that follows, and backward.
Values are compared with the reference backend, so that a run proves that the kernels ran. Exit status 1 if
any is wrong.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
from collections.abc import Sequence

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from reft_kernels import ops  # noqa: E402
from reft_kernels.plan import Plan  # noqa: E402

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]
WIDTHS = (512, 1024, 5120, 1031)  # one block, a cluster, several units a block, unaligned
RANKS = (8, 3, 70)
ROWS = 37
NORM = ops.Norm.CENTRED | ops.Norm.ROUND


def tensors(dtypes: tuple[torch.dtype, torch.dtype], width: int) -> tuple:
    generator = torch.Generator().manual_seed(width)
    h = torch.randn(ROWS, width, generator=generator).to("cuda", dtypes[0])
    size = sum(RANKS)
    down, up = (torch.randn(2, size, width, generator=generator) / width**0.5).to("cuda", dtypes[1])
    bias = torch.randn(size, generator=generator).cuda()
    kind = torch.arange(size, dtype=torch.int32) % 9
    kind[::5] |= ops.NO_PRODUCT
    first = [sum(RANKS[:i]) for i in range(len(RANKS))]
    # The first segment has many rows, and one place of padding; some rows belong to nobody.
    rows = [[*range(25), -1], [25, 30], [33]]
    plan = Plan(*(t.cuda() for t in _tables(rows, list(zip(first, RANKS)))))
    return h, (down.contiguous(), up.contiguous(), bias, kind.cuda()), plan


def _tables(rows: list[list[int]], spans: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    flat, tiles, offsets = [], [], [0]
    for segment, mine in enumerate(rows):
        tiles += [(segment, len(flat) + at, min(16, len(mine) - at)) for at in range(0, len(mine), 16)]
        flat += mine
        offsets.append(len(flat))
    tiles.append((0, 0, 0))
    return tuple(torch.tensor(it, dtype=torch.int32) for it in (flat, tiles, spans, offsets))


def run(backend: str, h: torch.Tensor, pool: Sequence[torch.Tensor], plan: Plan) -> list[torch.Tensor]:
    edited = h.clone()
    ops.INTERVENE_[backend](edited, *pool, *plan[:3])
    normed, weights = h.clone(), h[:2] + 1
    every_row = ops.INTERVENE_NORM_[backend](normed, *pool, *covering(plan, len(h)), *weights, 1e-6, NORM)
    hs = h[plan.rows.clamp(min=0).long()]
    gradients = ops.INTERVENE_BACKWARD[backend](edited, hs, *pool, *plan, True, True)
    return [edited, normed, every_row, *gradients]


def covering(plan: Plan, count: int) -> list[torch.Tensor]:
    """The plan's tables with all other rows of h in tiles that edit nothing."""
    used = set(plan.rows.tolist())
    rest = [row for row in range(count) if row not in used]
    start = len(plan.rows)
    tiles = [(-1, start + at, min(16, len(rest) - at)) for at in range(0, len(rest), 16)]
    more = (torch.tensor(it, dtype=torch.int32).to(plan.rows) for it in (rest, tiles))
    return [*(torch.cat(pair) for pair in zip(plan[:2], more)), plan.spans]


def main() -> int:
    wrong = 0
    for dtypes, width in itertools.product(DTYPES, WIDTHS):
        h, pool, plan = tensors(dtypes, width)
        results = [result.cpu() for result in run("native", h, pool, plan)]
        # On the CPU: on the GPU there is to be nothing else to look at.
        wanted = run("reference", h.cpu(), [t.cpu() for t in pool], Plan(*(t.cpu() for t in plan)))
        names = ("h", "normed h", "norm", "dh", "ddown", "dup", "dbias")
        for name, got, want in zip(names, results, wanted):
            # By norms: one wrong row or column of a case is orders of magnitude beyond this.
            error = ((got.double() - want.double()).norm() / want.double().norm()).item()
            if not error < (1e-5 if got.dtype is torch.float32 and h.dtype is torch.float32 else 2e-2):
                wrong += 1
                print(f"WRONG {name} {dtypes} d={width}: relative error {error:.3g}")
    print(f"{len(DTYPES) * len(WIDTHS)} cases, {wrong} wrong results")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
