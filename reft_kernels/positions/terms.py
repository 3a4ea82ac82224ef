"""The terms of a position spec: each says of a token whether it is meant, by its place and its prompt.

All are functions of whole numpy arrays, so that a batch of requests costs what one does.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import numpy as np


def ragged_arange(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, j) for every i and every j below counts[i], in order: int64 [sum of counts] each."""
    which = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return which, np.arange(len(which)) - starts[which]


class Tokens(NamedTuple):
    """Tokens of which it is asked whether they are edited; the arrays broadcast with each other.

    Attributes:
        place: in their sequences, prompt first, from 0; int64.
        length: of their prompts; int64.
        end: what an l position counts back from; int64.
        ids: their token ids, where they are known.
    """

    place: np.ndarray
    length: np.ndarray
    end: np.ndarray
    ids: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Everything:
    """All tokens, prompt and generated ("all")."""

    needs_prompt = needs_ids = moves = False
    in_prompt = generated = every_generated = True
    numbers: ClassVar[tuple[int, ...]] = ()
    step = 1

    def meant(self, tokens: Tokens) -> np.ndarray:
        return np.ones_like(tokens.place, dtype=bool)

    def __str__(self) -> str:
        return "all"


@dataclasses.dataclass(frozen=True)
class Affix:
    """So many tokens at the prompt's beginning ("f3") or end ("l3"), at most half of it, as in pyreft."""

    side: Literal["f", "l"]
    count: int

    needs_prompt = in_prompt = True
    needs_ids = generated = every_generated = False
    step = 1

    @property
    def moves(self) -> bool:
        return self.side == "l"

    @property
    def numbers(self) -> tuple[int, ...]:
        return (2 * self.count,)

    def meant(self, tokens: Tokens) -> np.ndarray:
        count = np.minimum(self.count, tokens.end // 2)
        if self.side == "f":
            return tokens.place < count
        return (tokens.place >= tokens.end - count) & (tokens.place < tokens.end)

    def __str__(self) -> str:
        return f"{self.side}{self.count}"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Tokens as Python slices a list of the prompt's, or of the generated ones ("prompt[2:-1]").

    only: one index in place of a slice, as in "prompt[-1]"; start, stop and step then say nothing.
    """

    over: Literal["prompt", "generated"]
    start: int | None = None
    stop: int | None = None
    step: int = 1
    only: int | None = None

    needs_prompt = True
    needs_ids = False

    @property
    def in_prompt(self) -> bool:
        return self.over == "prompt"

    @property
    def generated(self) -> bool:
        return self.over == "generated"

    @property
    def whole(self) -> bool:
        return self.only is None and self.start is None and self.stop is None and self.step == 1

    @property
    def every_generated(self) -> bool:
        return self.generated and self.whole

    @property
    def moves(self) -> bool:
        """Whether another end of the prompt gives other tokens."""
        if self.generated:
            return True
        if self.only is not None:
            return self.only < 0
        return (self.start or 0) < 0 or self.stop is None or self.stop < 0 or self.step < 0

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(abs(n) for n in (self.start, self.stop, self.only) if n is not None)

    def meant(self, tokens: Tokens) -> np.ndarray:
        if self.generated:
            # There is no telling how many there will be; the numbers are 0 or more, so nobody asks.
            return self._sliced(tokens.place - tokens.length, np.iinfo(np.int64).max)
        return self._sliced(tokens.place, tokens.length) & (tokens.place < tokens.length)

    def _sliced(self, index: np.ndarray, length: np.ndarray | int) -> np.ndarray:
        """Which of these indices `range(length)[start:stop:step]` holds."""
        if self.only is not None:
            return index == (self.only if self.only >= 0 else self.only + length)
        if self.step > 0:
            first, beyond = _bound(self.start, length, 0, 0), _bound(self.stop, length, 0, length)
            inside = (index >= first) & (index < beyond)
            return inside if self.step == 1 else inside & ((index - first) % self.step == 0)
        first, beyond = _bound(self.start, length, -1, length - 1), _bound(self.stop, length, -1, -1)
        inside = (index <= first) & (index > beyond)
        return inside & ((first - index) % -self.step == 0)

    def __str__(self) -> str:
        if self.only is not None:
            return f"{self.over}[{self.only}]"
        if self.whole:
            return self.over
        start, stop = ("" if n is None else n for n in (self.start, self.stop))
        step = "" if self.step == 1 else f":{self.step}"
        return f"{self.over}[{start}:{stop}{step}]"


def _bound(number: int | None, length: np.ndarray | int, low: int, default: np.ndarray | int) -> np.ndarray:
    """A bound of a slice of `length` items, within [low, length + low]: `slice.indices`, for many lengths."""
    if number is None:
        return np.asarray(default)
    if number < 0:
        return np.maximum(number + length, low)
    return np.minimum(number, length + low)


@dataclasses.dataclass(frozen=True)
class TokenId:
    """Tokens with one of these ids, prompt and generated ("token(198,13)")."""

    ids: tuple[int, ...]

    needs_prompt = moves = every_generated = False
    needs_ids = in_prompt = generated = True
    numbers: ClassVar[tuple[int, ...]] = ()
    step = 1

    def meant(self, tokens: Tokens) -> np.ndarray:
        assert tokens.ids is not None
        return np.isin(tokens.ids, self.ids)

    def __str__(self) -> str:
        return f"token({','.join(map(str, self.ids))})"


Term = Everything | Affix | Slice | TokenId


class Terms(NamedTuple):
    """A spec: the tokens of any of `added`, without those of any of `removed`."""

    added: tuple[Term, ...]
    removed: tuple[Term, ...] = ()

    def meant(self, tokens: Tokens) -> np.ndarray:
        """bool, of the shape that the tokens' arrays broadcast to."""
        shape = np.broadcast_shapes(*(np.shape(part) for part in tokens if part is not None))
        found = np.zeros(shape, dtype=bool)
        for term in self.added:
            found |= term.meant(tokens)
        for term in self.removed:
            found &= ~term.meant(tokens)
        return found

    def __str__(self) -> str:
        return "+".join(map(str, self.added)) + "".join(f"-{term}" for term in self.removed)
