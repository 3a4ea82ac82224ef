"""Adapters of a row that follow one another."""

from __future__ import annotations

from typing import Any


class Sequence(tuple[str, ...]):
    """Adapters of one row that edit one behind the other: each reads what the one before has written.

    >>> import reft_kernels as rk
    >>> rk.Sequence("german", "formal")
    Sequence('german', 'formal')

    An entry of a call's `adapter_names`. (A list of names adds their edits up, each of the unedited state.)

    Args:
        names: of the adapters, in the order in which they edit.

    Raises:
        ValueError: an argument is no name.
    """

    __slots__ = ()

    def __new__(cls, *names: str) -> Sequence:
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"names: must be names of adapters, one behind the other; held {name!r}")
        return super().__new__(cls, names)

    def __getnewargs__(self) -> Any:  # what copies and pickles hand to __new__
        return tuple(self)

    def __repr__(self) -> str:
        return f"Sequence({', '.join(map(repr, self))})"
