"""Interventions of tensors that were computed: steering vectors, directions, features, others' weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..positions import Positions
from ..sites import canonical
from .intervention import Intervention
from .methods import METHODS, Method

#: Where tensors belong: a layer, or a layer and one of its attention heads.
Where = int | tuple[int, int]


def complete(method: Method, given: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters of an intervention: [d] is one row, and what an option stands for is filled in."""
    tensors = {
        name: tensor[None] if method.shapes.get(name) == "rd" and tensor.dim() == 1 else tensor
        for name, tensor in given.items()
    }
    name = next(iter(method.shapes))
    first = tensors.get(name)
    if first is None:
        return tensors  # the intervention says what is missing
    if first.dim() != 2:
        raise ValueError(f"{name}: must be [r, d], or [d] for one row, was {list(first.shape)}")
    for name in method.shapes:
        if name in tensors or name not in method.fixed or name not in options:
            continue
        if name in method.optional and not method.has(name, options):
            continue
        dtype = torch.promote_types(first.dtype, torch.float32)
        tensors[name] = torch.full(method.shape(name, *first.shape), options[name], dtype=dtype)
        tensors[name] = tensors[name].to(first.device)
    return tensors


def from_tensors(
    method: str,
    tensors: Mapping[Where, Tensor | Mapping[str, Tensor]],
    site: str,
    positions: str | Sequence[int] | Positions,
    act_fn: str | None,
    options: Mapping[str, Any] | None,
    per_position: bool,
    n_layers: int | None,
) -> list[Intervention]:
    """See `Adapter.from_tensors`."""
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(METHODS)}; was {method!r}")
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError("tensors: must be tensors by layer, or by (layer, head), at least one")
    spec = METHODS[method]
    resolved = spec.resolve(options)
    parsed, site = Positions.parse(positions), canonical(site)
    made: list[Intervention] = []
    for where, given in tensors.items():
        layer, head = where if isinstance(where, tuple) else (where, None)
        if n_layers is not None and isinstance(layer, int) and -n_layers <= layer < 0:
            layer += n_layers
        if isinstance(given, Tensor):
            given = {next(iter(spec.shapes)): given}
        full = complete(spec, given, resolved)
        parts = _by_position(spec, full, parsed) if per_position else [(parsed, full)]
        made += [
            Intervention(method, layer, site, part, mine, act_fn=act_fn, head=head, options=options)
            for part, mine in parts
        ]
    return made


def _by_position(
    spec: Method, tensors: dict[str, Tensor], positions: Positions
) -> list[tuple[Positions, dict[str, Tensor]]]:
    """Row i of every parameter for the i-th position."""
    shared = [name for name in tensors if not spec.shapes[name].startswith("r")]
    if shared:
        raise ValueError(f"per_position: {', '.join(shared)} of {spec.name} has no rows, one for a position")
    listed = positions.indices
    rows = len(tensors[next(iter(spec.shapes))])
    if listed is None or len(listed) != rows:
        raise ValueError(
            f"positions: per_position needs a list of {rows} indices, one for each row; was {positions}"
        )
    return [
        (
            Positions.parse([index], positions.last_position),
            {name: tensor[row : row + 1] for name, tensor in tensors.items()},
        )
        for row, index in enumerate(listed)
    ]
