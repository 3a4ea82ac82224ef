"""What is done to hidden states at a site: in place for inference, differentiably for training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..plan import Rows, to_device
from .batch_plan import BatchPlan
from .stages import FORMS, SiteKey
from .tables import Place, SiteTable, Turn


def site_of(h: Tensor, key: SiteKey, plan: BatchPlan) -> SiteTable | None:
    """What the plan does at a site, for hidden states h [..., d]; None if nothing.

    Raises RuntimeError where h has not the rows that the plan was made for.
    """
    site = plan.sites.get(key)
    if site is None:
        return None
    if h.numel() != plan.tokens * h.shape[-1]:
        raise RuntimeError(
            f"{key.site} of layer {key.layer}: hidden states of shape {list(h.shape)} came to a site "
            f"that was planned for {plan.tokens} tokens; was a block called without its model?"
        )
    place = site.place
    if h.dtype is not place.dtype or h.device != place.device:
        site = plan.move(key, Place(h.device, h.dtype))
    return site


def edit(h: Tensor, key: SiteKey, plan: BatchPlan, training: bool = False) -> Tensor:
    """Applies a prepared plan to h [..., d] at one site. Returns h itself where it was edited in place.

    training: whether an adapter's dropout applies.
    """
    site = site_of(h, key, plan)
    if site is None:
        return h
    width = site.pool.width
    heads = h.shape[-1] // width
    if key.head is not None and heads > 1:  # (or h is one head's part already)
        rows = plan.head_rows(site.slot, key.head, heads)
        flat = h.view(*h.shape[:-1], heads, width)
        out = _edit(flat, site, rows, plan, training)
        return h if out is flat else out.reshape(h.shape)
    return _edit(h, site, plan.rows[site.slot], plan, training)


def _edit(h: Tensor, site: SiteTable, rows: Rows, plan: BatchPlan, training: bool) -> Tensor:
    backend = plan.backends.get(h.device) or ops.current_backend(h.device)
    if torch.is_grad_enabled() and (h.requires_grad or plan.trains(site)):
        return _edit_differentiable(h, site, rows, plan, backend, training)
    if plan.stale:
        plan.renew()  # what was trained since the last look
    if site.low_rank:
        down, up, bias, kind = site.pool.rows  # by name: a star would cost more, at every site
        ops.INTERVENE_[backend](h, down, up, bias, kind, rows.rows, rows.tiles, site.spans)
    else:
        apply_(h, site, rows, backend)
    return h


def apply_(h: Tensor, site: SiteTable, rows: Rows, backend: str) -> None:
    """All stages of a site, in place; its pools are renewed."""
    for turn in site.turns:
        keeping = None if turn.norms is None else (rows.rows, rows.tiles, turn.norms)
        norms = None if keeping is None else ops.ROW_NORMS[backend](h, *keeping)
        for stage in turn.stages:
            FORMS[stage.form].edit_[backend](h, *stage.pool.rows, rows.rows, rows.tiles, stage.spans)
        if keeping is not None:
            ops.RESTORE_NORMS_[backend](h, norms, *keeping)


def _edit_differentiable(
    h: Tensor, site: SiteTable, rows: Rows, plan: BatchPlan, backend: str, training: bool
) -> Tensor:
    # Never the pool itself, not for frozen adapters either: it may be renewed or grown before backward runs.
    # Under reentrant checkpointing each block has a backward of its own, so folds can't be shared there.
    shared = {} if plan.recomputing else plan.folds
    dtype, out = torch.promote_types(h.dtype, torch.float32), h
    for turn in site.turns:
        keeping = None if turn.norms is None else (rows.rows, rows.tiles, turn.norms)
        norms = None if keeping is None else ops.ROW_NORMS[backend](out, *keeping)
        for stage in turn.stages:
            form = FORMS[stage.form]
            live, spans = stage.live_pool(shared, plan.drawn, site.place.device, dtype)
            arguments = (out, *live, rows.rows, rows.tiles, spans, rows.offsets)
            out = (form.edit[backend] if _apart(out) else _in_place(form.training, backend))(*arguments)
        if keeping is not None:
            apart = _apart(out)
            restore = ops.RESTORE_NORMS[backend] if apart else _in_place(ops.RestoreNormsInPlace, backend)
            out = restore(out, norms, *keeping)
        if training:
            out = _dropout(out, turn, rows, plan)
    return out


def _apart(h: Tensor) -> bool:
    """Whether an edit that autograd sees must leave h alone.

    A view can't be edited in place under reentrant checkpointing, nor a leaf that wants a gradient at all; a
    compiler makes its own choice of buffers.
    """
    return h._is_view() or (h.is_leaf and h.requires_grad) or torch.compiler.is_compiling()


def _in_place(function: Any, backend: str) -> Callable[..., Tensor]:
    """A `torch.autograd.Function` that edits its first argument, on a backend."""
    return lambda *arguments: function.apply(*arguments, backend)


def _dropout(out: Tensor, turn: Turn, rows: Rows, plan: BatchPlan) -> Tensor:
    """pyreft's dropout: it falls on the whole edited hidden state of the rows that an adapter edits."""
    # Of several adapters at a token each drops what the others left.
    by_segment = zip(*(stage.edits for stage in turn.stages))
    rates = [1 - math.prod(1 - one.dropout for edits in stages for one, _ in edits) for stages in by_segment]
    if not any(rates):
        return out
    counts = plan.by_segment.counts
    of_rows = np.repeat(np.array(rates, dtype=np.float32), counts)
    # Of a row that several segments name (in turns of their own) one alone has a rate here.
    places = np.flatnonzero(of_rows)
    keep = 1 - to_device(of_rows[places], out.device)[:, None]
    flat = out.reshape(-1, out.shape[-1])
    index = rows.rows.index_select(0, to_device(places, out.device)).long()
    mask = (torch.rand(len(index), flat.shape[1], device=out.device) < keep) / keep
    return flat.index_copy(0, index, flat[index] * mask.to(flat.dtype)).view(out.shape)
