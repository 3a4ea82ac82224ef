"""`ServingConfig`: what a server is started with."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: What `Adapter.from_pretrained` may be told about a folder.
READING = ("positions", "act_fn", "dropout", "last_position")
#: Which of its subspaces is meant, by name; the whole adapter where it is not given.
SUBSPACE = "subspace"


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder that holds an adapter, and what is to be said when it is read."""

    path: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def key(self) -> tuple[str, str]:
        """Equal for sources that are read the same way."""
        return self.path, repr(sorted(self.options.items(), key=lambda item: item[0]))

    @classmethod
    def parse(cls, given: Any, where: str) -> Source:
        """From a path, or from {"path": …, "positions": …}. Raises ValueError that begins with `where`."""
        if isinstance(given, str) and given:
            return cls(given)
        if not isinstance(given, Mapping) or not isinstance(given.get("path"), str) or not given["path"]:
            raise ValueError(f'{where}: must be a folder, or {{"path": folder, …}}, was {given!r}')
        options = {name: value for name, value in given.items() if name != "path"}
        allowed = (*READING, SUBSPACE)
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise ValueError(
                f"{where}: unknown {unknown[0]!r}; beside 'path' allowed are {', '.join(allowed)}"
            )
        return cls(given["path"], options)


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """`additional_config["reft"]` of a server.

    >>> ServingConfig.parse({"adapters": {"math": "adapters/math"}, "max_adapters": 8}).max_adapters
    8

    Attributes:
        adapters: name → where it lies. Each is read once at the start, so that a wrong one stops the server.
        directory: a folder whose sub-folders are adapters by their names, read when a request asks for one.
        max_adapters: how many lie in device memory at a time; None for as many as the engine runs requests.
        max_rank: pool rows of one adapter at one layer, all its position groups together.
        staged: how many adapters wait in host memory, read but not in device memory.
        recheck: seconds in which a folder's files are not looked at again.
    """

    adapters: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    directory: str | None = None
    max_adapters: int | None = None
    max_rank: int = 16
    staged: int = 1024
    recheck: float = 1.0

    @classmethod
    def parse(cls, given: Any) -> ServingConfig:
        """Raises ValueError that names what is wrong."""
        if not isinstance(given, Mapping):
            raise ValueError(f"reft: must be a mapping, was {given!r}")
        unknown = sorted(set(given) - {field.name for field in dataclasses.fields(cls)} - {"plugin"})
        if unknown:
            known = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ValueError(f"reft: unknown {unknown[0]!r}; allowed are {known}")
        adapters = given.get("adapters") or {}
        if not isinstance(adapters, Mapping):
            raise ValueError(f"reft.adapters: must map names to folders, was {adapters!r}")
        sources = {
            check_name(name, "reft.adapters"): Source.parse(source, f"reft.adapters[{name!r}]")
            for name, source in adapters.items()
        }
        directory = given.get("directory")
        if directory is not None and not (isinstance(directory, str) and Path(directory).is_dir()):
            raise ValueError(f"reft.directory: must be a folder, was {directory!r}")
        numbers: dict[str, Any] = {}
        for name in ("max_adapters", "max_rank", "staged"):
            value = given.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"reft.{name}: must be an integer from 1 up, was {value!r}")
            numbers[name] = value
        recheck = given.get("recheck")
        if recheck is not None:
            real = isinstance(recheck, int | float) and not isinstance(recheck, bool)
            if not real or not math.isfinite(recheck) or recheck < 0:
                raise ValueError(f"reft.recheck: must be a number of seconds from 0 up, was {recheck!r}")
            numbers["recheck"] = float(recheck)
        return cls(sources, directory, **numbers)


def check_name(name: Any, where: str) -> str:
    """A name that is also safe as a part of a path."""
    if not isinstance(name, str) or not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"{where}: an adapter's name must be a string without '/', was {name!r}")
    return name


def check_scale(scale: Any) -> float:
    """What the edit is multiplied by."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"reft_scale: must be a finite number, was {scale!r}")
    return float(scale)
