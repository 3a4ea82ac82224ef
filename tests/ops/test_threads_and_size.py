"""Calls from several threads at once, and indices beyond 2³¹ elements."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from support.calls import backward, gradient_like, in_place
from support.cases import USUAL, Spec, build, interpreted, same_bits

from reft_kernels.ops import INTERVENE_


def _spec(seed: int) -> Spec:
    return dataclasses.replace(
        USUAL,
        seed=seed,
        dtypes=(torch.bfloat16, torch.bfloat16),
        d=64 + 8 * seed,
        lead=(18,),
        ranks=(4, 2, 9),
        gaps=(0, 1, 0),
        count=18,
    )


def test_two_threads_at_once(backend: str, device: str) -> None:
    """Each thread has tensors of its own and must get, to the bit, what it gets alone."""
    cases = [build(_spec(seed), device) for seed in range(2)]
    grads = [gradient_like(case) for case in cases]
    alone = [(in_place(c, backend).storage, *backward(c, g, backend)) for c, g in zip(cases, grads)]
    start, wrong = threading.Barrier(2), []

    def work(index: int) -> None:
        start.wait()
        for _ in range(2 if interpreted(backend, device) else 60):
            case = cases[index]
            results = (in_place(case, backend).storage, *backward(case, grads[index], backend))
            if not all(same_bits(a, b) for a, b in zip(results, alone[index])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


WIDTH = 4096


def _lazy(count: int, device: str) -> torch.Tensor:
    """[count, WIDTH] bfloat16 of which the system hands out only the pages that are touched (on a CPU)."""
    try:
        return torch.empty(count, WIDTH, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:  # out of memory, or no overcommitment
        pytest.skip(f"no {count * WIDTH * 2 / 2**30:.0f} GiB of address space: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("large", ["h", "pool"])
def test_more_elements_than_an_int32_counts(backend: str, device: str, large: str) -> None:
    """The last rows of h, or of the pool, begin beyond element 2³¹ (an index of int32 turns negative)."""
    if interpreted(backend, device):
        pytest.skip("the interpreter checks each pointer against every tensor: minutes")
    beyond = 2**31 // WIDTH + 8
    many_rows, many_pool_rows = (beyond, 4) if large == "h" else (4, beyond)
    generator = torch.Generator().manual_seed(0)
    x, down_rows, up_rows = torch.randn(3, 3, WIDTH, generator=generator).bfloat16().to(device)
    h, down, up = _lazy(many_rows, device), _lazy(many_pool_rows, device), _lazy(many_pool_rows, device)
    h[-3:], down[-3:], up[-3:] = x, down_rows, up_rows
    ints = {"dtype": torch.int32, "device": device}
    bias, kind = torch.ones(many_pool_rows, device=device), torch.zeros(many_pool_rows, **ints)
    rows = torch.tensor([many_rows - 3, many_rows - 1], **ints)
    tiles = torch.tensor([[0, 0, 2]], **ints)
    INTERVENE_[backend](h, down, up, bias, kind, rows, tiles, torch.tensor([[many_pool_rows - 3, 3]], **ints))
    small = x.clone()
    INTERVENE_[backend](
        small,
        down_rows,
        up_rows,
        bias[:3].clone(),
        kind[:3].clone(),
        torch.tensor([0, 2], **ints),
        tiles,
        torch.tensor([[0, 3]], **ints),
    )
    assert same_bits(h[-3:], small) and not same_bits(small, x)
