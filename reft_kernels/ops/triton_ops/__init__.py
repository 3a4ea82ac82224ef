"""The triton backend: every GPU that Triton reaches, and the CPU through Triton's interpreter.

kernels_forward    intervene_, in place, and intervene_sum_
kernels_norm       intervene_norm_
kernels_scale_shift  scale_shift_, its dh and the gradients of its pool
kernels_source     intervene_source_ and its gradients
kernels_keep_norm  row_norms, restore_norms_ and its gradients
kernels_backward   dh and the gradients of the pool
activations        φ and φ′
blocks             loads and products that both directions share
options            block sizes and compiler options
checks             what arguments must be, beside `ops.checks`
launcher           one kernel's launches: by Triton, then directly
launch             the ops
scale_shift        the elementwise ops
source             the ops with a source for each row
keep_norm          the ops that keep norms

This package imports without Triton; `why_not` then says what is missing. The interpreter
(TRITON_INTERPRET=1, set before Python starts) runs the same kernels in numpy on CPU tensors: slow, for
tests.
"""

from __future__ import annotations

from typing import Any

from .. import keep_norm as norms
from .. import scale_shift as elementwise
from .. import source as sourced
from ..schema import implement

try:
    from . import keep_norm, launch, scale_shift, source
    from .blocks import INTERPRETING

    _missing = None
except ImportError as error:
    if error.name is None or not error.name.startswith("triton"):
        raise
    _missing = f"Triton can't be imported ({error}); install it with `pip install triton`"


def why_not(device_type: str) -> str | None:
    """Why this backend can't run on a device type, or None if it can."""
    if _missing is not None:
        return _missing
    if device_type == "cuda" or (device_type == "cpu" and INTERPRETING):
        return None
    if device_type == "cpu":
        return (
            "Triton compiles for GPUs only (TRITON_INTERPRET=1, set before Python starts, interprets its "
            "kernels in numpy: for tests)"
        )
    return f"the triton backend registers no kernels for {device_type} devices"


if _missing is None:
    for _key in ("CUDA", "CPU") if INTERPRETING else ("CUDA",):
        implement(
            "triton",
            _key,
            {
                "intervene_": launch.intervene_,
                "intervene_sum_": launch.intervene_sum_,
                "intervene_norm_": launch.intervene_norm_,
                "intervene": launch.intervene,
                "intervene_backward": launch.intervene_backward,
            },
        )
        elementwise.implement(
            "triton",
            _key,
            {
                "scale_shift_": scale_shift.scale_shift_,
                "scale_shift": scale_shift.scale_shift,
                "scale_shift_backward": scale_shift.scale_shift_backward,
            },
        )

    _KEEP_NORM: dict[str, Any] = {
        "row_norms": keep_norm.row_norms,
        "restore_norms_": keep_norm.restore_norms_,
        "restore_norms": keep_norm.restore_norms,
        "restore_norms_backward": keep_norm.restore_norms_backward,
    }
    _SOURCE: dict[str, Any] = {
        "intervene_source_": source.intervene_source_,
        "intervene_source": source.intervene_source,
        "intervene_source_backward": source.intervene_source_backward,
    }
    for _key in ("CUDA", "CPU") if INTERPRETING else ("CUDA",):
        norms.implement("triton", _key, _KEEP_NORM)
        sourced.implement("triton", _key, _SOURCE)
    # There are none in CUDA C++, so `native` takes these on a GPU.
    norms.implement("native", "CUDA", _KEEP_NORM)
    sourced.implement("native", "CUDA", _SOURCE)
