"""What must stand in the key of a block of a prefix cache beside its tokens."""

from __future__ import annotations

import hashlib

import numpy as np

from ..batch import intervals_of
from .ticket import Ticket


class BlockKeys:
    """The keys of the blocks of one sequence.

    Keys and values of a token depend on every edit at or before it. So a block's key is the adapter's content
    and the edited positions before the block's end. Blocks before the first edited position are the bare
    model's, and shared with it. With "l" positions, a prompt of another length has other keys from the first
    position on at which the two differ.
    """

    def __init__(self, ticket: Ticket, prompt_length: int) -> None:
        self.content = ticket.key
        self.intervals = intervals_of(ticket.groups, prompt_length)
        self.first = int(self.intervals[:, 1].min()) if len(self.intervals) else None

    def until(self, end: int) -> str | None:
        """The key of a block whose last position is end − 1; None where nothing before `end` is edited."""
        if self.first is None or end <= self.first:
            return None
        inside = self.intervals[self.intervals[:, 1] < end]
        inside[:, 2] = np.minimum(inside[:, 2], end)
        return f"{self.content}@{hashlib.sha256(inside.tobytes()).hexdigest()[:32]}"
