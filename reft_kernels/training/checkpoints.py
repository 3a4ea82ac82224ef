"""What a Trainer's checkpoint holds of a patched model: its trainable adapters, with their raw parameters."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import torch
from torch import nn

from ..adapter import Adapter
from ..checkpoint import CheckpointError, native
from ..huggingface import Reft
from ..huggingface.base_model import base_model, warn_of_another


def reft_of(model: nn.Module) -> Reft:
    """The `Reft` of a patched model, which PEFT or DDP may have wrapped. Raises ValueError."""
    for module in model.modules():
        if isinstance(module, Reft):
            return module
    raise ValueError("model: is not patched; call reft_kernels.patch(model) and add an adapter first")


def trainable_adapters(reft: Reft) -> dict[str, Adapter]:
    return {name: adapter for name, adapter in reft.adapters.items() if adapter.trainable}


def folders_of(names: list[str], path: str | os.PathLike[str]) -> dict[str, Path]:
    """Name of an adapter → its folder: `path` itself for one, a folder of its name below it for several."""
    if len(names) == 1:
        return {names[0]: Path(path)}
    return {name: Path(path) / quote(name, safe=" ").replace(".", "%2E") for name in names}


def save(reft: Reft, path: str | os.PathLike[str]) -> None:
    """Writes every trainable adapter, raw, so that training goes on from it to the bit."""
    adapters = trainable_adapters(reft)
    for name, folder in folders_of(list(adapters), path).items():
        native.write(adapters[name].to_record(raw=True), folder)


def holds_adapters(path: str | os.PathLike[str]) -> bool:
    folder = Path(path)
    return any(file.exists() for file in [folder / native.CONFIG, *folder.glob(f"*/{native.CONFIG}")])


@torch.no_grad()
def restore(reft: Reft, path: str | os.PathLike[str]) -> None:
    """Copies the parameters in a checkpoint into the trainable adapters, in place.

    Raises CheckpointError before anything is changed: an adapter that is missing there, or another one.
    Warns of one that was trained on a model of another type or shape.
    """
    adapters = trainable_adapters(reft)
    found: list[tuple[Adapter, Adapter]] = []
    for name, folder in folders_of(list(adapters), path).items():
        if not (folder / native.CONFIG).exists():
            raise CheckpointError(
                f"{folder}: holds no adapter; the model trains {', '.join(map(repr, adapters))}"
            )
        stored = Adapter.from_record(native.read(folder), keep_raw=True)
        _check_same(str(folder), name, adapters[name], stored)
        found.append((adapters[name], stored))
    base = base_model(reft.model)
    for adapter, stored in found:
        warn_of_another(os.fspath(path), stored.base, base, stacklevel=3)
        for mine, theirs in zip(adapter.interventions, stored.interventions):
            for parameter in mine.names:
                getattr(mine, parameter).copy_(getattr(theirs, parameter))
        tensors = stored.saved_modules.tensors()
        for path_of, module in adapter.saved_modules.modules_by_path.items():
            module.load_state_dict(tensors[path_of])


def _check_same(where: str, name: str, adapter: Adapter, stored: Adapter) -> None:
    if not stored.trainable:
        raise CheckpointError(f"{where}: is an adapter, but no training checkpoint; use reft.load_adapter")
    mine, theirs = adapter.interventions, stored.interventions
    if len(mine) != len(theirs):
        raise CheckpointError(
            f"{where}: has {len(theirs)} interventions; adapter {name!r} has {len(mine)}. It was saved with "
            "another config"
        )
    for index, (a, b) in enumerate(zip(mine, theirs)):
        for field in (
            "method",
            "layer",
            "site",
            "head",
            "positions",
            "act_fn",
            "options",
            "scale",
            "rank",
            "width",
        ):
            if getattr(a, field) != getattr(b, field):
                raise CheckpointError(
                    f"{where}: intervention {index} has {field} {getattr(b, field)!s}; that of adapter "
                    f"{name!r} has {getattr(a, field)!s}. It was saved with another config"
                )
    if set(adapter.saved_modules.tensors()) != set(stored.saved_modules.tensors()):
        raise CheckpointError(f"{where}: has other modules_to_save than adapter {name!r}")
    for path, tensors in adapter.saved_modules.tensors().items():
        there = stored.saved_modules.tensors()[path]
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in there.items()}:
            raise CheckpointError(f"{where}: modules_to_save: {path!r} has other shapes than the model's")
