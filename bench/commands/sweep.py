"""Values on the axes of a sweep, as the command lines of `overhead` and `train` take them."""

from __future__ import annotations

from typing import Any

from reft_kernels.positions import Positions

from ..records.record import ResultError


def axis_values(axis: str, text: str) -> list[Any]:
    """ "1,2,all" → [1, 2, "all"], or position specs for the axis "positions". Raises ResultError."""
    words = text.split(",")
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
