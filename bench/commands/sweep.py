"""Values on the axes of a sweep, as the command lines of `overhead` and `train` take them."""

from __future__ import annotations

from typing import Any

from reft_kernels.positions import Positions
from reft_kernels.sites import canonical

from ..records.record import ResultError
from ..systems import adapters


def axis_values(axis: str, text: str) -> list[Any]:
    """ "1,2,all" → [1, 2, "all"]; position specs for "positions", names for "method" and "site".

    Raises ResultError.
    """
    words = text.split(",")
    if axis == "method":
        for word in words:
            if word not in adapters.KNOWN:
                raise ResultError(f"--method: must be among {', '.join(adapters.KNOWN)}; was {word!r}")
        return words
    if axis == "site":
        try:
            return [canonical(word) for word in words]
        except ValueError as error:
            raise ResultError(f"--site: {error}") from error
    if axis == "positions":
        for word in words:
            try:
                Positions.parse(word)
            except ValueError as error:
                raise ResultError(f"--positions: {error}") from error
        return words
    found: list[Any] = []
    for word in words:
        if axis == "layers" and word == "all":
            found.append("all")
        elif word.isdigit() and int(word) > 0:
            found.append(int(word))
        else:
            raise ResultError(f"--{axis}: must be integers from 1 up with commas between them, was {text!r}")
    return found
