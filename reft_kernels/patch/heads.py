"""A model's module of which adapters have copies of their own (`modules_to_save`), at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..adapter.heads import by_rows
from .prompts import Selection
from .state import State


class Share(NamedTuple):
    """Who runs a module for which rows of the batch. head: None for the model's own."""

    head: nn.Module | None
    rows: Tensor


def share_heads(selection: Selection, owners: Mapping[str, Adapter], repeat: int) -> dict[str, list[Share]]:
    """Path of a module → its shares, for the modules of which an adapter of the batch has a copy."""
    copies = {name: adapter.heads.modules_by_path for name, adapter in owners.items()}
    paths = dict.fromkeys(path for modules in copies.values() for path in modules)
    shares: dict[str, list[Share]] = {}
    for path in paths:
        rows_of: dict[str | None, list[int]] = {}
        for row, name in enumerate(selection.names):
            owner = name if name is not None and path in copies[name] else None
            rows_of.setdefault(owner, []).extend(range(row * repeat, (row + 1) * repeat))
        shares[path] = [
            Share(None if owner is None else copies[owner][path], torch.from_numpy(np.array(rows)))
            for owner, rows in rows_of.items()
        ]
    return shares


class HeadForward:
    """Stands for the `forward` of the model's module: each row goes through its adapter's copy.

    original: the module's forward; own: what the instance had in its place, or None.
    """

    def __init__(self, state: State, path: str, original: Any, own: Any) -> None:
        self.state, self.path, self.original, self.own = state, path, original, own

    @property
    def __wrapped__(self) -> Any:  # inspect.signature looks here
        return self.original

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.state.plan
        shares = None if plan is None else plan.heads.get(self.path)
        if not shares:
            return self.original(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise RuntimeError(f"modules_to_save: {self.path!r} was called with more than one tensor")
        x = args[0]
        batch = sum(len(share.rows) for share in shares)
        if x.shape[0] != batch:
            raise RuntimeError(
                f"modules_to_save: {self.path!r} got {x.shape[0]} rows, but the batch has {batch}"
            )
        return by_rows(
            [self.original if share.head is None else share.head for share in shares],
            [share.rows.to(x.device) for share in shares],
            x,
        )
