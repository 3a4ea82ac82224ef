"""Whether two position specs can name the same token, found out by trying."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from .terms import Terms, TokenId, Tokens

#: Prompts of up to so many tokens are tried; specs with larger numbers are taken to meet.
_LONGEST = 512


@functools.lru_cache(maxsize=1024)
def meet(one: Terms, last_one: str, other: Terms, last_other: str) -> bool:
    """Whether some prompt, answer and ids give both a common token; True where trying would take too long.

    last_one, last_other: what their l positions count back from, "length" or "length-1".
    """
    pairs = list(itertools.product(one.added, other.added))
    if not any((a.in_prompt and b.in_prompt) or (a.generated and b.generated) for a, b in pairs):
        return False
    if last_one == last_other and (_within(one, other) or _within(other, one)):
        return False
    terms = [*one.added, *one.removed, *other.added, *other.removed]
    # Beyond the sum of its numbers and two periods, a longer prompt (or answer) shows nothing new: the ends
    # are further apart than any term reaches, and the phases of the steps against each other have all come.
    numbers = max((n for term in terms for n in term.numbers), default=0)
    period = math.lcm(*(abs(term.step) for term in terms))
    longest = 2 * numbers + 2 * period + 2
    if longest > _LONGEST:
        return True
    ids = {i for term in terms if isinstance(term, TokenId) for i in term.ids}
    # A token has one id, so each may be tried on all tokens at once; -1 stands for every other id.
    length = np.arange(longest + 1)[:, None, None]
    index = np.arange(2 * longest + 1)[None, :, None]
    ids_tried = np.array([-1, *sorted(ids)])
    found = np.ones(np.broadcast_shapes(length.shape, index.shape, ids_tried.shape), dtype=bool)
    for spec, last in ((one, last_one), (other, last_other)):
        end = np.maximum(length - (last == "length-1"), 0)
        found &= spec.meant(Tokens(index, length, end, ids_tried))
    return bool(found.any())


def _within(one: Terms, other: Terms) -> bool:
    """Whether `other` takes away all that `one` names."""
    return set(one.added) <= set(other.removed)
