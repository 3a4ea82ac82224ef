"""The grammar of position specs, and the only parser of it.

    spec  = term { "+" term } { "-" term }
    term  = "all" | "f" count | "l" count | over [ "[" index | slice "]" ] | "token(" id { "," id } ")"
    over  = "prompt" | "generated"
    slice = [ index ] ":" [ index ] [ ":" [ step ] ]

Blanks may stand between all of these but inside "f3" and numbers.
"""

from __future__ import annotations

import re
from typing import NoReturn

from .terms import Affix, Everything, Slice, Term, Terms, TokenId

ALLOWED = (
    'a spec such as "f3+l3", "all", "prompt[2:-1]", "generated[::16]" or "token(198)", a union of such with '
    "+, or a list of indices"
)

_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"-?\d+")
_LARGEST = 2**31 - 1
_TERMS = 'a term: f or l with a count, "all", "prompt", "generated" or "token(…)"'


def parse(text: str) -> Terms:
    """Raises ValueError whose last two lines are the spec and a caret under what is wrong in it."""
    return _Reader(text).spec()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, at: int, why: str) -> NoReturn:
        shown = self.text.translate({ord(c): " " for c in "\t\n\r"})
        raise ValueError(f"positions: must be {ALLOWED}; was {self.text!r}\n  {shown}\n  {' ' * at}^ {why}")

    # Pieces ----------------------------------------------------------------------------------------------

    def blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, piece: str) -> bool:
        """Steps over `piece` if it comes next."""
        self.blanks()
        found = self.text.startswith(piece, self.at)
        self.at += len(piece) if found else 0
        return found

    def need(self, *pieces: str) -> str:
        for piece in pieces:
            if self.take(piece):
                return piece
        self.fail(self.at, f"expected {' or '.join(map(repr, pieces))}")

    def number(self) -> int | None:
        """The integer that comes next, or None."""
        self.blanks()
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            return None
        value = int(match[0])
        if abs(value) > _LARGEST:
            self.fail(self.at, f"expected a number up to {_LARGEST}")
        self.at = match.end()
        return value

    # Rules -----------------------------------------------------------------------------------------------

    def spec(self) -> Terms:
        added, removed = [self.term()], []
        while self.take("+"):
            added.append(self.term())
        while self.take("-"):
            removed.append(self.term())
        self.blanks()
        if self.at < len(self.text):
            if removed and self.text[self.at] == "+":
                self.fail(self.at, "expected no more terms to add: what is taken away with - stands last")
            self.fail(self.at, "expected +, - or the end" if not removed else "expected - or the end")
        return Terms(tuple(dict.fromkeys(added)), tuple(dict.fromkeys(removed)))

    def term(self) -> Term:
        self.blanks()
        at = self.at
        match = _WORD.match(self.text, at)
        word = match[0] if match else ""
        self.at += len(word)
        if word == "all":
            return Everything()
        if word in ("f", "l"):
            return Affix(word, self.count())  # type: ignore[arg-type]
        if word in ("prompt", "generated"):
            return self.over(word)
        if word == "token":
            return self.token()
        self.fail(at, f"expected {_TERMS}")

    def count(self) -> int:
        at = self.at
        value = self.number() if at < len(self.text) and self.text[at].isdigit() else None
        if value is None or value < 1:
            self.fail(at, "expected a count of at least 1")
        return value

    def token(self) -> TokenId:
        self.need("(")
        ids: list[int] = []
        while True:
            self.blanks()
            at = self.at
            value = self.number()
            if value is None or value < 0:
                self.fail(at, "expected a token's id, from 0 up")
            ids.append(value)
            if self.need(",", ")") == ")":
                return TokenId(tuple(sorted(set(ids))))

    def over(self, word: str) -> Slice:
        if not self.take("["):
            return Slice(word)  # type: ignore[arg-type]
        known = word == "prompt"
        start = self.bound(known)
        if start is not None and self.take("]"):
            return Slice(word, only=start)  # type: ignore[arg-type]
        if not self.take(":"):
            self.fail(self.at, "expected an index or a slice" if start is None else "expected ':' or ']'")
        stop = self.bound(known)
        step = None
        if self.take(":"):
            self.blanks()
            at = self.at
            step = self.number()
            if step == 0:
                self.fail(at, "expected a step other than 0")
            if step is not None and step < 0 and not known:
                self.fail(at, "expected a step of at least 1: the last generated token is not known yet")
        elif not self.text.startswith("]", self.at):
            self.fail(self.at, "expected ':' or ']'")
        self.need("]")
        step = 1 if step is None else step
        # As short as it can be said, so that equal slices compare equal.
        return Slice(word, None if start == 0 and step > 0 else start, stop, step)  # type: ignore[arg-type]

    def bound(self, known: bool) -> int | None:
        """An index, counted from the end if negative, which takes a known end."""
        self.blanks()
        at = self.at
        value = self.number()
        if value is not None and value < 0 and not known:
            self.fail(at, "expected an index from 0 up: how many tokens will be generated is not known yet")
        return value
