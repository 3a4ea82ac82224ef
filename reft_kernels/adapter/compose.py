"""Compositions and subspaces: both are a choice of rows of the one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..positions import Positions
from .adapter import Adapter
from .intervention import Intervention
from .saved_modules import SavedModules


@torch.no_grad()
def compose(adapters: Sequence[Adapter]) -> Adapter:
    """See `Adapter.compose`."""
    if not adapters:
        raise ValueError("adapters: at least one is needed")
    if any(adapter.saved_modules for adapter in adapters):
        raise ValueError("adapters: those with modules_to_save can't be composed, as modules have no sum")
    depths = {adapter.n_layers for adapter in adapters if adapter.n_layers is not None}
    if len(depths) > 1:
        raise ValueError(f"adapters: made for models of different depth, {sorted(depths)} layers")
    gathered: dict[tuple[str, int, int | None, Positions], list[Intervention]] = {}
    for adapter in adapters:
        for one in adapter.interventions:
            gathered.setdefault((one.site, one.layer, one.head, one.positions), []).append(one)
    summed = []
    for (site, layer, head, positions), parts in gathered.items():
        widths = {one.width for one in parts}
        if len(widths) > 1:
            raise ValueError(f"adapters: widths {sorted(widths)} meet at {site} of layer {layer}")
        folds = [one.fold() for one in parts]
        tensors = {name: torch.cat([getattr(fold, name) for fold in folds]) for name in folds[0]._fields}
        summed.append(Intervention("folded", layer, site, positions, tensors, head=head))
    return Adapter(summed, n_layers=depths.pop() if depths else None)


@torch.no_grad()
def select_subspace(adapter: Adapter, rows: Sequence[int]) -> Adapter:
    """See `Adapter.select_subspace`."""
    chosen = list(rows)
    rank = min(one.rank for one in adapter.interventions)
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) for i in chosen):
        raise ValueError(f"rows: must be row numbers, at least one; was {chosen!r}")
    if len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= rank:
        raise ValueError(f"rows: must be distinct and from 0 to {rank - 1}, was {chosen}")
    kept = [
        Intervention(
            one.method,
            one.layer,
            one.site,
            one.positions,
            {name: tensor[chosen].clone() for name, tensor in one.materialized().items()},
            act_fn=one.act_fn,
            dropout=one.dropout,
            head=one.head,
        )
        for one in adapter.interventions
    ]
    config = adapter.config and dataclasses.replace(adapter.config, r=len(chosen))
    stored = {
        path: {name: tensor.clone() for name, tensor in tensors.items()}
        for path, tensors in adapter.saved_modules.tensors().items()
    }
    saved = SavedModules(adapter.saved_modules.names, stored)
    return Adapter(kept, config=config, n_layers=adapter.n_layers, saved_modules=saved)
