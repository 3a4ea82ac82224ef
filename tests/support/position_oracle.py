"""Position specs by other means: Python's own slicing of two lists."""

from __future__ import annotations

import re

_TERM = re.compile(r"([+-]?)\s*(\w+(?:\s*\[[^\]]*\]|\s*\([^)]*\))?)\s*")


def edited(
    spec: str | list[int],
    prompt: int,
    total: int,
    ids: list[int] | None = None,
    last_position: str = "length",
) -> list[int]:
    """Token indices that a spec names in a row of `total` tokens, `prompt` of them prompt."""
    lists = {"prompt": list(range(prompt)), "generated": list(range(prompt, total))}
    if not isinstance(spec, str):
        return sorted(lists["prompt"][i] for i in spec)
    end = max(prompt - (last_position == "length-1"), 0)
    found: set[int] = set()
    for sign, term in _TERM.findall(spec.replace(" ", "")):
        word, brackets = re.fullmatch(r"(\w+?)(\d*|\[.*\]|\(.*\))", term).groups()
        if word == "all":
            named = set(range(total))
        elif word in ("f", "l"):
            count = min(int(brackets), end // 2)
            named = set(range(count) if word == "f" else range(end - count, end))
        elif word == "token":
            wanted = {int(number) for number in brackets.strip("()").split(",")}
            named = {place for place in range(total) if ids[place] in wanted}
        else:
            items = lists[word]
            try:
                part = eval(f"items{brackets}", {"items": items})
            except IndexError:
                part = []  # a single index beyond the tokens
            named = {part} if isinstance(part, int) else set(part)
        found = found - named if sign == "-" else found | named
    return sorted(found)
