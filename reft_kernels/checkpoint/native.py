"""The native format: reft_config.json beside reft_model.safetensors.

The JSON says what each intervention is; the tensors carry the names `interventions.<index>.<parameter>`,
in the dtypes they have, so that a round trip keeps every bit. Version 2 adds, where an adapter has them, the
modules that it trained copies of (`modules_to_save.<path>.<tensor>`), and for training checkpoints the raw
parameters instead of the orthonormal rows that the fold makes of them ("raw": true). Version 3 adds what the
edits of an intervention are multiplied by ("scale"). What is written has the least version that says it. The
key base_model, which says what model the adapter is for, and the key subspaces, which names some of its rows,
may stand in every version: readers that don't know them pass them by.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ..positions import Positions
from .errors import CheckpointError, read_json, take, warn_if_not_finite
from .records import AdapterRecord, BaseModel, InterventionRecord

CONFIG, WEIGHTS = "reft_config.json", "reft_model.safetensors"

#: The newest; older ones are read.
FORMAT_VERSION = 3


def _key(index: int, name: str) -> str:
    return f"interventions.{index}.{name}"


def _module_key(path: str, name: str) -> str:
    return f"modules_to_save.{path}.{name}"


def _entry(one: InterventionRecord) -> dict[str, Any]:
    return {
        "method": one.method,
        "layer": one.layer,
        "site": one.site,
        "head": one.head,
        "positions": one.positions.to_json(),
        "last_position": one.positions.last_position,
        "act_fn": one.act_fn,
        "dropout": one.dropout,
        "rank": one.rank,
        "parameters": list(one.tensors),
        # Only methods have them that earlier versions don't know, and refuse.
        **({"options": dict(one.options)} if one.options else {}),
        **({} if one.scale == 1 else {"scale": one.scale}),
    }


def _version(record: AdapterRecord) -> int:
    """The least version that can say it, so that earlier readers don't pass by what they don't know."""
    if any(one.scale != 1 for one in record.interventions):
        return 3
    return 2 if record.modules or record.raw else 1


@torch.no_grad()
def write(record: AdapterRecord, path: str | os.PathLike[str]) -> None:
    """Writes an adapter into the folder `path` (made if missing). See `Adapter.save_pretrained`."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give a folder to save into")
    tensors = {
        _key(index, name): tensor
        for index, one in enumerate(record.interventions)
        for name, tensor in one.tensors.items()
    }
    for module, parts in record.modules.items():
        tensors |= {_module_key(module, name): tensor for name, tensor in parts.items()}
    # A copy of each: safetensors refuses tensors that share memory.
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    weights = safetensors.save(copies, metadata={"format": "pt"})
    added: dict[str, Any] = {}
    if record.modules:
        added["modules_to_save"] = {module: list(parts) for module, parts in record.modules.items()}
    if record.raw:
        added["raw"] = True
    if record.subspaces:
        added["subspaces"] = {name: list(rows) for name, rows in record.subspaces.items()}
    config = {
        "format_version": _version(record),
        "width": record.width,
        "n_layers": record.n_layers,
        "config": record.config,
        "interventions": [_entry(one) for one in record.interventions],
        **added,
        **({} if record.base is None else {"base_model": dataclasses.asdict(record.base)}),
        # Tells weights of another save apart, should a process die between the two renames.
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder, {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2) + "\n").encode()})


def _replace(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes all files aside, and renames them only once every one is on the disk.

    Should a rename fail, the files that were there come back.
    """
    mark = uuid.uuid4().hex
    aside = {folder / f".{name}.{mark}": folder / name for name in contents}
    before = {final: folder / f".{final.name}.{mark}.before" for final in aside.values() if final.exists()}
    try:
        for final, kept in before.items():
            shutil.copyfile(final, kept)
        for file, content in zip(aside, contents.values()):
            with open(file, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
        try:
            for file, final in aside.items():
                os.replace(file, final)
        except OSError:
            for final, kept in before.items():
                os.replace(kept, final)
            raise
    finally:
        for file in (*aside, *before.values()):
            file.unlink(missing_ok=True)


def read(folder: Path) -> AdapterRecord:
    """Reads what `write` wrote. Raises CheckpointError."""
    file, weights = folder / CONFIG, folder / WEIGHTS
    where, found = str(file), read_json(file)
    version = take(where, found, "format_version", int)
    if not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: has format version {version}, this reft_kernels reads 1 to {FORMAT_VERSION}; "
            "a newer reft_kernels may have written it"
        )
    entries = take(where, found, "interventions", list)
    tensors = _read_tensors(weights, found.get("weights_sha256"))
    read_ones = tuple(
        _intervention(f"{file}: interventions[{i}]", weights, i, e, tensors) for i, e in enumerate(entries)
    )
    modules = _stored_modules(where, weights, found, tensors)
    if tensors:
        raise CheckpointError(
            f"{weights}: has tensors that {CONFIG} does not name: {', '.join(sorted(tensors))}"
        )
    return AdapterRecord(
        interventions=read_ones,
        width=take(where, found, "width", int),
        n_layers=take(where, found, "n_layers", int, type(None)),
        config=take(where, {"config": None, **found}, "config", dict, type(None)),
        modules=modules,
        raw=found.get("raw") is True,
        base=_base(where, found),
        subspaces=take(where, {"subspaces": {}, **found}, "subspaces", dict),
        where=where,
    )


def _base(where: str, found: dict[str, Any]) -> BaseModel | None:
    entry = take(where, {"base_model": None, **found}, "base_model", dict, type(None))
    if entry is None:
        return None
    where = f"{where}: base_model"
    return BaseModel(
        model_type=take(where, entry, "model_type", str),
        fingerprint=take(where, entry, "fingerprint", str),
        name=take(where, entry, "name", str, type(None)),
        revision=take(where, entry, "revision", str, type(None)),
    )


def _stored_modules(
    where: str, weights: Path, found: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of modules_to_save by module; takes them out of `tensors`."""
    if "modules_to_save" not in found:
        return {}
    stored: dict[str, dict[str, Tensor]] = {}
    for module, names in take(where, found, "modules_to_save", dict).items():
        if not isinstance(names, list):
            raise CheckpointError(f"{where}: 'modules_to_save' must list the tensors of {module!r}")
        stored[module] = {}
        for name in names:
            key = _module_key(module, str(name))
            if key not in tensors:
                raise CheckpointError(f"{weights}: the tensor {key!r} is missing")
            stored[module][str(name)] = tensors.pop(key)
    return stored


def _read_tensors(weights: Path, digest: object) -> dict[str, Tensor]:
    try:
        content = weights.read_bytes()
        tensors = safetensors.load(content)
    except FileNotFoundError:
        raise CheckpointError(f"{weights}: there is no such file") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{weights}: can't be read, it may be truncated: {error}") from error
    if digest is not None and digest != hashlib.sha256(content).hexdigest():
        raise CheckpointError(
            f"{weights}: is not the file that {CONFIG} was saved with (its SHA-256 differs from "
            "'weights_sha256'); if you edited it on purpose, remove that key"
        )
    for name, tensor in tensors.items():
        warn_if_not_finite(weights, name, tensor)
    return tensors


def _intervention(
    where: str, weights: Path, index: int, entry: Any, tensors: dict[str, Tensor]
) -> InterventionRecord:
    """One entry; takes its tensors out of `tensors`."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: must be an object, was {entry!r}")
    mine: dict[str, Tensor] = {}
    for name in take(where, entry, "parameters", list):
        if not isinstance(name, str) or _key(index, name) not in tensors:
            raise CheckpointError(f"{weights}: the tensor {_key(index, str(name))!r} is missing")
        mine[name] = tensors.pop(_key(index, name))
    left = [key for key in sorted(tensors) if key.startswith(_key(index, ""))]
    if left:
        names = ", ".join(key.removeprefix(_key(index, "")) for key in left)
        raise CheckpointError(
            f"{where}: 'parameters' must name all of its tensors in {WEIGHTS}; missing: {names}"
        )
    spec, last = take(where, entry, "positions", str, list), take(where, entry, "last_position", str)
    try:
        positions = Positions.parse(spec, last)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return InterventionRecord(
        method=take(where, entry, "method", str),
        layer=take(where, entry, "layer", int),
        site=take(where, entry, "site", str),
        positions=positions,
        rank=take(where, entry, "rank", int),
        tensors=mine,
        head=take(where, entry, "head", int, type(None)),
        act_fn=take(where, entry, "act_fn", str, type(None)),
        dropout=take(where, entry, "dropout", float, int),
        options=take(where, {"options": {}, **entry}, "options", dict),
        scale=take(where, {"scale": 1.0, **entry}, "scale", float, int),
        where=where,
    )
