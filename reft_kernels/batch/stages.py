"""What a site does to its hidden states, step by step: a stage is one op over the rows of a plan.

Nearly every site has one stage, of the low-rank form. A site at which adapters of several forms edit has one
for each of them, in the order of `FORMS`, and the stages share the plan's rows and tiles: in the table of
each (spans) only those segments have a rank that edit in its form.

To add another kind of stage:

1. A type of fold, with a `form`, `rank`, `width`, `times` and `meeting` as `Fold` and `ScaleFold` have them,
   and a pool of it. A stage that takes no parameters has a pool of rows [P, 0]; a span (row, 1) says that a
   segment takes part.
2. The op, in place and differentiable, with the arguments (h, *pool rows, rows, tiles, spans[, offsets]), and
   an entry in `FORMS` here. Its place there is its turn at a site. `AdapterStore` then lays what folds to it,
   tables and workspaces list it, and compiled steps run it.
3. What must see h as it came is asked in `edit.apply_` and its differentiable twin before their loops over
   the stages.

A norm that is kept stands around the stages: it is read before the first, and restored behind the last. What
says so is a table of spans as a stage has one, numbered by the store as the form `KEEP_NORM`. It has no pool
and is no `Stage`.

Adapters that follow one another have stages of their own turn, `StageKey.turn`, which name the same ranges of
the same pools. A norm is kept in each turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..plan import pack_spans
from ..pool import Fold, Pool, Span
from ..scale_pool import AnyFold, ScaleFold, ScalePool

if TYPE_CHECKING:
    from ..adapter import Drawn, Intervention

#: What a segment does at a site: interventions, each times a number. Several add up, each of the unedited h.
Edits = tuple[tuple["Intervention", float], ...]


class SiteKey(NamedTuple):
    """Where an edit happens in a model. head: None, or the index of an attention head."""

    site: str
    layer: int
    head: int | None = None

    @classmethod
    def of(cls, intervention: Intervention) -> SiteKey:
        return cls(intervention.site, intervention.layer, intervention.head)


class StageKey(NamedTuple):
    """A stage of a site. form: a name of `FORMS`, or `KEEP_NORM`. turn: 0, or of adapters that edit behind
    others the number of those."""

    site: SiteKey
    form: str
    turn: int = 0

    @classmethod
    def of(cls, intervention: Intervention) -> StageKey:
        return cls(SiteKey.of(intervention), intervention.form)


class Form(NamedTuple):
    """A kind of edit: what it folds to, where folds lie, and what applies them.

    edit_, edit: the op in place, and differentiable, by backend. training: it in place, differentiable.
    wide: whether its pools are float32 at least, whatever the hidden states are.
    """

    fold: type[Any]
    pool: type[Pool]
    edit_: Mapping[str, Any]
    edit: Mapping[str, Any]
    training: Any
    wide: bool = False


#: By name, in the order in which a site's stages run. Others keep the names: copies of a model have no copies
#: of these.
FORMS: dict[str, Form] = {
    Fold.form: Form(Fold, Pool, ops.INTERVENE_, ops.INTERVENE, ops.InterveneInPlace),
    ScaleFold.form: Form(
        ScaleFold, ScalePool, ops.SCALE_SHIFT_, ops.SCALE_SHIFT, ops.ScaleShiftInPlace, wide=True
    ),
}
LOW_RANK = Fold.form

#: What stands in a `StageKey` for rows that get the norm back that they had before a site's stages. A span
#: (0, 1) says that a segment's do.
KEEP_NORM = "keep_norm"
_ORDER = (*FORMS, KEEP_NORM)


def in_turn(key: StageKey) -> tuple[int, int]:
    """Sorts the stages of a site."""
    return key.turn, _ORDER.index(key.form)


def stages_of(intervention: Intervention) -> tuple[StageKey, ...]:
    """Where an intervention takes part: in the stage of its fold's form, and in the norm that it keeps."""
    key = StageKey.of(intervention)
    return (key, key._replace(form=KEEP_NORM)) if intervention.keeps_norm else (key,)


class Stage:
    """A form's part of a site under one set of segments.

    form: its name. pool: where the interventions lie. spans: each segment's range there, [S, 2] int32 on the
    pool's device.
    """

    __slots__ = ("_edits", "_live", "_who", "form", "pool", "spans")

    def __init__(self, form: str, pool: Pool, spans: Tensor, who: Callable[[], list[Edits]]) -> None:
        self.form, self.pool, self.spans = form, pool, spans
        self._who = who
        self._edits: list[Edits] | None = None
        self._live: tuple[Tensor, dict[str, Tensor]] | None = None

    @property
    def edits(self) -> list[Edits]:
        """What each segment does here. (Training asks; inference does not.)"""
        if self._edits is None:
            self._edits = self._who()
        return self._edits

    def live_pool(
        self,
        shared: Mapping[Intervention, AnyFold],
        drawn: Drawn,
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Pool rows of this stage's interventions alone, in segment order, that autograd sees through, and
        the spans [S, 2] into them.

        shared: folds that were made already. drawn: the forward's random numbers, for the others. dtype: of
        all that is floating.
        """
        meeting = FORMS[self.form].fold.meeting
        by_segment = [
            meeting(
                [(shared.get(one) or one.fold(drawn=drawn.get(one))).times(scale) for one, scale in edits]
            )
            for edits in self.edits
        ]
        folds = [fold for mine in by_segment for fold in mine]
        if self._live is None:
            ranks = [sum(fold.rank for fold in mine) for mine in by_segment]
            firsts = itertools.accumulate(ranks, initial=0)
            table = pack_spans([Span(first, rank) for first, rank in zip(firsts, ranks)], device)
            fixed = [name for name in folds[0]._fields if not getattr(folds[0], name).is_floating_point()]
            codes = {name: torch.cat([getattr(fold, name) for fold in folds]) for name in fixed}
            self._live = (table, {name: code.to(device) for name, code in codes.items()})
        spans, constants = self._live
        rows = []
        for name in folds[0]._fields:
            part = constants.get(name)
            if part is None:
                parts = [getattr(fold, name) for fold in folds]
                part = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(device, dtype)
            rows.append(part)
        return tuple(rows), spans
