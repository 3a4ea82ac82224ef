"""`Residents`: which adapters lie in device memory, and which goes when room is needed."""

from __future__ import annotations

import collections


class NoRoom(RuntimeError):
    """All places are taken by adapters in use."""


class Residents:
    """Keys in at most `places` places, least recently used out, never one in use.

    >>> residents = Residents(2)
    >>> residents.take("a"), residents.take("b")
    ([], [])
    >>> residents.give_back("a")
    >>> residents.take("c")  # what went out for it
    ['a']
    """

    def __init__(self, places: int) -> None:
        self.places = places
        #: Users of each key, least recently used first.
        self._users: collections.OrderedDict[str, int] = collections.OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._users

    def __len__(self) -> int:
        return len(self._users)

    @property
    def idle(self) -> list[str]:
        """Those that nobody uses, least recently used first."""
        return [key for key, users in self._users.items() if not users]

    def take(self, key: str) -> list[str]:
        """One more user of a key. Returns the keys that go out for it. Raises NoRoom."""
        if key in self._users:
            self._users[key] += 1
            self._users.move_to_end(key)
            return []
        gone: list[str] = []
        if len(self._users) >= self.places:
            idle = self.idle
            if not idle:
                raise NoRoom(f"all {self.places} adapters in device memory are in use")
            gone = idle[:1]
            self.drop(gone[0])
        self._users[key] = 1
        return gone

    def give_back(self, key: str) -> None:
        """One user less. The key stays until its place is needed."""
        self._users[key] -= 1
        self._users.move_to_end(key)

    def drop(self, key: str) -> None:
        """Forgets a key that nobody uses."""
        if self._users[key]:
            raise RuntimeError(f"{key} is in use")
        del self._users[key]
