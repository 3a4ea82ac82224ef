"""What the launch code asks Triton to compile, told without a GPU.

A program of its own, without TRITON_INTERPRET: prints, as JSON, for each kernel the distinct requests that
calls with batches of many sizes came to. A stand-in for the driver says that the GPU is an sm_90, and a hook
takes each request before it is compiled; all that Triton does with arguments and options until then it does.
"""

from __future__ import annotations

import json

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from reft_kernels.ops import Norm
from reft_kernels.ops.arguments import Plan, PoolRows
from reft_kernels.ops.triton_ops import launch

D, POOL = 4096, 40


class StandInDriver:
    device = stream = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def requests() -> dict[str, list]:
    """By kernel: [signature, constants, names of arguments known to be divisible by 16]."""
    found: dict[str, list] = {}

    def take(*, fn, compile, **others) -> bool:
        names = fn.jit_function.arg_names
        constants = {names[path[0]]: value for path, value in compile["constants"].items()}
        divisible = [names[path[0]] for path, known in compile["configs"][0].items() if known]
        request = [compile["signature"], constants, divisible]
        mine = found.setdefault(fn.name, [])
        if request not in mine:
            mine.append(request)
        return True  # nothing is to be compiled

    driver.set_active(StandInDriver())
    knobs.runtime.jit_cache_hook = take
    for n in (1, 2, 15, 16, 17, 32, 600):
        _call(n)
    return found


def ints(*values: int, skip: int = 0) -> torch.Tensor:
    return torch.tensor([0] * skip + [*values], dtype=torch.int32)[skip:]


def _call(n: int) -> None:
    """All ops on n rows; rank, pool and what the plan's addresses are divisible by differ with n."""
    dtype, rank = torch.bfloat16, min(n, 20)
    skip = 4 if n % 2 else 1

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor([0] * skip + [*values], dtype=torch.int32)[skip:]

    pool_rows = POOL + n
    h = torch.zeros(n, D, dtype=dtype)
    down, up = torch.zeros(2, pool_rows, D, dtype=dtype)
    pool = PoolRows(down, up, torch.zeros(pool_rows), torch.zeros(pool_rows, dtype=torch.int32))
    rows = ints(*range(n))
    tiles = ints(*(entry for start in range(0, n, 16) for entry in (0, start, min(16, n - start)))).view(
        -1, 3
    )
    plan = Plan(rows, tiles, spans=ints(3, rank).view(1, 2))
    launch.intervene_(h, pool, plan)
    for norm in (Norm.RMS, Norm.PLUS_ONE, Norm.ROUND, Norm.PLUS_ONE | Norm.ROUND):
        launch.intervene_norm_(h, pool, plan, h[0].clone(), None, 1e-5, int(norm))
    for need in ((True, True), (True, False), (False, True)):
        launch.intervene_backward(h, h.clone(), pool, plan._replace(offsets=ints(0, n)), *need)


if __name__ == "__main__":
    print(json.dumps(requests()))
