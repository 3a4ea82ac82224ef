"""Reading and writing adapters: the native format, folders of pyreft's, the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..adapter import Adapter
from ..positions import LastPosition, Positions
from . import native, pyreft
from .errors import CheckpointError
from .hub import local_folder

__all__ = ["CheckpointError", "convert", "load"]


def load(
    path: str | os.PathLike[str],
    *,
    positions: str | Sequence[int] | Positions | None = None,
    act_fn: str | None = None,
    dropout: float | None = None,
    last_position: LastPosition | None = None,
) -> Adapter:
    """Reads an adapter, whichever format it has. See `Adapter.from_pretrained`."""
    folder = local_folder(path)
    if (folder / native.CONFIG).exists():
        given = {"positions": positions, "act_fn": act_fn, "dropout": dropout, "last_position": last_position}
        for name, value in given.items():
            if value is not None:
                raise CheckpointError(f"{name}: {folder} is a native folder and stores its own; leave it out")
        return native.load(folder)
    return pyreft.load(
        folder, positions=positions, act_fn=act_fn, dropout=dropout, last_position=last_position
    )


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    positions: str | Sequence[int] | Positions,
    act_fn: str | None = None,
    dropout: float | None = None,
    last_position: LastPosition | None = None,
) -> Adapter:
    """Reads a folder of pyreft's (or a hub id) and writes it natively into the folder `dst`.

    Args:
        src: what `reft_model.save` wrote.
        dst: made if missing; an adapter that is there is replaced.
        positions, act_fn, dropout, last_position: what the adapter was trained with; see
            `Adapter.from_pretrained`.

    Returns:
        The adapter that was written.

    Raises:
        CheckpointError: names the file and what is wrong with it. Nothing has been written then.
    """
    adapter = load(src, positions=positions, act_fn=act_fn, dropout=dropout, last_position=last_position)
    native.save(adapter, dst)
    return adapter
