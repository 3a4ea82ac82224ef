"""What an adapter edits of one sequence, as intervals: for engines whose batch changes every step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from ..positions import Positions

#: Where an interval of generated tokens ends.
NO_END = 2**31 - 1


def intervals_of(groups: Sequence[Positions], prompt_length: int) -> np.ndarray:
    """The edited positions of a sequence with a prompt of that many tokens, whatever is generated after it.

    >>> intervals_of([Positions.parse("f2+l1"), Positions.parse("generated")], 9).tolist()
    [[0, 0, 2], [0, 8, 9], [1, 9, 2147483647]]

    Returns (group, first position, the one behind the last), int64 [n, 3], of each group in ascending order.
    It is remembered, as many requests ask for the same, and can't be written to.

    Raises ValueError: an empty prompt where positions need one, an index that the prompt lacks, and positions
    that this does not tell, as some of the generated tokens, or token ids.
    """
    return _intervals_of(tuple(groups), prompt_length)


@functools.lru_cache(maxsize=4096)
def _intervals_of(groups: tuple[Positions, ...], prompt_length: int) -> np.ndarray:
    found = []
    for group, positions in enumerate(groups):
        if positions.dynamic:
            raise ValueError(f"positions: {str(positions)!r} are not known with the prompt's length")
        if positions.needs_prompt and positions.edits_prompt and prompt_length == 0:
            raise ValueError(f"the prompt is empty, but the adapter edits {positions} of it")
        index = positions.resolve(prompt_length)
        if positions.generated:
            index = np.append(index, prompt_length)
        if not len(index):
            continue
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        starts = index[np.append(0, breaks)]
        ends = index[np.append(breaks, len(index)) - 1] + 1
        if positions.generated:
            ends[-1] = NO_END
        found.append(np.stack([np.full(len(starts), group), starts, ends], axis=1))
    intervals = np.concatenate(found) if found else np.zeros((0, 3), dtype=np.int64)
    intervals.flags.writeable = False
    return intervals
