"""Plain records of an adapter: what the readers of all formats give, and what is written.

A record holds what a file says. Whether that makes an adapter is for `Adapter.from_record` to find out; the
records carry where they were read, so that its errors can name the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..positions import Positions


@dataclass(frozen=True, eq=False)
class InterventionRecord:
    """One intervention; the fields are those of `reft_kernels.adapter.Intervention`.

    Attributes:
        rank: r, which the tensors must have.
        tensors: the method's parameters by name; the first is [r, d].
        options: settings of the method by name, values that JSON knows.
        scale: what the edit is multiplied by.
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
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    where: str = ""


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter was made for.

    Attributes:
        model_type: as transformers' configs call the family ("llama").
        fingerprint: "<scheme>-<hash>" of what shapes the model in its config.
        name: a hub id or path, if known.
        revision: the hub's commit, if known.
    """

    model_type: str
    fingerprint: str
    name: str | None = None
    revision: str | None = None

    def matches(self, other: BaseModel) -> bool:
        """Whether type and shape are the same, as far as they can be compared; names may differ."""
        schemes = {one.fingerprint.partition("-")[0] for one in (self, other)}
        same_shape = len(schemes) == 2 or self.fingerprint == other.fingerprint
        return self.model_type == other.model_type and same_shape

    def __str__(self) -> str:
        at = "" if self.revision is None else f" at {self.revision}"
        name = "a model without a name" if self.name is None else repr(self.name)
        return f"{name}{at} (type {self.model_type!r}, fingerprint {self.fingerprint})"


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
        base: the model that it was made for, if known.
        subspaces: rows by name.
        where: the file or folder that it was read from.
    """

    interventions: tuple[InterventionRecord, ...]
    width: int
    n_layers: int | None = None
    config: Mapping[str, Any] | None = None
    modules: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    raw: bool = False
    base: BaseModel | None = None
    subspaces: Mapping[str, Sequence[int]] = field(default_factory=dict)
    where: str = ""
