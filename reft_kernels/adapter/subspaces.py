"""Subspaces of an adapter by name: some of its r rows, edited and trained alone.

Wu et al. 2024 (arXiv 2404.03592) compose them: with the rows S of R, W and b, LoReFT is
h + R[S]ᵀ(W[S] h + b[S] − R[S] h). In the one form that is some rows of D, U and c. Where a named subspace's
rows lie side by side in the fold, it is a shorter range of the pool, and costs no room of its own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..pool import Fold
from ..scale_pool import AnyFold
from .compose import with_rows
from .config import SUBSPACE_MARK, check_named_rows
from .intervention import Drawn, Intervention

if TYPE_CHECKING:
    from .adapter import Adapter
    from .config import ReftConfig


def row_order(subspaces: Mapping[str, Sequence[int]], rank: int) -> list[int]:
    """All rows, in an order in which subspaces that share no row lie side by side; some of the others do."""
    order = dict.fromkeys(row for rows in subspaces.values() for row in rows)
    return list(order | dict.fromkeys(range(rank)))


class SubspacePart:
    """What an intervention does with some of its rows. Batches take it as they take an `Intervention`.

    Attributes:
        whole: the intervention. places: of the rows in the whole's order of rows.
        stretch: (first, number) of the whole's fold's rows; None where they don't lie side by side.
    """

    def __init__(self, whole: Intervention, rows: Sequence[int], order: Sequence[int]) -> None:
        self.whole, self.rows = whole, tuple(rows)
        self.site, self.layer, self.head, self.group = whole.site, whole.layer, whole.head, whole.group
        self.positions, self.dropout, self.width = whole.positions, whole.dropout, whole.width
        self.method, self.form, self.keeps_norm = whole.method, whole.form, whole.keeps_norm
        times = whole.pool_rows // whole.rank  # rows of the fold to a row
        self.pool_rows = times * len(rows)
        places = sorted(order.index(row) for row in rows)
        together = places[-1] - places[0] + 1 == len(places)
        self.stretch = (times * places[0], self.pool_rows) if together else None
        self._index = [times * place + one for place in places for one in range(times)]

    @property
    def wants_grad(self) -> bool:
        """Whether a parameter requires a gradient."""
        return self.whole.wants_grad

    def draw(self) -> dict[str, Tensor]:
        """As `Intervention.draw`."""
        return self.whole.draw()

    def fold(
        self, orthonormal: Mapping[str, Tensor] | None = None, drawn: Mapping[str, Tensor] | None = None
    ) -> Fold:
        """The rows of the whole's fold, as `Intervention.fold` makes it. No gradient comes to the parameters'
        other rows through it."""
        if orthonormal is None:
            orthonormal = self.whole.orthonormal_of(self.rows)
        return self.of(self.whole.fold(orthonormal, drawn))

    def of(self, fold: AnyFold) -> Fold:
        """These rows of a fold of the whole."""
        assert isinstance(fold, Fold)  # of elementwise edits no row is an edit by itself
        if self.stretch is not None:
            first, number = self.stretch
            return Fold(*(tensor[first : first + number] for tensor in fold))
        index = torch.tensor(self._index, device=fold.up.device)
        return Fold(*(tensor.index_select(0, index) for tensor in fold))


class Subspace:
    """One of an adapter's subspaces, on the adapter's own parameters. Batches take it as an `Adapter`.

    Attributes:
        adapter: that it is of. owner: what a model calls that. rows: which of its r.
        interventions: one for each of the adapter's.
        together: whether each one's rows lie side by side in the adapter's fold.
    """

    def __init__(self, adapter: Adapter, name: str, owner: str = "") -> None:
        self.adapter, self.name, self.owner, self.rows = adapter, name, owner, adapter.subspaces[name]
        order = row_order(adapter.subspaces, adapter.interventions[0].rank)
        self.interventions = [SubspacePart(one, self.rows, order) for one in adapter.interventions]
        self.together = all(one.stretch is not None for one in self.interventions)
        self.groups, self.overlapping, self.width = adapter.groups, adapter.overlapping, adapter.width
        self.n_layers, self.saved_modules = adapter.n_layers, adapter.saved_modules

    @property
    def trainable(self) -> bool:
        """Whether the adapter trains."""
        return self.adapter.trainable

    @property
    def training(self) -> bool:
        """Whether the adapter is in training mode."""
        return self.adapter.training

    @property
    def has_copies(self) -> bool:
        """Whether the adapter's `saved_modules` met a model."""
        return self.adapter.has_copies

    def check_scale(self, scale: float, argument: str = "scale") -> None:
        """As `Adapter.check_scale`."""
        self.adapter.check_scale(scale, argument)

    def folds(self, drawn: Drawn | None = None) -> list[Fold]:
        """As `Adapter.folds`."""
        whole = self.adapter.folds(drawn, self.rows)
        return [one.of(fold) for one, fold in zip(self.interventions, whole)]

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Saves these rows as an adapter of their own."""
        self.adapter.select_subspace(self.rows).save_pretrained(path)


class Subspaces:
    """What an `Adapter` has of subspaces."""

    interventions: Sequence[Intervention]
    config: ReftConfig | None
    on_trainable: Any
    _subspaces: Mapping[str, tuple[int, ...]]

    @property
    def subspaces(self) -> Mapping[str, tuple[int, ...]]:
        """Rows by name, such as {"happy": (0, 1)}; saved with the adapter. Calls of a model take
        "adapter/happy" for an adapter's name.

        Setting it replaces them all, before the adapter is added to a model. Raises ValueError for rows that
        there are not, and for methods of which a row is no edit by itself.
        """
        return MappingProxyType(self._subspaces)

    @subspaces.setter
    def subspaces(self, given: Mapping[str, Sequence[int]]) -> None:
        if self.on_trainable is not None:
            raise ValueError("subspaces: are laid down; name them before the adapter is added to a model")
        ranks = {one.rank for one in self.interventions}
        checked = check_named_rows(given, min(ranks))
        order = row_order(checked, min(ranks)) if checked else None
        if checked:
            if len(ranks) > 1:
                raise ValueError(f"subspaces: the interventions have several ranks, {sorted(ranks)}")
            for one in self.interventions:
                one.check_rows_apart()
        for one in self.interventions:
            one.lay_rows(order)
        self._subspaces = checked
        if self.config is not None and self.config.subspaces != (checked or None):
            self.config = dataclasses.replace(self.config, subspaces=checked or None)

    def named_subspaces(self, owner: str) -> dict[str, Subspace]:
        """All of them, by the names that calls have for them where the adapter is called `owner`."""
        mine: Any = self
        return {f"{owner}{SUBSPACE_MARK}{name}": Subspace(mine, name, owner) for name in self._subspaces}

    def why_unknown(self, name: str, owner: str) -> str | None:
        """What is wrong with a name that nobody has, if it is that of a subspace of the adapter `owner`."""
        begin = f"{owner}{SUBSPACE_MARK}"
        asked = name.removeprefix(begin)
        if not name.startswith(begin) or asked in self._subspaces:
            return None
        return f"adapter {owner!r} {self._lacks(asked)}"

    def _lacks(self, name: str) -> str:
        known = ", ".join(map(repr, self._subspaces)) or "none (ReftConfig(subspaces=...) names them)"
        return f"has no subspace {name!r}; it has {known}"

    def subspace(self, name: str) -> Subspace:
        """A subspace by its name. Raises ValueError that lists those there are."""
        if name not in self._subspaces:
            raise ValueError(f"subspace: the adapter {self._lacks(name)}")
        mine: Any = self
        return Subspace(mine, name)

    def select_subspace(self, rows: Sequence[int] | str) -> Adapter:
        """An adapter that keeps only the given of the r rows of D, U and c, in that order.

        For LoReFT this is R[rows], W[rows], b[rows]; for a "folded" adapter, rows of the fold. The tensors
        are copies, and the result is not trainable. rows: numbers, or a subspace's name.

        Raises:
            ValueError: rows that are empty, named twice, or that an intervention lacks.
        """
        chosen = self.subspace(rows).rows if isinstance(rows, str) else rows
        kept = with_rows(self.interventions, chosen)
        config = self.config and dataclasses.replace(self.config, r=kept[0].rank, subspaces=None)
        mine: Any = self
        return type(mine)(kept, config, mine.n_layers, mine.saved_modules.stored_copy(), mine.base)
