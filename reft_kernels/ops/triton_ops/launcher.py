"""Launches of one kernel: through Triton the first time, then directly.

`JITFunction.run` looks at every argument anew, and makes a text of what it saw, to find what it compiled.
Here the variant is known by less. What is asked for in practice is one variant for each pair of dtypes, each
d and each device: that of tensors which begin at multiples of 16 bytes, and rows which lie so too. Its launch
goes to the compiled kernel at once. Everything else goes through Triton: arguments of other alignments,
numbers beyond int32, hooks of profilers, debugging, AMD, the interpreter, and every Triton whose internals
were not looked at.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .blocks import INTERPRETING

#: The Tritons in which a compiled kernel is launched as `_Ready` does it.
_LOOKED_AT = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)

_interpreter = threading.Lock()

_HERE = contextlib.nullcontext()

_NO_VARIANT: dict[str, Any] = {}


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the one that kernels are launched on."""
    if INTERPRETING:
        return _interpreter  # which patches triton.language while it runs, for all threads
    # Triton launches on the current device, which need not be the tensors'.
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _HERE


class _Ready(NamedTuple):
    """What a launch of a compiled kernel takes beside its arguments."""

    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple  # the constexprs; the launcher expects them too, behind the arguments
    kernel: CompiledKernel  # kept, since `function` is unloaded with it


class Launcher:
    """Launches `kernel`, whose parameters are tensors, then numbers, then the constexprs of `options`.

    options(h_dtype, pool_dtype, d, aligned): the constexprs and compiler options by name. numbers: the names
    of the numbers, in the order of the kernel. A launch gives them by place: a call by keywords costs
    more than a microsecond more.
    """

    #: Whether any launch may go directly.
    direct = _LOOKED_AT and not INTERPRETING and torch.version.hip is None

    def __init__(self, kernel: Any, options: Callable[..., dict], numbers: tuple[str, ...]) -> None:
        self.kernel, self.options, self.numbers = kernel, options, numbers
        self._ready: dict[tuple, _Ready] = {}
        # Of the kernel's parameters, known with the first call: places of the tensors that Triton compiles
        # for the alignment of, of the numbers that it does for divisibility, and of the integers.
        self._known = False
        self._aligned: tuple[int, ...] = ()
        self._divisible: tuple[int, ...] = ()
        self._integers: tuple[int, ...] = ()

    def _learn(self, tensors: tuple[Tensor | None, ...], numbers: tuple) -> None:
        at, kernel = len(tensors), self.kernel
        names = tuple(kernel.arg_names[at : at + len(self.numbers)])
        if names != self.numbers or len(numbers) != len(names):
            raise TypeError(
                f"numbers: the kernel takes {names} after {at} tensors, was given {self.numbers}: {numbers}"
            )
        if not INTERPRETING:
            after = kernel.params[at : at + len(numbers)]
            self._aligned = tuple(
                place
                for place, parameter in enumerate(kernel.params[:at])
                if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
            )
            self._integers = tuple(place for place, value in enumerate(numbers) if type(value) is int)
            self._divisible = tuple(place for place in self._integers if not after[place].do_not_specialize)
        self._known = True

    def launch(
        self,
        grid: tuple[int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        d: int,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple,
        variant: dict[str, Any] = _NO_VARIANT,
    ) -> None:
        """One launch, on the current device and stream.

        dtypes: of h and of the pool. What other dtypes there are must follow from these two, from which
        tensors are None, and from `variant`: constexprs that `options` lacks, or, where the kernel has no
        such constexpr, what else the caller tells variants apart by. tensors, numbers: in the kernel's order,
        which begins with them. The names are compared at the first call.
        """
        if not self._known:
            self._learn(tensors, numbers)
        bits = every = absent = 0
        for place in self._aligned:
            tensor = tensors[place]
            if tensor is None:
                absent |= 1 << place
            else:
                bits |= tensor.data_ptr()
        for place in self._divisible:
            bits |= numbers[place]
        for place in self._integers:
            every |= numbers[place]
        aligned = bits % 16 == 0
        runtime = knobs.runtime
        key = None
        if (
            aligned
            and 0 <= every < 2**31
            and self.direct
            and not runtime.debug
            and not self.kernel.pre_run_hooks
            and not getattr(hook := runtime.launch_enter_hook, "calls", hook)
            and not getattr(hook := runtime.launch_exit_hook, "calls", hook)
        ):
            active = driver.active
            device = active.get_current_device()
            key = (device, d, *dtypes, absent, *variant.values())
            ready = self._ready.get(key)
            if ready is not None:
                ready.run(
                    *grid, active.get_current_stream(device), ready.function, ready.metadata,
                    None, None, None, *tensors, *numbers, *ready.constants,
                )  # fmt: skip
                return
        options = self.options(*dtypes, d, aligned) | {
            name: value for name, value in variant.items() if name in self.kernel.arg_names
        }
        compiled = self.kernel[grid](*tensors, *numbers, **options)
        # A kernel that is still being compiled elsewhere, say, is another class.
        if key is not None and type(compiled) is CompiledKernel:
            constants = self.kernel.arg_names[len(tensors) + len(numbers) :]
            self._ready[key] = _Ready(
                compiled.run,
                compiled.function,
                compiled.packed_metadata,
                tuple(options[name] for name in constants),
                compiled,
            )
