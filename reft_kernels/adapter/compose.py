"""Compositions and subspaces: both are a choice of rows of the one form."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint import BaseModel
from ..ops.reference import activate
from ..ops.schema import ACT_MASK, NO_PRODUCT, Act
from ..positions import Positions
from ..scale_pool import AnyFold, ScaleFold
from .intervention import Intervention

if TYPE_CHECKING:
    from .adapter import Adapter

#: What holds the fold of each form as it is.
_METHOD_OF = {"low_rank": "folded", "elementwise": "folded_scale"}


@torch.no_grad()
def summed(interventions: Iterable[tuple[Intervention, float]], in_turn: bool = False) -> list[Intervention]:
    """One intervention for each place and positions, whose fold is the concatenation of those there.

    Each comes with what its edit is multiplied by. in_turn: each edits what those before it have left.

    Raises ValueError for widths that differ at a place, and in turn for what has no fold.
    """
    gathered: dict[tuple[str, int, int | None, Positions], list[tuple[Intervention, float]]] = {}
    for one, weight in interventions:
        gathered.setdefault((one.site, one.layer, one.head, one.positions), []).append((one, weight))
    sums = []
    for (site, layer, *_), parts in gathered.items():
        widths = {one.width for one, _ in parts}
        if len(widths) > 1:
            raise ValueError(f"adapters: widths {sorted(widths)} meet at {site} of layer {layer}")
        check_forms([(one.method, one) for one, _ in parts], "adapters")
        if in_turn:
            _check_in_turn(parts[0][0], [one for one, _ in parts], gathered)
            whole = functools.reduce(_behind, [one.fold().times(weight) for one, weight in parts])
            sums.append(folded(parts[0][0], [whole], parts[0][0].keeps_norm))
            continue
        keep_norm = any(one.keeps_norm and weight != 0 for one, weight in parts)
        sums.append(folded(parts[0][0], [one.fold().times(weight) for one, weight in parts], keep_norm))
    return sums


def _check_in_turn(
    like: Intervention, parts: list[Intervention], places: Iterable[tuple[str, int, int | None, Positions]]
) -> None:
    """Raises ValueError where edits one behind the other are not one edit."""
    where = f"{like.site} of layer {like.layer}"
    for site, layer, head, positions in places:
        alike = (site, layer, head) == (like.site, like.layer, like.head)
        if alike and positions != like.positions and positions.overlaps(like.positions):
            raise ValueError(
                f"adapters: at {where} some tokens are edited by one and some by several, under "
                f"{str(like.positions)!r} and {str(positions)!r}; name them in the call (Sequence)"
            )
    if len(parts) > 1 and any(one.keeps_norm for one in parts):
        raise ValueError(f"adapters: one at {where} keeps the norm, which no fold does in between")


def _behind(first: AnyFold, second: AnyFold) -> AnyFold:
    """The edit of h that `second` makes of what `first` has left: for z = D₁ h + c₁, D₂ (h + U₁ᵀ z) + c₂ is
    (D₂ + D₂ U₁ᵀ D₁) h + c₂ + D₂ U₁ᵀ c₁. Raises ValueError where an activation of the first acts on h."""
    if isinstance(first, ScaleFold) or isinstance(second, ScaleFold):
        (s, v), (t, w) = tuple(first), tuple(second)  # s − 1 and v of each
        return ScaleFold(s + t + s * t, (1 + t) * v + w)
    bare = (first.kind & NO_PRODUCT) != 0
    if bool((~bare & ((first.kind & ACT_MASK) != Act.NONE)).any()):
        raise ValueError(
            "adapters: only the last may have an activation, as no fold holds one of another's result; name "
            "them in the call (Sequence)"
        )
    down = second.down.masked_fill(((second.kind & NO_PRODUCT) != 0)[:, None], 0)
    through = down @ first.up.mT  # [r₂, r₁]
    constant = torch.where(bare, activate(first.bias, first.kind), first.bias)
    own = second._replace(
        down=second.down + through @ first.down.masked_fill(bare[:, None], 0),
        bias=second.bias + through @ constant,
    )
    return type(first)(*(torch.cat(pair) for pair in zip(first, own)))


def folded(like: Intervention, folds: Sequence[AnyFold], keep_norm: bool = False) -> Intervention:
    """The sum of folds of one form, where another intervention stands.

    keep_norm: whether edited tokens get the norm back that they had.
    """
    parts: Any = type(folds[0]).meeting(folds)  # type: ignore[arg-type]
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in folds[0]._fields}
    return Intervention(
        _METHOD_OF[folds[0].form],
        like.layer,
        like.site,
        like.positions,
        tensors,
        head=like.head,
        options={"keep_norm": keep_norm},
    )


def check_forms(named: Sequence[tuple[str, Intervention]], argument: str) -> None:
    """Raises ValueError, which names the argument, where interventions at one site are of several forms.

    named: each with what it shall be called.
    """
    (first, one), *others = named
    for name, other in others:
        if other.form != one.form:
            raise ValueError(
                f"{argument}: {first} and {name} meet at {one.site} of layer {one.layer}, and one of them "
                "edits element by element: with an edit of low rank that has no sum"
            )


@torch.no_grad()
def with_rows(interventions: Sequence[Intervention], rows: Sequence[int]) -> list[Intervention]:
    """Copies of the interventions with the given of their r rows, in that order.

    Raises ValueError for rows that are empty, named twice, or that an intervention lacks.
    """
    chosen = list(rows)
    rank = min(one.rank for one in interventions)
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) for i in chosen):
        raise ValueError(f"rows: must be row numbers, at least one; was {chosen!r}")
    if len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= rank:
        raise ValueError(f"rows: must be distinct and from 0 to {rank - 1}, was {chosen}")
    for one in interventions:
        shared = [name for name in one.names if "r" not in one.spec.shapes[name]]
        if shared:
            raise ValueError(
                f"rows: {one.method} has {', '.join(shared)}, which belongs to no row, so a subspace of it "
                "would be no part of it"
            )
    return [
        Intervention(
            one.method,
            one.layer,
            one.site,
            one.positions,
            {name: _part(one, name, tensor, chosen) for name, tensor in one.materialized().items()},
            act_fn=one.act_fn,
            dropout=one.dropout,
            head=one.head,
            options=one.options,
            scale=one.scale,
        )
        for one in interventions
    ]


def _part(one: Intervention, name: str, tensor: Tensor, rows: list[int]) -> Tensor:
    """A copy of a parameter with the given rows of each of its axes of r."""
    for axis, kind in enumerate(one.spec.shapes[name]):
        if kind == "r":
            tensor = tensor.index_select(axis, torch.tensor(rows, device=tensor.device))
    return tensor.clone()


def common_base(adapters: Sequence[Adapter]) -> BaseModel | None:
    """The model that the adapters were made for, as far as known; None, with a warning, if several."""
    known = [adapter.base for adapter in adapters if adapter.base is not None]
    for base in known[1:]:
        if not base.matches(known[0]):
            warnings.warn(f"adapters: were made for {known[0]} and for {base}", stacklevel=3)
            return None
    return known[0] if known else None


def check_weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    """One finite number for each adapter. Raises ValueError that names `weights`."""
    if weights is None:
        return [1.0] * len(adapters)
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != len(adapters):
        raise ValueError(f"weights: must be a list of {len(adapters)} numbers, was {weights!r}")
    for adapter, weight in zip(adapters, weights):
        adapter.check_scale(weight, "weights")
    return [float(weight) for weight in weights]


def check_together(interventions: list[Intervention], n_layers: int | None) -> bool:
    """Raises ValueError where interventions can't make up one adapter; returns whether any two of them at one
    place may share a token."""
    if not interventions:
        raise ValueError("interventions: an adapter needs at least one")
    overlapping = False
    places: dict[tuple[str, int, int | None], list[Intervention]] = {}
    for one in interventions:
        if one.width != interventions[0].width:
            raise ValueError(
                f"interventions: one adapter has one width; layer {one.layer} has {one.width}, "
                f"layer {interventions[0].layer} has {interventions[0].width}"
            )
        if n_layers is not None and one.layer >= n_layers:
            raise ValueError(f"layer: the model has no layer {one.layer}; it has {n_layers}")
        others = places.setdefault((one.site, one.layer, one.head), [])
        for other in others:
            if one.positions.overlaps(other.positions):
                check_forms([(other.method, other), (one.method, one)], "interventions")
            if one.positions == other.positions:
                raise ValueError(
                    f"positions: two interventions at {one.site} of layer {one.layer} have the positions "
                    f"{str(one.positions)!r}; Adapter.compose makes one of them"
                )
            overlapping = overlapping or one.positions.overlaps(other.positions)
        others.append(one)
    return overlapping
