"""The ops: schemas, backends, dispatch, autograd. Knows tensors only; adapters and models live above."""

from . import autograd, reference, reference_keep_norm, reference_scale_shift, reference_source  # noqa: F401  (they register themselves)
from .autograd import InterveneInPlace
from .dispatch import BackendUnavailable, backend, chosen_backend, current_backend, why_not
from .keep_norm import (
    RESTORE_NORMS,
    RESTORE_NORMS_,
    RESTORE_NORMS_BACKWARD,
    ROW_NORMS,
    RestoreNormsInPlace,
)
from .scale_shift import SCALE_SHIFT, SCALE_SHIFT_, SCALE_SHIFT_BACKWARD, ScaleRows, ScaleShiftInPlace
from .schema import (
    ACT_MASK,
    BACKENDS,
    INTERVENE,
    INTERVENE_,
    INTERVENE_BACKWARD,
    INTERVENE_NORM_,
    INTERVENE_SUM_,
    NO_PRODUCT,
    TILE,
    Act,
    Norm,
)
from .source import INTERVENE_SOURCE, INTERVENE_SOURCE_, INTERVENE_SOURCE_BACKWARD

__all__ = [
    "ACT_MASK",
    "BACKENDS",
    "INTERVENE",
    "INTERVENE_",
    "INTERVENE_BACKWARD",
    "INTERVENE_NORM_",
    "INTERVENE_SOURCE",
    "INTERVENE_SOURCE_",
    "INTERVENE_SOURCE_BACKWARD",
    "INTERVENE_SUM_",
    "NO_PRODUCT",
    "RESTORE_NORMS",
    "RESTORE_NORMS_",
    "RESTORE_NORMS_BACKWARD",
    "ROW_NORMS",
    "SCALE_SHIFT",
    "SCALE_SHIFT_",
    "SCALE_SHIFT_BACKWARD",
    "TILE",
    "Act",
    "BackendUnavailable",
    "InterveneInPlace",
    "Norm",
    "RestoreNormsInPlace",
    "ScaleRows",
    "ScaleShiftInPlace",
    "backend",
    "chosen_backend",
    "current_backend",
    "why_not",
]
