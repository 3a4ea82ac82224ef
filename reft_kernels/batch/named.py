"""What calls may name: adapters, and subspaces of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from .names import BASE, unknown

if TYPE_CHECKING:
    from ..adapter import Adapter, Subspace


class Names:
    """Adapters and their subspaces by name.

    Attributes:
        adapters: name → Adapter.
        subspaces: "adapter/subspace" → `Subspace`.
    """

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.subspaces: dict[str, Subspace] = {}

    def find(self, name: str) -> Adapter:
        """The adapter, or the subspace, of that name. Raises KeyError."""
        found = self.adapters.get(name)
        return cast("Adapter", self.subspaces[name]) if found is None else found

    def unknown(self, name: str) -> str:
        """What is said of a name that nobody has."""
        for owner, adapter in self.adapters.items():
            why = adapter.why_unknown(name, owner)
            if why is not None:
                return why
        return unknown(name, [*self.adapters, *self.subspaces, BASE], "known are")

    def check_name(self, name: str, adapter: Adapter) -> None:
        """Raises ValueError where an adapter's name, or that of a subspace of its, is taken."""
        if name in self.adapters:
            raise ValueError(f"name: there is an adapter {name!r} already; delete it first")
        if name in self.subspaces:
            raise ValueError(f"name: {name!r} is a subspace of {self.subspaces[name].owner!r}")
        for whole in adapter.named_subspaces(name):
            if whole in self.adapters or whole in self.subspaces:
                raise ValueError(f"name: its subspace would be called {whole!r}, as an adapter is already")

    def subspaces_of(self, name: str) -> list[str]:
        """The names of an adapter's subspaces."""
        return [known for known, one in self.subspaces.items() if one.owner == name]

    def owner(self, name: str) -> str:
        """The name of the adapter that a name is of."""
        return self.subspaces[name].owner if name in self.subspaces else name

    def lies_apart(self, name: str) -> bool:
        """Whether it is a subspace whose rows don't lie side by side in its adapter."""
        return name in self.subspaces and not self.subspaces[name].together
