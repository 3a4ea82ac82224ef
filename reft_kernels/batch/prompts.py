"""Which tokens of a batch are prompt.

A column is an absolute place in a batch's token grid: column 0 is the first column that the cache has seen.
Padding is told by the 2-D attention mask alone, so left and right padding come to the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..positions import ragged_arange

IGNORED_LABEL = -100


@dataclasses.dataclass
class Prompts:
    """The tokens of a batch's rows.

    Attributes:
        tokens: for each row how many tokens it has below `width`, int64 [batch].
        lengths: how many of them, from the first, are its prompt, int64 [batch]. The others are an answer
            that stands in the input.
        width: every column from here on is generated.
        columns: the columns of all rows' tokens, row after row, ascending in each; None where token i of a
            row lies in column i.
        complete: whether the rows begin at their prompts (an empty prompt is then an error).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    width: int
    columns: np.ndarray | None = None
    complete: bool = True

    @classmethod
    def unpadded(cls, lengths: Sequence[int] | np.ndarray) -> Prompts:
        """Prompts of these lengths whose token i lies in column i, with nothing but generated tokens after.

        For an engine that has no padding: a column is then a token's position in its sequence.
        """
        counts = np.asarray(lengths, dtype=np.int64)
        return cls(counts, counts, 0)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def column(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The columns of tokens, each given by its row and its index among that row's tokens."""
        if self.columns is None:
            return index
        starts = np.cumsum(self.tokens) - self.tokens
        return self.columns[starts[rows] + index]

    def index(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Where the tokens of these columns stand in their rows, prompt first; −1 for padding. `column`'s
        inverse, which knows the columns from `width` on as well."""
        if self.columns is None:
            return columns
        beyond = self.tokens[rows] + columns - self.width
        return np.where(columns < self.width, self._places[rows, np.minimum(columns, self.width - 1)], beyond)

    @functools.cached_property
    def _places(self) -> np.ndarray:
        """The index of the token in each row and column below `width`; −1 for padding."""
        assert self.columns is not None
        which, index = ragged_arange(self.tokens)
        places = np.full((self.batch, self.width), -1, dtype=np.int64)
        places[which, self.columns] = index
        return places


def _host(value: Tensor | Sequence[int] | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def checked_lengths(prompt_lengths: Tensor | Sequence[int], batch: int) -> np.ndarray:
    """Prompt lengths as int64 [batch]. Raises ValueError."""
    lengths = _host(prompt_lengths)
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"prompt_lengths: must be a list of integers, was {prompt_lengths!r}")
    if len(lengths) != batch:
        raise ValueError(f"prompt_lengths: has {len(lengths)} entries for a batch of {batch} rows")
    return lengths.astype(np.int64)


def read_prompts(
    batch: int,
    start: int,
    length: int,
    mask: Tensor | None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    labels: Tensor | None = None,
) -> Prompts:
    """The prompts of one forward over columns [start, start + length).

    mask: [batch, columns] with 1 for tokens, covering the cache too, or this forward's columns alone.
    labels: [batch, length]; the prompt ends before the first label that is not −100.
    Without lengths and labels the tokens of a forward with an empty cache are the prompt, and none of the
    others'.
    """
    end = start + length
    if start and prompt_lengths is None and (mask is None or _full(mask, batch, length)):
        nothing = np.zeros(batch, dtype=np.int64)
        return Prompts(nothing, nothing, start, complete=False)  # a decode loop by hand
    valid = None if mask is None else _valid(mask, batch, start, length)
    tokens = np.full(batch, end, dtype=np.int64) if valid is None else valid.sum(axis=1)
    if prompt_lengths is not None:
        counts = checked_lengths(prompt_lengths, batch)
        wrong = (counts < 0) | (counts > tokens)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"prompt_lengths: row {row} has {tokens[row]} tokens, but its prompt length was {counts[row]}"
            )
    elif labels is not None and start == 0 and tuple(labels.shape) == (batch, length):
        answered = _host(labels) != IGNORED_LABEL
        first = np.where(answered.any(axis=1), answered.argmax(axis=1), length)
        before = np.arange(end) < first[:, None]
        counts = (before if valid is None else before & valid).sum(axis=1)
    elif start == 0:
        counts = tokens
    else:
        counts = np.zeros(batch, dtype=np.int64)
    return Prompts(
        tokens=tokens,
        lengths=counts,
        width=end,
        columns=None if valid is None else np.nonzero(valid)[1],
        complete=start == 0 or prompt_lengths is not None,
    )


def _valid(mask: Tensor, batch: int, start: int, length: int) -> np.ndarray | None:
    """Which columns up to start + length are tokens, bool [batch, start + length]; None for all."""
    end = start + length
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(
            f"attention_mask: must be 2-D, [{batch}, columns], to tell where a prompt begins; "
            f"its shape was {list(mask.shape)}"
        )
    table = _host(mask)
    if table.shape[1] == length and start:
        table = np.concatenate([np.ones((batch, start), dtype=table.dtype), table], axis=1)
    elif table.shape[1] < end:
        raise ValueError(
            f"attention_mask: has {table.shape[1]} columns, but cache and input have {end} together"
        )
    valid = table[:, :end] != 0
    return None if valid.all() else valid


def _full(mask: Tensor, batch: int, length: int) -> bool:
    """Whether the last `length` columns are all tokens."""
    return mask.dim() == 2 and mask.shape[0] == batch and bool(mask[:, -length:].all())
