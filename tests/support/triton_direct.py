"""Direct launches against those through Triton, without a GPU.

A program of its own, without TRITON_INTERPRET. Nothing is compiled: a stand-in takes the place of each
compiled kernel and remembers what reaches its launcher; all that Triton does with arguments until then it
does. Prints, as JSON, a list of cases: {"name", "direct": launches past Triton, "same": whether kernel and
arguments were those that Triton alone chooses}. With `time` as its argument it prints the host's time of an
op each way instead.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from unittest import mock

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from reft_kernels.ops import Norm
from reft_kernels.ops.schema import flat
from reft_kernels.ops.triton_ops import launch
from reft_kernels.ops.triton_ops.launcher import Launcher
from support.triton_launch import D, StandInDriver, ints

# As torch calls them, with the tensors of pool and plan.
_edit = flat("intervene_", launch.intervene_)
_edit_and_norm = flat("intervene_norm_", launch.intervene_norm_)
_backward = flat("intervene_backward", launch.intervene_backward)

_HEAD = ("grid_x", "grid_y", "grid_z", "stream", "function", "metadata", "launch_metadata", "enter", "exit")

launched: list[tuple] = []
through_triton = 0
recording = True
own: set[int] = set()  # addresses of the tensors that a case passes


def _stand_in(jit: JITFunction, key, signature, device, constexprs, options, attrs, warmup) -> CompiledKernel:
    """Takes the place of JITFunction._do_compile. `function` names the variant: what was to be compiled."""
    kernel = object.__new__(CompiledKernel)
    variant = (jit.__name__, str(signature), str(constexprs), str(attrs), str(options))

    def run(*arguments) -> None:
        if not recording:
            return
        named = dict(zip(_HEAD, arguments))
        launched.append((variant, *(named[name] for name in _HEAD[:6]), *map(_told, arguments[len(_HEAD) :])))

    kernel.src, kernel.name, kernel.packed_metadata = None, jit.__name__, (options.num_warps, variant)
    kernel.module, kernel._module_pid, kernel.function, kernel._run = object(), None, hash(variant), run
    jit.device_caches[device][0][key] = kernel
    return kernel


def _told(argument) -> object:
    """A tensor by what a kernel sees of it; its address, unless it was made by the call."""
    if isinstance(argument, torch.Tensor):
        address = argument.data_ptr()
        return str(argument.dtype), tuple(argument.shape), address % 16, address in own and address
    return argument


def _count(run):
    def counted(*arguments, **options):
        global through_triton
        through_triton += 1
        return run(*arguments, **options)

    return counted


class Call:
    """Tensors of a call, each `skip` bytes from a multiple of 16."""

    def __init__(
        self, n=3, d=D, dtypes=(torch.bfloat16, torch.bfloat16), capacity=40, stride=None, **skip
    ) -> None:
        h_dtype, pool_dtype = dtypes

        def made(name: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
            entries = torch.Size(shape).numel()
            off = skip.get(name, 0) // dtype.itemsize
            return torch.zeros(entries + off, dtype=dtype)[off:].view(shape)

        self.h = made("h", n, stride or d, dtype=h_dtype)[:, :d]
        self.down, self.up = (made(name, capacity, d, dtype=pool_dtype) for name in ("down", "up"))
        self.bias = made("bias", capacity, dtype=torch.float32)
        self.kind = made("kind", capacity, dtype=torch.int32)
        self.weight, self.shift = (made(name, d, dtype=h_dtype) for name in ("weight", "shift"))
        self.hs = made("hs", n, d, dtype=h_dtype)
        self.pool = self.down, self.up, self.bias, self.kind
        starts = range(0, n, 16)
        tiles = ints(*(entry for start in starts for entry in (0, start, min(16, n - start)))).view(-1, 3)
        self.plan = ints(*range(n)), tiles, ints(3, 8).view(1, 2)
        self.offsets = ints(0, n)

    def edit(self) -> None:
        _edit(self.h, *self.pool, *self.plan)

    def rms_norm(self) -> None:
        _edit_and_norm(self.h, *self.pool, *self.plan, self.weight, None, 1e-5, int(Norm.ROUND))

    def layer_norm(self) -> None:
        _edit_and_norm(self.h, *self.pool, *self.plan, self.weight, self.shift, 1e-5, int(Norm.CENTRED))

    def backward(self) -> None:
        _backward(self.h, self.hs, *self.pool, *self.plan, self.offsets, True, True)


OPS = ("edit", "rms_norm", "layer_norm", "backward")


def _after(first: Call, call: Call, op: str) -> tuple[int, list]:
    """(launches past Triton, all launches) of a call, after `first` has made its variant ready."""
    getattr(first, op)()
    launched.clear()
    before = through_triton
    getattr(call, op)()
    return len(launched) - (through_triton - before), list(launched)


def cases() -> list[dict]:
    found = []

    def compare(name: str, op: str, call: Call) -> None:
        own.clear()
        own.update(t.data_ptr() for t in (call.h, call.hs, call.weight, call.shift, *call.pool, *call.plan))
        direct, seen = _after(Call(), call, op)
        with mock.patch.object(Launcher, "direct", False):
            launched.clear()
            getattr(call, op)()
        found.append({"name": f"{op}: {name}", "direct": direct, "same": seen == launched})

    mixed, wide = (torch.bfloat16, torch.float32), (torch.float32, torch.float32)
    for op in OPS:
        compare("the same", op, Call())
        compare("another number of rows", op, Call(16))
        compare("rows that programs share", op, Call(600))
        compare("another pool", op, Call(capacity=41))
        compare("the plan elsewhere", op, _moved(Call()))
        compare("rows apart", op, Call(stride=D + 16))
        for name in ("h", "down", "up", "bias", "kind", "weight", "shift", "hs"):
            compare(f"{name} 4 bytes on", op, Call(**{name: 4}))
            compare(f"{name} 8 bytes on", op, Call(**{name: 8}))
        compare("rows apart by no multiple of 16", op, Call(stride=D + 8))
        compare("another d", op, Call(d=2048))
        compare("an odd d", op, Call(d=33))
        for dtypes in (mixed, wide, (torch.float16, torch.float16)):
            compare(f"dtypes {dtypes}", op, Call(dtypes=dtypes))
    for what, value in (("debug", True), ("launch_enter_hook", lambda metadata: None)):
        with mock.patch.object(knobs.runtime, what, value):
            compare(f"{what} is set", "edit", Call())
    Call().edit()
    driver.active.device, driver.active.stream = 1, 7
    launched.clear()
    before, call = through_triton, Call()
    call.edit(), call.edit()
    streams = [seen[4] for seen in launched]
    direct = len(launched) - (through_triton - before)
    found.append(
        {"name": "edit: twice on another device and stream", "direct": direct, "same": streams == [7, 7]}
    )
    return found


def _moved(call: Call) -> Call:
    """The plan where no address is divisible by 16, which makes no other variant."""
    call.plan = tuple(
        torch.cat([table.flatten()[:1], table.flatten()])[1:].view(table.shape) for table in call.plan
    )
    return call


def times(rounds: int = 15, calls: int = 300) -> dict[str, list[float]]:
    """Microseconds of a call on this host: [through Triton, directly], medians of interleaved rounds."""
    global recording
    recording, found = False, {}
    for op in OPS[:2]:
        call = getattr(Call(), op)
        taken: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for direct in (False, True):
                with mock.patch.object(Launcher, "direct", direct):
                    call()
                    begin = time.perf_counter()
                    for _ in range(calls):
                        call()
                    taken[direct].append((time.perf_counter() - begin) / calls * 1e6)
        found[op] = [round(statistics.median(taken[direct]), 2) for direct in (False, True)]
    return found


@contextlib.contextmanager
def stand_ins():
    driver.set_active(StandInDriver())
    with (
        mock.patch.object(JITFunction, "_do_compile", _stand_in),
        mock.patch.object(JITFunction, "run", _count(JITFunction.run)),
    ):
        yield


if __name__ == "__main__":
    with stand_ins():
        print(json.dumps(times() if sys.argv[1:] == ["time"] else cases()))
