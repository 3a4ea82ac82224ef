"""Folders of other libraries' become native ones."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..positions import LastPosition, Positions
from .adapter import Adapter


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
    adapter = Adapter.from_pretrained(
        src, positions=positions, act_fn=act_fn, dropout=dropout, last_position=last_position
    )
    adapter.save_pretrained(dst)
    return adapter
