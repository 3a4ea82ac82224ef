"""The short way past the dispatcher: the library that calls the stand-ins of a patched model in C.

It is there where it was built, and where torch lets C look at a tensor (DLPack's exchange functions). Without
it everything goes the long way, through the registered ops, with the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import build
from . import native

#: 0 leaves the short way alone.
ENVIRONMENT = "REFT_KERNELS_SHORT_WAY"

_NAME = "reft_kernels_standin"
LIBRARY = build.LIB / f"{_NAME}.abi3.so"

#: The dtypes of hidden states, in the order of the codes in python_bindings/launch.h.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _watchers() -> tuple[Any, ...]:
    """Functions of C that say whether somebody would see an op on its way through the dispatcher.

    In this order: modes of `__torch_dispatch__` and of `__torch_function__`, functorch's transforms, the
    profiler, a tracer of TorchScript. Each gives something false where there is none.
    """
    root: Any = torch._C
    return (
        root._len_torch_dispatch_stack,
        root._len_torch_function_stack,
        root._functorch.peek_interpreter_stack,
        root._autograd._profiler_enabled,
        root._is_tracing,
    )


def _load() -> tuple[Any, str | None]:
    """The module, or why there is none."""
    if os.environ.get(ENVIRONMENT, "").strip() == "0":
        return None, f"{ENVIRONMENT} is 0"
    if native.cpu_missing is not None:
        return None, native.cpu_missing
    if not LIBRARY.exists():
        return None, build.why_missing(LIBRARY)
    if hasattr(sys, "gettotalrefcount"):
        return None, "this Python is a debug build, which refuses a class that inherits its __call__"
    try:
        exchange = Tensor.__dict__.get("__dlpack_c_exchange_api__") or Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
        launches = ctypes.CDLL(str(native._CPU_LIBRARY)).reft_kernels_cpu_launches
        launches.restype = ctypes.c_void_p
        loader = importlib.machinery.ExtensionFileLoader(_NAME, str(LIBRARY))
        spec = importlib.util.spec_from_loader(_NAME, loader)
        assert spec is not None
        module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.set_up(
            exchange,
            launches(),
            Tensor,
            nn.Parameter,
            torch.empty_like,
            _watchers(),
            torch._C._is_any_autocast_enabled,
            _DTYPES,
        )
    except (ImportError, AttributeError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"
    return module, None


_module, missing = _load()

#: Python's class of stand-ins → the one that is called in C, and back.
_SHORTENED: dict[type, type] = {}
_PLAIN: dict[type, type] = {}


def shortened(cls: type, kind: str) -> type:
    """A class that behaves as `cls` and is called in C; `cls` itself where that can't be had.

    kind: "site" or "norm", whose attributes python_bindings/standin.cpp reads.
    """
    if _module is None:
        return cls
    if cls not in _SHORTENED:
        made: Any = _module.shorten(cls, kind, f"{cls.__module__}.{cls.__qualname__}")
        _SHORTENED[cls], _PLAIN[made] = made, cls
    return _SHORTENED[cls]


def plain(cls: type) -> type:
    """The Python class behind a shortened one, by which it is pickled."""
    return _PLAIN.get(cls, cls)


def blank(cls: type) -> Any:
    """An empty instance of a class or, where there is one, of its shortened one."""
    made = _SHORTENED.get(cls, cls)
    return made.__new__(made)  # type: ignore[call-overload]


def bind_anew(stand_in: Any) -> None:
    """To be called when the sites of a stand-in became others."""
    if type(stand_in) in _PLAIN:
        _module.unbind(stand_in)


def table(count: int, sites: list[tuple[int, Any, Tensor, int, torch.dtype]]) -> Any:
    """What a table does at its sites, by address.

    count: of the sites that there are. sites: (number, pool or None where its op is called by name, spans,
    slot, dtype of hidden states) of those at which something is done.
    """
    return _module.table(count, sites)


def plan(table: Any, rows: list[tuple[Tensor, Tensor]], tokens: int) -> Any:
    """A plan's rows [n] and tiles [n_tiles, 3] for each slot, for h of `tokens` rows, by address, beside its
    table. Its `close()` says that the sites are others now."""
    return _module.plan(table, rows, tokens)


def cell() -> Any:
    """What tells the stand-ins of one model about the plan that it is under. Its `hold` takes False for none,
    None for one whose ops are called by name, or a plan by address. None where there is no short way."""
    return None if _module is None else _module.cell()


def pool_moved() -> None:
    """To be called when a pool got other tensors: what holds addresses of any looks again."""
    if _module is not None:
        _module.moved()


@contextlib.contextmanager
def long_way() -> Iterator[None]:
    """Inside the block every op goes through the dispatcher, in all threads. For comparisons."""
    before = _module.switch(False) if _module is not None else False
    try:
        yield
    finally:
        if _module is not None:
            _module.switch(before)
