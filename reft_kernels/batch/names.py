"""The arguments that say which adapters a batch takes, and what is said of a wrong adapter's name."""

from __future__ import annotations

import difflib
from collections.abc import Collection

#: Arguments with one adapter's name a row. The first wins: under PEFT the second is PEFT's own.
NAMES = ("reft_adapter_names", "adapter_names")
#: The name of the bare model in a list of adapter names, as in PEFT.
BASE = "__base__"
#: The argument with the length of each row's prompt.
LENGTHS = "prompt_lengths"
#: The argument with the tokens that each row's adapter edits, in place of the adapter's own positions.
POSITIONS = "reft_positions"
#: The argument with what the edits are multiplied by. The first wins: the second may be the model's own.
SCALES = ("reft_scale", "scale")
SCALE = SCALES[1]

#: So many adapters are named one by one; of the others there is a count.
LISTED = 10


def unknown(name: object, known: Collection[str], what: str) -> str:
    """Says that there is no adapter of that name, and which there are: all, or the closest of many.

    what: how they are called, as in "loaded are".
    """
    begin = f"there is no adapter {name!r}; {what} "
    if len(known) <= LISTED:
        return begin + (", ".join(map(repr, known)) or "none")
    close = difflib.get_close_matches(name, known, n=3) if isinstance(name, str) else []
    nearest = f", the closest {', '.join(map(repr, close))}" if close else ""
    return f"{begin}{len(known)}{nearest}"
