"""Files of adapters, read to records and written from them: the native format, folders of pyreft's and RED's,
the hub.

Nothing here knows what an adapter does; `reft_kernels.adapter` makes one of a record.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..positions import LastPosition, Positions
from . import native, pyreft, red
from .errors import CheckpointError
from .hub import local_folder
from .records import AdapterRecord, BaseModel, InterventionRecord

__all__ = ["AdapterRecord", "BaseModel", "CheckpointError", "InterventionRecord", "read"]


def read(
    path: str | os.PathLike[str],
    *,
    positions: str | Sequence[int] | Positions | None = None,
    act_fn: str | None = None,
    dropout: float | None = None,
    last_position: LastPosition | None = None,
) -> AdapterRecord:
    """Reads an adapter's record, whichever format it has. Arguments as of `Adapter.from_pretrained`.

    Raises CheckpointError that names the file and what is wrong with it.
    """
    folder = local_folder(path)
    if (folder / native.CONFIG).exists():
        given = {"positions": positions, "act_fn": act_fn, "dropout": dropout, "last_position": last_position}
        for name, value in given.items():
            if value is not None:
                raise CheckpointError(f"{name}: {folder} is a native folder and stores its own; leave it out")
        return native.read(folder)
    if (folder / red.WEIGHTS).exists():
        return red.read(folder, positions, act_fn=act_fn, dropout=dropout, last_position=last_position)
    return pyreft.read(
        folder, positions=positions, act_fn=act_fn, dropout=dropout, last_position=last_position
    )
