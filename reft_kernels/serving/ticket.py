"""`Ticket`: what travels with a request from the process that takes it in to those that run it.

It says what is edited by content, not by name: a name may mean another adapter tomorrow. All of it is plain
data, so that every engine's own messages can carry it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapter import Adapter
from ..adapter.compose import folded
from ..positions import Positions
from .config import SUBSPACE, Source


@dataclasses.dataclass(frozen=True)
class Part:
    """One adapter of a request. content: the hash of its folds, by which a changed folder is found out."""

    source: Source
    content: str


@dataclasses.dataclass(frozen=True)
class Ticket:
    """The adapter of a request: the sum of its parts, times a scale.

    Attributes:
        parts, scale: what is edited.
        groups: the position specs, as `Adapter.groups` of the sum.
    """

    parts: tuple[Part, ...]
    scale: float
    groups: tuple[Positions, ...]

    @functools.cached_property
    def key(self) -> str:
        """Equal for equal edits, whatever they are called and wherever they lie."""
        text = "+".join(part.content for part in self.parts)
        return f"{text}*{self.scale!r}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "parts": [
                {"path": p.source.path, "options": dict(p.source.options), "content": p.content}
                for p in self.parts
            ],
            "scale": self.scale,
            "groups": [[one.to_json(), one.last_position] for one in self.groups],
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Ticket:
        return cls(
            tuple(Part(Source(p["path"], p["options"]), p["content"]) for p in given["parts"]),
            given["scale"],
            tuple(Positions.parse(spec, last) for spec, last in given["groups"]),
        )

    def load(self) -> Adapter:
        """Reads the adapter. Raises ValueError where a folder holds something else than it did."""
        adapters = []
        for part in self.parts:
            adapter = read(part.source)
            if content_of(adapter) != part.content:
                raise ValueError(
                    f"adapter: {part.source.path} changed after a request for it was taken in, or is another "
                    "folder on this machine"
                )
            adapters.append(adapter)
        return combined(adapters, self.scale)


def ticket_of(source: Source, adapter: Adapter) -> Ticket:
    """The ticket of an adapter that was read from there, alone and unscaled."""
    return Ticket((Part(source, content_of(adapter)),), 1.0, adapter.groups)


def read(source: Source) -> Adapter:
    """Raises ValueError that names the file and what is wrong with it."""
    options = dict(source.options)
    subspace = options.pop(SUBSPACE, None)
    adapter = Adapter.from_pretrained(source.path, **options)
    if subspace is None:
        return adapter
    try:
        return adapter.select_subspace(adapter.subspace(subspace).rows)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


@torch.no_grad()
def content_of(adapter: Adapter) -> str:
    """A hash of everything that an edit depends on: places, positions and folds."""
    digest = hashlib.sha256()
    for one, fold in zip(adapter.interventions, adapter.folds()):
        place = (one.site, one.layer, one.head, one.positions.to_json(), one.positions.last_position)
        digest.update(repr(place).encode())
        for tensor in fold:
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def combined(adapters: Sequence[Adapter], scale: float) -> Adapter:
    """The sum of adapters' edits, times a scale."""
    adapter = adapters[0] if len(adapters) == 1 else Adapter.compose(adapters)
    if scale == 1:
        return adapter
    parts = zip(adapter.interventions, adapter.folds())
    scaled = [folded(one, [fold.times(scale)], one.keeps_norm) for one, fold in parts]
    return Adapter(scaled, n_layers=adapter.n_layers, base=adapter.base)
