"""The adapters of a setup: any method at any site, of random values that edit something."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

import reft_kernels as rk
from reft_kernels.adapter.methods import METHODS
from reft_kernels.sites import has_layers

from . import models

METHOD, SITE = "loreft", "block_output"

#: What can be asked for. The other one is what compositions leave, and costs what its parts do.
KNOWN = tuple(name for name in METHODS if name != "folded")


def config_of(
    method: str, site: str, heads: int | None, rank: int, layers: Sequence[int], positions: str
) -> rk.ReftConfig:
    """heads: how many of each layer's, from the first on, where the site is of one head; else None.

    Raises ValueError that names what does not fit together.
    """
    if method not in KNOWN:
        raise ValueError(f"method: must be one of {', '.join(KNOWN)}; was {method!r}")
    return rk.ReftConfig(
        method=method,
        r=rank,
        layers=list(layers) if has_layers(site) else "all",
        site=site,
        heads=None if heads is None else list(range(heads)),
        positions=positions,
        share_weights=True,
    )


def width_at(model: nn.Module, site: str, heads: int | None) -> int:
    """How long the edited vectors are. Raises ValueError for a site that the model lacks."""
    if site == SITE:
        return models.width(model)
    reft = rk.patch(models.twin(model))
    probe = config_of("lobireft", site, heads, 1, [0], "all")
    return reft.add_adapter("probe", probe).interventions[0].width


def make(config: rk.ReftConfig, depth: int, width: int, generator: torch.Generator) -> rk.Adapter:
    """An adapter that is not trainable. What a fresh one has as 0, so that it edits nothing, is drawn."""
    spec = METHODS[config.method]
    if spec.trainable:
        adapter = rk.Adapter.from_config(config, depth, width, generator=generator)
        adapter.trainable = False
    else:
        options = spec.resolve(None)
        adapter = rk.Adapter.from_tensors(
            config.method,
            {
                (layer if head is None else (layer, head)): spec.fresh(
                    config.r, width, torch.float32, options, generator
                )
                for layer in config.resolve_layers(depth)
                for head in config.heads or (None,)
            },
            site=config.site,
            positions=config.positions,
            n_layers=depth,
        )
    bound = 1 / math.sqrt(width)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if not parameter.any():
                parameter.uniform_(-bound, bound, generator=generator)
    return adapter
