"""The latency of device memory: a chain of loads, each of whose addresses is the result of the one before."""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl

#: Bytes between two places of the chain, and how many places there are: 256 MiB in all, beyond any L2.
LINE, LINES = 128, 1 << 21

#: Steps of the two chains whose difference is taken, so that launch and first miss drop out.
SHORT, LONG = 512, 2560


@triton.jit
def _chase(chain, out, steps, LINE_WORDS: tl.constexpr):
    place = tl.load(out)
    for _ in range(steps):
        place = tl.load(chain + place.to(tl.int64) * LINE_WORDS)
    tl.store(out, place)


def chain_of(lines: int, words: int, device: str) -> torch.Tensor:
    """[lines, words] int32; the first word of a line is the number of the next, in one random cycle."""
    order = torch.randperm(lines, device=device)
    chain = torch.zeros(lines, words, dtype=torch.int32, device=device)
    chain[order, 0] = order.roll(-1).int()
    return chain


def latency(device: str, samples: int = 9) -> float:
    """Seconds of one dependent load from device memory, the median of some samples."""
    words = LINE // 4
    chain = chain_of(LINES, words, device)
    out = torch.zeros(1, dtype=torch.int32, device=device)

    def seconds(steps: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _chase[(1,)](chain, out, steps, words, num_warps=1)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    seconds(SHORT), seconds(LONG)  # compile
    found = [(seconds(LONG) - seconds(SHORT)) / (LONG - SHORT) for _ in range(samples)]
    return statistics.median(found)
