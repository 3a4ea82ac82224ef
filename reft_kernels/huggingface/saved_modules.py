"""A model's module of which adapters have copies of their own (`modules_to_save`), at run time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..adapter.saved_modules import by_rows
from ..batch import Selection
from ..batch.stacks import terms_of
from .runtime import Runtime
from .standin import StandIn


class Share(NamedTuple):
    """Whose copy of a module runs for which rows of the batch. module: None for the model's own."""

    module: nn.Module | None
    rows: Tensor


def share_modules(selection: Selection, repeat: int) -> dict[str, list[Share]]:
    """Path of a module → its shares, for the modules of which an adapter of the batch has a copy."""
    copies = {
        name: adapter.saved_modules.modules_by_path
        for name, adapter in selection.owners.items()
        if adapter.has_copies
    }
    paths = dict.fromkeys(path for modules in copies.values() for path in modules)
    shares: dict[str, list[Share]] = {}
    for path in paths:
        rows_of: dict[str | None, list[int]] = {}
        for row, taken in enumerate(selection.names):
            named = [term.name for term in terms_of(taken) if path in copies.get(term.name, ())]
            owners = list({id(copies[name][path]): name for name in named}.values())  # subspaces share theirs
            if len(owners) > 1:
                raise ValueError(
                    f"adapter_names: row {row} has {taken!r}, and {', '.join(map(repr, owners))} each have a "
                    f"{path!r} of their own; modules have no sum"
                )
            owner = owners[0] if owners else None
            rows_of.setdefault(owner, []).extend(range(row * repeat, (row + 1) * repeat))
        shares[path] = [
            Share(None if owner is None else copies[owner][path], torch.from_numpy(np.array(rows)))
            for owner, rows in rows_of.items()
        ]
    return shares


class SavedModuleForward(StandIn):
    """Stands for the `forward` of the model's module at `path`: each row goes through its adapter's copy."""

    def __init__(self, module: nn.Module, path: str, runtime: Runtime) -> None:
        super().__init__(module)
        self.path, self.runtime = path, runtime

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.runtime.plan
        shares = None if plan is None else plan.saved_modules.get(self.path)
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
            [self.original if share.module is None else share.module for share in shares],
            [share.rows.to(x.device) for share in shares],
            x,
        )


class SavedModuleStandIns:
    """Puts stand-ins on the modules of which adapters have copies, and takes them off."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._stand_ins: dict[str, SavedModuleForward] = {}

    def add(self, paths: Iterable[str]) -> bool:
        """Attaches what is not there yet; returns whether there was any such."""
        new = [path for path in paths if path not in self._stand_ins]
        for path in new:
            module = self.runtime.model.get_submodule(path)
            self._stand_ins[path] = SavedModuleForward(module, path, self.runtime)
            self._stand_ins[path].attach()
        return bool(new)

    def keep(self, paths: set[str]) -> None:
        """Detaches all others."""
        for path in [path for path in self._stand_ins if path not in paths]:
            self._stand_ins.pop(path).detach()
