"""Which token positions an intervention edits.

A `Positions` is parsed once from what the user wrote ("f3+l3", "prompt[2:-1]+generated", [0, 5], …) and asked
about whole batches. docs/positions.md is the page for users.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from . import parser
from .meeting import meet
from .terms import Affix, Everything, Slice, Term, Terms, Tokens, ragged_arange

LastPosition = Literal["length", "length-1"]


@dataclasses.dataclass(frozen=True)
class Positions:
    """A parsed position spec.

    >>> Positions.parse("f3+l2").resolve(10).tolist()
    [0, 1, 2, 8, 9]
    >>> Positions.parse("prompt[-1:]+generated[::2]").mask(np.arange(8), np.array(5)).tolist()
    [False, False, False, False, True, True, False, True]

    Attributes:
        word: "all", "prompt" or "generated"; None for the others.
        first, last: how many positions at the prompt's beginning and end ("f3+l3" is 3 and 3).
        indices: explicit indices into the prompt (negative ones count from its end).
        last_position: what an l position counts back from: the prompt's "length", or "length-1".
        terms: of a spec that none of the above can say, as slices, ids and most unions; else None.
    """

    word: str | None = None
    first: int = 0
    last: int = 0
    indices: tuple[int, ...] | None = None
    last_position: LastPosition = "length"
    terms: Terms | None = None

    @classmethod
    def parse(
        cls, spec: str | Sequence[int] | Positions, last_position: LastPosition | None = None
    ) -> Positions:
        """Parses a spec. Raises ValueError that says what is allowed, and where in a text it went wrong."""
        where: LastPosition = "length" if last_position is None else last_position
        if where not in ("length", "length-1"):
            raise ValueError(f'last_position: must be "length" or "length-1", was {where!r}')
        if isinstance(spec, Positions):
            return spec if last_position is None else dataclasses.replace(spec, last_position=where)
        if not isinstance(spec, Sequence):
            raise ValueError(f"positions: must be {parser.ALLOWED}; was {spec!r}")
        if isinstance(spec, str):
            return cls._of(parser.parse(spec), where)
        if not spec or any(isinstance(i, bool) or not isinstance(i, int) for i in spec):
            raise ValueError(f"positions: a list must hold integers, at least one; was {list(spec)!r}")
        if len(set(spec)) != len(spec):
            raise ValueError(f"positions: an index stands twice in {list(spec)!r}")
        return cls(indices=tuple(spec), last_position=where)

    @classmethod
    def _of(cls, terms: Terms, where: LastPosition) -> Positions:
        """In the shortest form: those of single words and of pyreft's specs stay what they always were."""
        added = terms.added
        if not terms.removed:
            if len(added) == 1 and str(added[0]) in ("all", "prompt", "generated"):
                return cls(word=str(added[0]), last_position=where)
            counts = {term.side: term.count for term in added if isinstance(term, Affix)}
            if len(counts) == len(added):
                return cls(first=counts.get("f", 0), last=counts.get("l", 0), last_position=where)
        return cls(last_position=where, terms=terms)

    @functools.cached_property
    def as_terms(self) -> Terms:
        """The same as terms, whatever it was written as."""
        if self.terms is not None:
            return self.terms
        found: list[Term] = []
        if self.word == "all":
            found.append(Everything())
        elif self.word is not None:
            found.append(Slice(self.word))  # type: ignore[arg-type]
        elif self.indices is not None:
            found += [Slice("prompt", only=index) for index in self.indices]
        else:
            ends: tuple[Literal["f", "l"], ...] = ("f", "l")
            found += [Affix(end, n) for end, n in zip(ends, (self.first, self.last)) if n]
        return Terms(tuple(found))

    # What kind of spec it is -----------------------------------------------------------------------------

    @functools.cached_property
    def needs_prompt(self) -> bool:
        """Whether the edit depends on which tokens are the prompt."""
        terms = self.as_terms
        return any(term.needs_prompt for term in (*terms.added, *terms.removed))

    @functools.cached_property
    def edits_prompt(self) -> bool:
        """Whether tokens of the prompt are edited."""
        return any(term.in_prompt for term in self.as_terms.added)

    @functools.cached_property
    def needs_ids(self) -> bool:
        """Whether the edit depends on which tokens they are, by their ids."""
        terms = self.as_terms
        return any(term.needs_ids for term in (*terms.added, *terms.removed))

    @functools.cached_property
    def generated(self) -> bool:
        """Whether generated tokens are edited, some at least."""
        return any(term.generated for term in self.as_terms.added)

    @functools.cached_property
    def every_generated(self) -> bool:
        """Whether all of them are."""
        terms = self.as_terms
        every = any(term.every_generated for term in terms.added)
        return every and not any(term.generated for term in terms.removed)

    @functools.cached_property
    def dynamic(self) -> bool:
        """Whether each step must ask anew which of its tokens are edited: some of the generated ones are, or
        ids tell."""
        return self.needs_ids or (self.generated and not self.every_generated)

    @functools.cached_property
    def counts_generated(self) -> bool:
        """Whether the edit depends on how many tokens were generated before one."""
        terms = self.as_terms
        return any(
            isinstance(term, Slice) and term.generated and not term.whole
            for term in (*terms.added, *terms.removed)
        )

    @functools.cached_property
    def moves_with_prompt(self) -> bool:
        """Whether a prompt that goes on gives other positions, beyond a longer list of the same."""
        terms = self.as_terms
        return any(term.moves for term in (*terms.added, *terms.removed))

    # Parts -----------------------------------------------------------------------------------------------

    def untied(self) -> tuple[Positions, ...]:
        """The parts that have parameters of their own when weights are not shared: a term each. A token that
        several terms name belongs to the first of them."""
        if self.first and self.last:
            return (dataclasses.replace(self, last=0), dataclasses.replace(self, first=0))
        if self.terms is None or len(self.terms.added) == 1:
            return (self,)
        added, removed = self.terms
        parts: list[Positions] = []
        for number, term in enumerate(added):
            alone = self._of(Terms((term,)), self.last_position)
            before = [
                one
                for one in added[:number]
                if alone.overlaps(self._of(Terms((one,)), self.last_position)) and one not in removed
            ]
            parts.append(self._of(Terms((term,), (*removed, *before)), self.last_position))
        return tuple(parts)

    def overlaps(self, other: Positions) -> bool:
        """Whether some prompt could give both a common position (an index may meet anything in a prompt)."""
        if self.generated and self.every_generated and other.every_generated:
            return True
        if self.terms is not None or other.terms is not None:
            return meet(self.as_terms, self.last_position, other.as_terms, other.last_position)
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

    # Which tokens ----------------------------------------------------------------------------------------

    def mask(self, index: np.ndarray, length: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
        """Which tokens are edited: the one function that plans, servers and cache keys ask.

        A pure function of the spec and its arguments, which broadcast: a batch of requests is one call.

        Args:
            index: the tokens' places in their sequences, counted from the prompt's first token; integers.
                From `length` on they are generated.
            length: of their prompts; integers.
            ids: token ids, where `needs_ids`; integers.

        Returns:
            bool, of the shape that the arguments broadcast to. An index of a list that a prompt lacks is not
            there: `check` tells of it.

        Raises ValueError without ids that are needed.
        """
        if self.needs_ids and ids is None:
            raise ValueError(f"positions: {str(self)!r} needs the tokens' ids, and the call has none")
        end = np.maximum(length - (self.last_position == "length-1"), 0)
        return self.as_terms.meant(Tokens(np.asarray(index), np.asarray(length), end, ids))

    def check(self, lengths: np.ndarray) -> None:
        """Raises ValueError for an explicit index that a prompt of one of these lengths, int64 [n], lacks."""
        terms = self.as_terms
        named = [one.only for one in terms.added if isinstance(one, Slice) and one.in_prompt]
        given = np.array([index for index in named if index is not None], dtype=np.int64)
        if not len(given) or not len(lengths):
            return
        found = np.where(given < 0, given + lengths[:, None], given)
        outside = ((found < 0) | (found >= lengths[:, None])).any(axis=1)
        if outside.any():
            length = int(lengths[outside.argmax()])
            raise ValueError(f"positions: {self._said} has an index outside a prompt of {length} tokens")
        if self.indices is None:
            return  # in a union what is named twice counts once
        found.sort(axis=1)
        twice = (found[:, 1:] == found[:, :-1]).any(axis=1)
        if twice.any():
            length = int(lengths[twice.argmax()])
            raise ValueError(f"positions: {self._said} names a token twice in a prompt of {length} tokens")

    @property
    def _said(self) -> str:
        return str(self) if self.indices is not None else repr(str(self))

    def resolve(self, length: int) -> np.ndarray:
        """Indices into a prompt of `length` tokens that are edited, ascending, int64.

        Raises ValueError for an explicit index that the prompt lacks, and for positions by token ids.
        """
        return self.resolve_all(np.array([length]))[1]

    def resolve_all(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`resolve` for prompts of these lengths, int64 [n], at once.

        Returns (which prompt, index into it), int64 [m] each, ordered by prompt and then by index.
        Raises ValueError for an explicit index that one of the prompts lacks.
        """
        self.check(lengths)
        if self.indices is not None:
            given = np.array(self.indices, dtype=np.int64)
            found = np.sort(np.where(given < 0, given + lengths[:, None], given), axis=1)
            return np.repeat(np.arange(len(lengths)), len(given)), found.ravel()
        if not self.edits_prompt:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if self.word is not None:
            return ragged_arange(lengths)
        if self.terms is not None:
            which, index = ragged_arange(lengths)
            edited = self.mask(index, lengths[which])
            return which[edited], index[edited]
        end = np.maximum(lengths - (self.last_position == "length-1"), 0)
        first, last = np.minimum(self.first, end // 2), np.minimum(self.last, end // 2)
        which, index = ragged_arange(first + last)
        return which, np.where(index < first[which], index, index + (end - first - last)[which])

    def to_json(self) -> str | list[int]:
        """What `parse` takes back (without last_position)."""
        return str(self.as_terms) if self.indices is None else list(self.indices)

    def __str__(self) -> str:
        return str(self.to_json())
