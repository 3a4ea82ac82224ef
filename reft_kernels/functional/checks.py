"""What the functions ask of their tensors before an op does, and what they say where an op complains."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import check_rows

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_dtype(h: Tensor) -> None:
    if h.dtype not in _DTYPES:
        raise ValueError(f"h: must be float64, float32, bfloat16 or float16, was {h.dtype}")


#: A complaint of the compiled library's about an argument, behind the function and line that made it.
_COMPLAINT = re.compile(
    r".*?[\w./]*\.(?:cpp|cu|cuh|h):\d+[,:] *"
    r"((?:h|down|up|bias|kind|rows|tiles|spans|offsets|grad|hs|weight|shift|eps|norms?|source|scale_less_one)"
    r": .*)",
    re.DOTALL,
)


def explained(error: Exception) -> Exception:
    """What a backend says of an argument, as the ValueError that is promised; other errors as they are.

    Asked only once something went wrong: a plan is not read back before every call.
    """
    if isinstance(error, IndexError):  # torch's own, in the reference backend
        return ValueError(f"plan: names a row that h lacks, or pool rows that the pool lacks: {error}")
    found = _COMPLAINT.fullmatch(str(error))
    return ValueError(found[1]) if found else error


def check_in_place(h: Tensor) -> None:
    """Refuses h whose rows don't lie in memory as an edit in place needs them."""
    if h.is_contiguous():
        return
    shape, strides = h.shape, h.stride()
    folded = shape[-1] == 1 or strides[-1] == 1
    rows, stride = 1, 0
    for size, step in reversed(list(zip(shape[:-1], strides[:-1]))):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        folded = folded and step == stride * rows
        rows *= size
    if not folded:
        raise ValueError(
            "h: its last dimension must be contiguous and the others collapse to rows with one stride "
            "(h.view(-1, d) must work), because it is edited in place; its shape was "
            f"{list(shape)}, its strides {list(strides)}. Use intervene, or h.contiguous()"
        )
    if rows > 1 and stride < shape[-1]:
        raise ValueError(
            f"h: its rows overlap in memory (row stride {stride}, width {shape[-1]}), so it can't be edited "
            "in place"
        )


def check_rows_of(h: Tensor, rows: Tensor | Sequence[int] | None) -> int:
    """Refuses h that is not [..., d], and rows on the host that it lacks. Returns how many rows h has."""
    if h.dim() < 1 or h.shape[-1] < 1:
        raise ValueError(f"h: must be [..., d] with d ≥ 1, shape was {list(h.shape)}")
    count = h.numel() // h.shape[-1]
    if rows is not None and not torch.compiler.is_compiling():
        check_rows(rows, count)
    return count
