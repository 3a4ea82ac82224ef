"""From a path or a hub id to a local folder, and which folders in one hold adapters."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: What is downloaded: no weights of a whole model, which pyreft may have put beside the adapter.
_FILES = ["reft_config.json", "reft_model.safetensors", "config.json", "intkey_*.bin", "delta_vector.pth"]


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, or, where there is none, the downloaded repository that it names on the hub.

    Raises CheckpointError: a file, neither a folder nor the form of a hub id, or the download failed.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; give the folder that holds the adapter")
    name = os.fspath(path)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f'{name}: there is no such folder, and it is no hub id ("organisation/name")')
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub client has many: no network, no such repository, no permission
        raise CheckpointError(f"{name}: is no local folder, and the hub did not give it: {error}") from error


def adapters_below(folder: Path, most: int = 10) -> str:
    """The end of an error about a folder that holds no adapter: which of the folders in it do."""
    found = sorted(
        child
        for child in folder.iterdir()
        if (child / "reft_config.json").is_file()
        or ((child / "config.json").is_file() and any(child.glob("intkey_*.bin")))
    )
    if not found:
        return ""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"; these do: {', '.join(map(str, found[:most]))}{more}"
