"""The CUDA kernels on a CPU, as functions with the signatures of the ops (see cuda_emulator.h)."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess

import torch

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = (
    *(
        f"csrc/cuda/{name}.cu"
        for name in ("forward", "forward_norm", "forward_ways", "sum", "backward", "scale_shift")
    ),
    "tests/support/cuda_emulator.cpp",
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KEPT = 64
MANY = 1000


class Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("down", "up", "bias", "kind")),
        *((name, ctypes.c_void_p) for name in ("rows", "tiles", "spans", "offsets")),
        *((name, ctypes.c_int64) for name in ("pool_dtype", "pool_rows", "tile_count", "segments")),
        ("positions", ctypes.c_int64),
    ]


class NextNorm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "shift", "out")),
        ("eps", ctypes.c_float),
        ("kind", ctypes.c_int32),
    ]


def compiler() -> str | None:
    return shutil.which("g++")


def build(folder: pathlib.Path) -> Emulated:
    """Compiles the kernels for the CPU. Needs g++ (for _Float16 and fibers)."""
    library = folder / "cuda_emulated.so"
    command = [compiler(), "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off"]
    command += ["-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]  # which forbids longjmp between stacks
    command += ["-Icsrc/cuda", "-Itests/support", "-o", str(library), *SOURCES]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_error.restype = ctypes.c_char_p
    return Emulated(loaded)


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Emulated:
    """The ops. `multiprocessors`: of a chip with clusters of blocks, which share a tile; 0: without clusters.

    On many multiprocessors a cluster has a block for each 512 columns, up to 8; on few it has fewer.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.multiprocessors = MANY
        self.cluster = self.shared = 0  # blocks of one and bytes of each, in the last call

    def shuffle_threads(self, seed: int) -> None:
        """One warp runs on, then another, their threads in any order; 0: all in turn, by their numbers."""
        self._library.emulated_order(ctypes.c_uint64(seed))

    def take_way(self, number: int) -> None:
        """How the forward kernels run from now on: 0, or another of `Way` (csrc/cuda/intervene.h)."""
        self._library.emulated_way(number)

    def invalid(self) -> bool:
        """Whether the last call added up a signalling NaN (what nobody wrote), or Inf − Inf."""
        return bool(self._library.emulated_invalid())

    @staticmethod
    def _tables(pool, rows, tiles, spans, offsets=None) -> Tables:
        pointers = (_pointer(t) for t in (*pool, rows, tiles, spans, offsets))
        return Tables(*pointers, DTYPES[pool[0].dtype], len(pool[0]), len(tiles), len(spans), len(rows))

    def _forward(self, h, tables: Tables, norm: NextNorm) -> None:
        flat = h.view(-1, h.shape[-1])
        sizes = [ctypes.c_int64(n) for n in (flat.stride(0), *flat.shape, DTYPES[h.dtype])]
        pointers = (ctypes.byref(tables), ctypes.byref(norm))
        self.cluster = self._library.emulated_forward(_pointer(h), *sizes, *pointers, self.multiprocessors)
        self.shared = self._library.emulated_shared()
        error = self._library.emulated_error()
        if error is not None:
            raise RuntimeError(error.decode())

    def intervene_(self, h, down, up, bias, kind, rows, tiles, spans) -> None:
        self._forward(h, self._tables((down, up, bias, kind), rows, tiles, spans), NextNorm())

    def intervene_sum_(self, h, addend, down, up, bias, kind, rows, tiles, spans) -> None:
        tables = self._tables((down, up, bias, kind), rows, tiles, spans)
        flat, other = h.view(-1, h.shape[-1]), addend.view(-1, h.shape[-1])
        strides = [ctypes.c_int64(t.stride(0)) for t in (flat, other)]
        sizes = [ctypes.c_int64(n) for n in (*flat.shape, DTYPES[h.dtype])]
        self._library.emulated_sum(_pointer(h), _pointer(addend), *strides, *sizes, ctypes.byref(tables))
        self.intervene_(h, down, up, bias, kind, rows, tiles, spans)

    def intervene_norm_(
        self, h, down, up, bias, kind, rows, tiles, spans, weight, shift, eps, norm
    ) -> torch.Tensor:
        # NaN: every element must be written.
        out = torch.full(h.shape, torch.nan, dtype=h.dtype)
        next_norm = NextNorm(_pointer(weight), _pointer(shift), _pointer(out), eps, norm)
        self._forward(h, self._tables((down, up, bias, kind), rows, tiles, spans), next_norm)
        return out

    def intervene(self, h, down, up, bias, kind, rows, tiles, spans, offsets):
        out = h.clone(memory_format=torch.contiguous_format)
        self.intervene_(out, down, up, bias, kind, rows, tiles, spans)
        return out

    def intervene_backward(
        self, grad, hs, down, up, bias, kind, rows, tiles, spans, offsets, need_h, need_pool
    ):
        d = grad.shape[-1]
        grad = grad.contiguous()
        dh = grad.clone() if need_h else None
        # NaN: every element must be written.
        pool = [torch.full_like(t, torch.nan) if need_pool else None for t in (down, up, bias)]
        kept = [torch.full((len(rows), KEPT), torch.nan) if need_pool else None for _ in range(2)]
        tables = self._tables((down, up, bias, kind), rows, tiles, spans, offsets)
        sizes = [ctypes.c_int64(n) for n in (grad.numel() // d, d, DTYPES[grad.dtype])]
        self.cluster = self._library.emulated_backward(
            _pointer(grad), ctypes.c_int64(d), _pointer(hs), _pointer(dh), *sizes, ctypes.byref(tables),
            *map(_pointer, (*kept, *pool)), self.multiprocessors,
        )  # fmt: skip
        results = zip((dh, *pool), (grad, down, up, bias))
        return tuple(like.new_empty(0) if it is None else it for it, like in results)

    @staticmethod
    def _scale_tables(pool, rows, tiles, spans, offsets=None) -> Tables:
        pointers = [_pointer(t) for t in (*pool, None, None, rows, tiles, spans, offsets)]
        return Tables(*pointers, 0, len(pool[0]), len(tiles), len(spans), len(rows))

    def scale_shift_(self, h, scale_less_one, shift, rows, tiles, spans) -> None:
        tables = self._scale_tables((scale_less_one, shift), rows, tiles, spans)
        flat = h.view(-1, h.shape[-1])
        sizes = [ctypes.c_int64(n) for n in (flat.stride(0), *flat.shape, DTYPES[h.dtype])]
        self._library.emulated_scale_shift(_pointer(h), *sizes, ctypes.byref(tables))

    def scale_shift(self, h, scale_less_one, shift, rows, tiles, spans, offsets):
        out = h.clone(memory_format=torch.contiguous_format)
        self.scale_shift_(out, scale_less_one, shift, rows, tiles, spans)
        return out

    def scale_shift_backward(
        self, grad, hs, scale_less_one, shift, rows, tiles, spans, offsets, need_h, need_pool
    ):
        d, pool = grad.shape[-1], (scale_less_one, shift)
        grad = grad.contiguous()
        dh = grad.clone() if need_h else None
        # NaN: every element must be written.
        sums = [torch.full_like(t, torch.nan) if need_pool else None for t in pool]
        tables = self._scale_tables(pool, rows, tiles, spans, offsets)
        sizes = [ctypes.c_int64(n) for n in (grad.numel() // d, d, DTYPES[grad.dtype])]
        self._library.emulated_scale_shift_backward(
            _pointer(grad), _pointer(hs), _pointer(dh), *sizes, ctypes.byref(tables), *map(_pointer, sums)
        )
        results = zip((dh, *sums), (grad, *pool))
        return tuple(like.new_empty(0) if it is None else it for it, like in results)
