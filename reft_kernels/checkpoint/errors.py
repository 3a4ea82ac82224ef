"""What every reader of checkpoints shares: its error, its warning, and reading JSON and tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint can't be read or written; the message names the file and what is wrong with it."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, holds a {type(found).__name__}")
    return found


_NAMES = {
    int: "an integer",
    str: "text",
    list: "a list",
    dict: "an object",
    float: "a number",
    type(None): "null",
}


def take(where: str, entry: Mapping[str, Any], key: str, *types: type) -> Any:
    """entry[key], which must have one of the types. Raises CheckpointError that names `where` and the key."""
    if key not in entry:
        raise CheckpointError(f"{where}: the key {key!r} is missing")
    value = entry[key]
    if isinstance(value, bool) or not isinstance(value, types):
        allowed = " or ".join(_NAMES[kind] for kind in types)
        raise CheckpointError(f"{where}: {key!r} must be {allowed}, was {value!r}")
    return value


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def warn_if_not_finite(file: Path, name: str, tensor: Tensor) -> None:
    """Warns of NaN or Inf in a tensor that was read. Raises CheckpointError for float8 and the like."""
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"{file}: {name!r} is {tensor.dtype}; an adapter's tensors must be float64, float32, bfloat16 or "
            "float16"
        )
    if not tensor.isfinite().all():
        warnings.warn(f"{file}: {name!r} holds NaN or Inf", stacklevel=2)


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors by name in a file of torch.save. Runs no code from it. Raises CheckpointError."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        raise CheckpointError(
            f"{file}: is damaged, or holds more than tensors and was refused, as loading it could run code"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{file}: must hold a dict of tensors")
    for name, tensor in state.items():
        warn_if_not_finite(file, name, tensor)
    return dict(state)
