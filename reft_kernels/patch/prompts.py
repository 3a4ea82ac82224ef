"""Which tokens of a batch are prompt, and from that which columns each adapter edits.

A column is an absolute place in a batch's token grid: column 0 is the first column that the cache has seen.
Padding is told by the 2-D attention mask alone, so left and right padding come to the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from ..positions import Positions

#: What a segment is: (adapter name, index of its position group).
Segment = tuple[str, int]

IGNORED_LABEL = -100


@dataclasses.dataclass
class Prompts:
    """The tokens of a batch's rows.

    Attributes:
        prompt: for each row the columns of its prompt tokens, ascending.
        answer: for each row its other tokens' columns below `width` (a response that stands in the input).
        width: every column from here on is generated.
        complete: whether the rows begin at their prompts (an empty prompt is then an error).
    """

    prompt: list[np.ndarray]
    answer: list[np.ndarray]
    width: int
    complete: bool = True

    @property
    def batch(self) -> int:
        return len(self.prompt)


def _host(value: Tensor | Sequence[int] | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def checked_lengths(prompt_lengths: Tensor | Sequence[int], batch: int) -> np.ndarray:
    lengths = _host(prompt_lengths)
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"prompt_lengths: must be a list of integers, was {prompt_lengths!r}")
    if len(lengths) != batch:
        raise ValueError(f"prompt_lengths: has {len(lengths)} entries for a batch of {batch} rows")
    return lengths


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
        nothing = [np.zeros(0, dtype=np.int64)] * batch
        return Prompts(nothing, nothing, start, complete=False)  # a decode loop by hand
    if mask is None:
        everything = np.arange(end)
        valid = [everything] * batch
    else:
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
        valid = [np.flatnonzero(row[:end]) for row in table]
    if prompt_lengths is not None:
        counts = checked_lengths(prompt_lengths, batch)
        for row, (count, columns) in enumerate(zip(counts, valid)):
            if count < 0 or count > len(columns):
                raise ValueError(
                    f"prompt_lengths: row {row} has {len(columns)} tokens, but its prompt length was {count}"
                )
    elif labels is not None and start == 0 and tuple(labels.shape) == (batch, length):
        answered = _host(labels) != IGNORED_LABEL
        first = np.where(answered.any(axis=1), answered.argmax(axis=1), length)
        counts = np.array([np.searchsorted(columns, stop) for columns, stop in zip(valid, first)])
    elif start == 0:
        counts = np.array([len(columns) for columns in valid])
    else:
        counts = np.zeros(batch, dtype=np.int64)
    return Prompts(
        prompt=[columns[:count] for columns, count in zip(valid, counts)],
        answer=[columns[count:] for columns, count in zip(valid, counts)],
        width=end,
        complete=start == 0 or prompt_lengths is not None,
    )


def _full(mask: Tensor, batch: int, length: int) -> bool:
    """Whether the last `length` columns are all tokens."""
    return mask.dim() == 2 and mask.shape[0] == batch and bool(mask[:, -length:].all())


@dataclasses.dataclass
class Selection:
    """Which columns of which rows each segment edits; for all forwards over the same prompts.

    names: the adapter of each row, None for the bare model.
    """

    names: tuple[str | None, ...]
    segments: tuple[Segment, ...]
    columns: list[list[tuple[int, np.ndarray]]]
    generated: list[np.ndarray]
    width: int
    batch: int

    def window(self, start: int, length: int, repeat: int = 1) -> list[np.ndarray] | None:
        """Flat rows by segment for a forward over columns [start, start + length), or None if there are none.

        repeat: how often each row of the selection stands in the forward's batch, side by side (beams).
        """
        found: list[np.ndarray] = []
        copies = np.arange(repeat)
        first = max(self.width, start)
        fresh = np.arange(first - start, length)
        for columns, rows in zip(self.columns, self.generated):
            parts: list[np.ndarray] = []
            if start < self.width:
                whole = start == 0 and length >= self.width
                for row, absolute in columns:
                    if not whole:
                        low, high = np.searchsorted(absolute, (start, start + length))
                        absolute = absolute[low:high] - start
                    if repeat == 1:
                        parts.append(absolute + row * length)
                    elif len(absolute):
                        parts.append((((row * repeat + copies) * length)[:, None] + absolute).ravel())
            if len(rows) and len(fresh):
                base = (rows[:, None] * repeat + copies).ravel() * length
                parts.append((base[:, None] + fresh).ravel())
            found.append(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))
        return found if any(len(rows) for rows in found) else None


def select(
    names: Sequence[str | None],
    prompts: Prompts,
    groups_of: Callable[[str], tuple[Positions, ...]],
) -> Selection:
    """Resolves every row's adapter to columns. names: one a row, None for the bare model.

    Raises ValueError: an empty prompt where positions need one, an index that a prompt lacks.
    """
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows_of.setdefault(name, []).append(row)
    segments: list[Segment] = []
    columns: list[list[tuple[int, np.ndarray]]] = []
    generated: list[np.ndarray] = []
    nothing = np.zeros(0, dtype=np.int64)
    for name in sorted(rows_of):
        for group, positions in enumerate(groups_of(name)):
            picked: list[tuple[int, np.ndarray]] = []
            for row in rows_of[name]:
                picked.append((row, _columns(positions, prompts, row, name)))
            segments.append((name, group))
            columns.append([(row, found) for row, found in picked if len(found)])
            generated.append(np.array(rows_of[name]) if positions.generated else nothing)
    return Selection(tuple(names), tuple(segments), columns, generated, prompts.width, prompts.batch)


def _columns(positions: Positions, prompts: Prompts, row: int, name: str) -> np.ndarray:
    prompt, answer = prompts.prompt[row], prompts.answer[row]
    parts: list[np.ndarray] = []
    if positions.word != "generated":
        if not len(prompt):
            if prompts.complete and positions.needs_prompt:
                raise ValueError(
                    f"row {row} has an empty prompt, but adapter {name!r} edits {positions} of it; "
                    "give prompt_lengths, labels that leave a prompt out, or an attention_mask with tokens"
                )
        else:
            try:
                parts.append(prompt[_resolved(positions, len(prompt))])
            except ValueError as error:
                raise ValueError(f"row {row}, adapter {name!r}: {error}") from None
    if positions.generated:
        parts.append(answer)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@functools.lru_cache(maxsize=1024)
def _resolved(positions: Positions, length: int) -> np.ndarray:
    return positions.resolve(length)
