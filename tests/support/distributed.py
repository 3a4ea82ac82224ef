"""What runs in the processes of the distributed tests: one step or a few, compared with a single process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import reft_kernels as rk

from .models import make_model


def model_of() -> nn.Module:
    model = make_model()
    torch.manual_seed(3)
    rk.patch(model).add_adapter("a", rk.ReftConfig(r=2, positions="f2+l1"))
    model.reft.add_adapter("b", rk.ReftConfig(method="direft", r=3, layers=[0, 2], positions="all"))
    return model.train()


def batch(rows: slice) -> dict:
    ids = torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(1))[rows]
    labels = ids.clone()
    labels[:, :3] = -100
    names = ["a", "b", "b", "a"][rows]
    return {"input_ids": ids, "labels": labels, "adapter_names": names, "use_cache": False}


def steps(model: nn.Module, call: nn.Module, rows: slice, count: int = 2) -> list[torch.Tensor]:
    """Logits in evaluation after some steps of fused AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, fused=True)
    for _ in range(count):
        optimizer.zero_grad()
        call(**batch(rows)).loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = call(**batch(rows)).logits
        model.train()
    return logits


def _data_parallel(rank: int) -> None:
    model = model_of()
    call = nn.parallel.DistributedDataParallel(model)
    _check(rank, steps(model, call, slice(2 * rank, 2 * rank + 2)))


def _fully_sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    _check(rank, steps(model, model, slice(2 * rank, 2 * rank + 2)))


def _check(rank: int, logits: torch.Tensor) -> None:
    whole = model_of()
    want = steps(whole, whole, slice(0, 4))
    torch.testing.assert_close(logits, want[2 * rank : 2 * rank + 2], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits, make_model()(input_ids=batch(slice(0, 4))["input_ids"]).logits[:2])


def _run(rank: int, name: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        globals()[name](rank)
    finally:
        dist.destroy_process_group()


def two_processes(name: str, port: int) -> None:
    """Runs a function of this module in two processes; raises what either raised."""
    mp.spawn(_run, args=(name, port), nprocs=2)
