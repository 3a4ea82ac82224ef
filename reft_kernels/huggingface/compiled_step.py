"""The edits of a compiled decode step, on a `DecodeWorkspace` rather than on a plan.

What compiled code reads of an object it checks again before every step, on the host: each attribute costs
about as much as a line of Python. So a site reads its name and little else. What it does there is
known from that name and the layout's: the trace takes it as a constant, and the layout's name is checked
once for all sites.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..batch import DecodeWorkspace, SiteKey, edit
from ..batch.batch_plan import BatchPlan
from ..batch.stages import FORMS, KEEP_NORM, LOW_RANK

if TYPE_CHECKING:
    from .fused_norm import NextNorm
    from .sites import SiteForward


#: One site: of each of its stages the row of `spans`, index into `pools` and form; attention head or None;
#: the stretch (first, width) of the last dimension that it is, or None for all; whether its tensor must be
#: copied. A plain tuple, which a trace takes for a constant.
Where = tuple[tuple[tuple[int, int, str], ...], int | None, tuple[int, int] | None, bool]


class Work(NamedTuple):
    """What one module does in a step.

    norm: (eps, kind, index into `blanks`) of the norm that is fused with its output's edit.
    """

    inputs: tuple[Where, ...]
    outputs: tuple[Where, ...]
    norm: tuple[float, int, int] | None


#: Every layout that there was by its name, and the names by content: what comes again has its name again.
_layouts: dict[str, dict[str, Work]] = {}
_names: dict[tuple, str] = {}
_numbers = itertools.count()


def name_layout(layout: dict[str, Work]) -> str:
    """The name of a layout: what the stand-ins do, each by its own name."""
    content = tuple(layout.items())
    if content not in _names:
        name = str(next(_numbers))
        _layouts[name], _names[content] = layout, name
    return _names[content]


@torch.compiler.assume_constant_result
def _work(layout: str, site: str) -> tuple:
    return tuple(_layouts[layout][site])


def layout_of(sites: list[SiteForward], workspace: DecodeWorkspace) -> str:
    """Names what these stand-ins do in steps on a workspace."""

    def where(site: SiteForward, key: SiteKey) -> Where:
        place = site.places[key]
        part = None if place.first is None or place.width is None else (place.first, place.width)
        return (workspace.places[key], key.head, part, place.shared)

    layout = {}
    for site in sites:
        norm = site.norm
        fused = None
        if norm is not None and norm.stands(site.module.training):
            weight = norm.parameters["weight"]
            fused = norm.eps, norm.kind, workspace.blank(weight.dtype, weight.shape[0])
        inputs, outputs = (tuple(where(site, key) for key in keys) for keys in (site.inputs, site.outputs))
        layout[site.number] = Work(inputs, outputs, fused)
    return name_layout(layout)


def _is_low_rank(where: Where) -> bool:
    """Whether a site has one stage, of the form that is fused with norms."""
    return [form for _, _, form in where[0]] == [LOW_RANK]


def _expected(h: Tensor, where: Where, workspace: DecodeWorkspace) -> bool:
    """Whether hidden states are those that the site's pool and the workspace are for."""
    rows = workspace.rows.shape[0]
    return h.dtype is workspace.dtypes[where[0][0][1]] and h.numel() == rows * h.shape[-1]


def _edit(
    h: Tensor, where: Where, keys: tuple[SiteKey, ...], i: int, plan: BatchPlan, workspace: DecodeWorkspace
) -> Tensor:
    """The edit at one site. keys: read only where hidden states are not as expected."""
    stages, head, stretch, shared = where
    if shared:
        h = h.clone()
    if stretch is not None:
        first, length = stretch
        part = h.narrow(-1, first, length)
        edited = _edit(part, (stages, head, None, False), keys, i, plan, workspace)
        return h if edited is part else h.slice_scatter(edited, -1, first, first + length)
    if not _expected(h, where, workspace):
        return edit(h, keys[i], plan)
    rows, flat = workspace.rows, h
    width = workspace.pools[stages[0][1]].rows[0].shape[1]
    heads = h.shape[-1] // width
    if head is not None and heads > 1:
        flat = h.view(*h.shape[:-1], heads, width)
        rows = rows * heads + head
    norms = None
    for number, index, form in stages:
        if form == KEEP_NORM:  # read before the stages of its turn, and restored behind them
            keeping = (rows, workspace.tiles, workspace.spans[number])
            if norms is None:
                norms = ops.ROW_NORMS[workspace.backend](flat, *keeping)
            else:
                ops.RESTORE_NORMS_[workspace.backend](flat, norms, *keeping)
                norms = None
            continue
        op = FORMS[form].edit_[workspace.backend]
        op(flat, *workspace.pools[index].rows, rows, workspace.tiles, workspace.spans[number])
    return h


def _edit_and_norm(
    h: Tensor,
    outputs: tuple[Where, ...],
    norm: NextNorm,
    how: tuple[float, int, int],
    workspace: DecodeWorkspace,
) -> Tensor:
    """h's norm, after the edit of h where there is one."""
    eps, kind, blank = how
    if outputs:
        ((number, index, _),) = outputs[0][0]
        pool = workspace.pools[index].rows
        tiles, spans = workspace.tiles, workspace.spans[number]
    else:
        pool, spans = workspace.blanks[blank]
        tiles = workspace.unedited
    weight, shift = norm.parameters["weight"], norm.parameters.get("bias")
    return ops.INTERVENE_NORM_[workspace.backend](
        h, *pool, workspace.rows, tiles, spans, weight, shift, eps, kind
    )


def run_site(
    site: SiteForward, args: tuple, kwargs: dict[str, Any], plan: BatchPlan, workspace: DecodeWorkspace
) -> Any:
    """A module's call within a compiled decode step."""
    inputs, outputs, how = _work(workspace.layout, site.number)
    if inputs:
        name = None
        if not args:
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        h = args[0] if name is None else kwargs[name]
        for i, where in enumerate(inputs):
            h = _edit(h, where, site.inputs, i, plan, workspace)
        if name is None:
            args = (h, *args[1:])
        else:
            kwargs = {**kwargs, name: h}
    output = site.original(*args, **kwargs)
    if how is None and not outputs:
        return output
    h = output[0] if isinstance(output, tuple) else output
    if how is not None:
        norm = site.norm
        assert norm is not None
        if norm.fits(h) and len(outputs) < 2 and (not outputs or _expected(h, outputs[0], workspace)):
            if outputs and not _is_low_rank(outputs[0]):  # edited first, and then normed
                _edit(h, outputs[0], site.outputs, 0, plan, workspace)
                outputs = ()
            site.runtime.fused.offer(norm, h, _edit_and_norm(h, outputs, norm, how, workspace))
            return output
    edited = h
    for i, where in enumerate(outputs):
        edited = _edit(edited, where, site.outputs, i, plan, workspace)
    if edited is h:
        return output
    return (edited, *output[1:]) if isinstance(output, tuple) else edited
