"""How many blocks and clusters of each CUDA kernel the GPU holds at once, as its runtime says.

    python -m bench.gpu.occupancy

By the library's C function `reft_kernels_cuda_occupancy`, which returns JSON. Exit status 0 also where a
library has no such function, which is then said; 1 where there is no library.
"""

from __future__ import annotations

import ctypes
import json
import pathlib
import sys

FUNCTION = "reft_kernels_cuda_occupancy"


def occupancy(library: ctypes.CDLL) -> object:
    """What the library says, or None if it has no such function. Raises RuntimeError for what is not JSON."""
    function = getattr(library, FUNCTION, None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    text = function()
    try:
        return json.loads(text or b"")
    except ValueError:
        raise RuntimeError(f"{FUNCTION} returned {text!r}, which is not JSON") from None


def _library() -> pathlib.Path:
    from reft_kernels.ops import native

    return pathlib.Path(native.__file__).resolve().parents[1] / "lib" / "reft_kernels_cuda.so"


def main() -> int:
    import torch

    from reft_kernels.ops import native

    if native.cuda_missing is not None:
        print(native.cuda_missing)
        return 1
    torch.cuda.init()  # the library takes the device of the context that is current
    torch.zeros(1, device="cuda")
    path = _library()
    found = occupancy(ctypes.CDLL(str(path)))
    if found is None:
        print(f"{path.name} has no {FUNCTION}: occupancy unknown")
    elif isinstance(found, dict | list):
        entries = found.items() if isinstance(found, dict) else enumerate(found)
        for name, value in entries:  # a line each, for readers
            print(f"{name}: {json.dumps(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
