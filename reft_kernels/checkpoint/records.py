"""Plain records of an adapter: what the readers of all formats give, and what is written.

A record holds what a file says. Whether that makes an adapter is for `Adapter.from_record` to find out; the
records carry where they were read, so that its errors can name the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..positions import Positions


@dataclass(frozen=True, eq=False)
class InterventionRecord:
    """One intervention; the fields are those of `reft_kernels.adapter.Intervention`.

    Attributes:
        rank: r, which the tensors must have.
        tensors: the method's parameters by name, [r, d] and [r].
        where: the file (and the entry in it) that it was read from.
    """

    method: str
    layer: int
    site: str
    positions: Positions
    rank: int
    tensors: Mapping[str, Tensor]
    head: int | None = None
    act_fn: str | None = None
    dropout: float = 0.0
    where: str = ""


@dataclass(frozen=True, eq=False)
class AdapterRecord:
    """One adapter.

    Attributes:
        interventions: in the adapter's order.
        width: d, which the tensors must have.
        n_layers: depth of the model that it was made for, if known.
        config: the fields of the `ReftConfig` that it was made from, if known.
        modules: tensors of modules_to_save, by the module's path in its model and by name.
        raw: whether the parameters are those of a training that goes on: the fold makes orthonormal rows of
            some of them.
        where: the file or folder that it was read from.
    """

    interventions: tuple[InterventionRecord, ...]
    width: int
    n_layers: int | None = None
    config: Mapping[str, Any] | None = None
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    raw: bool = False
    where: str = ""
