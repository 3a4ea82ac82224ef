"""Which token positions an intervention edits.

A `Positions` is parsed once from what the user wrote ("f3+l3", "all", [0, 5], …) and resolved for each
prompt. The rules are pyreft's: first n and last n are each clamped to half the prompt's length.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

LastPosition = Literal["length", "length-1"]

_AFFIX = re.compile(r"(?:f(?P<first>\d+))?(?P<plus>\+)?(?:l(?P<last>\d+))?")
_WORDS = ("all", "prompt", "generated")
_ALLOWED = 'a spec such as "f3+l3", "f5" or "l1", one of "all", "prompt", "generated", or a list of indices'


def ragged_arange(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(i, j) for every i and every j below counts[i], in order: int64 [sum of counts] each."""
    which = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return which, np.arange(len(which)) - starts[which]


@dataclasses.dataclass(frozen=True)
class Positions:
    """A parsed position spec.

    >>> Positions.parse("f3+l2").resolve(10).tolist()
    [0, 1, 2, 8, 9]
    >>> Positions.parse([0, -1]).resolve(4).tolist()
    [0, 3]

    Attributes:
        word: "all", "prompt" or "generated"; None for the others.
        first, last: how many positions at the prompt's beginning and end ("f3+l3" is 3 and 3).
        indices: explicit indices into the prompt (negative ones count from its end).
        last_position: what an l position counts back from: the prompt's "length", or "length-1".
    """

    word: str | None = None
    first: int = 0
    last: int = 0
    indices: tuple[int, ...] | None = None
    last_position: LastPosition = "length"

    @classmethod
    def parse(
        cls, spec: str | Sequence[int] | Positions, last_position: LastPosition | None = None
    ) -> Positions:
        """Parses a spec. Raises ValueError that says what is allowed."""
        where: LastPosition = "length" if last_position is None else last_position
        if where not in ("length", "length-1"):
            raise ValueError(f'last_position: must be "length" or "length-1", was {where!r}')
        if isinstance(spec, Positions):
            return spec if last_position is None else dataclasses.replace(spec, last_position=where)
        if not isinstance(spec, Sequence):
            raise ValueError(f"positions: must be {_ALLOWED}; was {spec!r}")
        if isinstance(spec, str):
            return cls._parse_text(spec.strip(), where)
        if not spec or any(isinstance(i, bool) or not isinstance(i, int) for i in spec):
            raise ValueError(f"positions: a list must hold integers, at least one; was {list(spec)!r}")
        if len(set(spec)) != len(spec):
            raise ValueError(f"positions: an index stands twice in {list(spec)!r}")
        return cls(indices=tuple(spec), last_position=where)

    @classmethod
    def _parse_text(cls, text: str, where: LastPosition) -> Positions:
        if text in _WORDS:
            return cls(word=text, last_position=where)
        match = _AFFIX.fullmatch(text)
        if match and (match["first"] or match["last"]):
            both = bool(match["first"] and match["last"])
            first, last = int(match["first"] or 0), int(match["last"] or 0)
            if both == bool(match["plus"]) and first + last > 0:
                return cls(first=first, last=last, last_position=where)
        raise ValueError(f"positions: must be {_ALLOWED}; was {text!r}")

    @property
    def needs_prompt(self) -> bool:
        """Whether the edit depends on which tokens are the prompt."""
        return self.word != "all"

    @property
    def generated(self) -> bool:
        """Whether generated tokens are edited."""
        return self.word in ("all", "generated")

    def untied(self) -> tuple[Positions, ...]:
        """The parts that have parameters of their own when weights are not shared: f and l, or all in one."""
        if self.first and self.last:
            return (dataclasses.replace(self, last=0), dataclasses.replace(self, first=0))
        return (self,)

    def overlaps(self, other: Positions) -> bool:
        """Whether some prompt could give both a common position (an index may meet anything in a prompt)."""
        if self.generated and other.generated:
            return True
        if "generated" in (self.word, other.word):
            return False
        if self.indices is not None and other.indices is not None:
            # An index from the front and one from the end are the same token at some length.
            mine, theirs = set(self.indices), set(other.indices)
            return len({i < 0 for i in mine | theirs}) == 2 or bool(mine & theirs)
        if self.word is None and other.word is None and self.indices is None and other.indices is None:
            # Both halves are clamped, so an f and an l never meet.
            return bool(self.first and other.first) or bool(self.last and other.last)
        return True

    def resolve(self, length: int) -> np.ndarray:
        """Indices into a prompt of `length` tokens that are edited, ascending, int64.

        Raises ValueError for an explicit index that the prompt lacks.
        """
        return self.resolve_all(np.array([length]))[1]

    def resolve_all(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`resolve` for prompts of these lengths, int64 [n], at once.

        Returns (which prompt, index into it), int64 [m] each, ordered by prompt and then by index.
        Raises ValueError for an explicit index that one of the prompts lacks.
        """
        if self.indices is not None:
            return self._resolve_indices(lengths)
        if self.word == "generated":
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if self.word is not None:
            return ragged_arange(lengths)
        end = np.maximum(lengths - (self.last_position == "length-1"), 0)
        first, last = np.minimum(self.first, end // 2), np.minimum(self.last, end // 2)
        which, index = ragged_arange(first + last)
        return which, np.where(index < first[which], index, index + (end - first - last)[which])

    def _resolve_indices(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        given = np.array(self.indices, dtype=np.int64)
        found = np.sort(np.where(given < 0, given + lengths[:, None], given), axis=1)
        outside = (found[:, 0] < 0) | (found[:, -1] >= lengths)
        if outside.any():
            length = int(lengths[outside.argmax()])
            raise ValueError(f"positions: {given.tolist()} has an index outside a prompt of {length} tokens")
        twice = (found[:, 1:] == found[:, :-1]).any(axis=1)
        if twice.any():
            length = int(lengths[twice.argmax()])
            raise ValueError(
                f"positions: {given.tolist()} names a token twice in a prompt of {length} tokens"
            )
        return np.repeat(np.arange(len(lengths)), len(given)), found.ravel()

    def to_json(self) -> str | list[int]:
        """What `parse` takes back (without last_position)."""
        if self.word is not None:
            return self.word
        if self.indices is not None:
            return list(self.indices)
        counts = {"f": self.first, "l": self.last}
        return "+".join(f"{end}{count}" for end, count in counts.items() if count)

    def __str__(self) -> str:
        return str(self.to_json())
