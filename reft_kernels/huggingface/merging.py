"""Adapters merged into the weights of the projection that they stand behind or in front of.

An edit of every token that is linear in h, or constant, is a change of that projection: behind y = W x + b it
makes (I + Uᵀ D) W and (I + Uᵀ D) b + Uᵀ c of them, in front of it W (I + Uᵀ D) and b + W Uᵀ c. Of an
elementwise edit the matrix in brackets is diag(s), and what is added v. Which projection's output a site is,
is found out by running the model once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Intervention
from ..batch import SiteKey
from ..ops.reference import activate
from ..ops.schema import ACT_MASK, NO_PRODUCT, Act
from ..scale_pool import ScaleFold
from .describe import named_as_in_peft
from .projections import Bare, as_matrix, is_projection, projections_behind
from .sites import Sites

if TYPE_CHECKING:
    from ..batch import AdapterStore
    from ..pool import Fold
    from ..scale_pool import AnyFold
    from .runtime import Runtime

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_linear(fold: AnyFold) -> bool:
    """Whether an edit is linear in h, or constant: no activation acts on anything of h."""
    if isinstance(fold, ScaleFold):
        return True
    active = (fold.kind & ACT_MASK) != Act.NONE
    return not bool((active & ((fold.kind & NO_PRODUCT) == 0)).any())


def _constant(fold: Fold) -> Tensor:
    """c, of a linear fold: rows without a product may have an activation, which is taken here."""
    return activate(fold.bias, fold.kind)


class _Change(NamedTuple):
    """What an intervention does to a projection. before: whether it edits what goes into it, or what comes
    out; part: which elements of that."""

    module: Any  # a linear layer, as `is_projection` knows them
    fold: AnyFold
    before: bool
    part: slice
    what: str


class _Kept(NamedTuple):
    """A projection as it was."""

    weight: Tensor
    bias: Tensor | None


class Merging:
    """The adapters that are merged into a model's weights. What a projection holds follows from what it held
    at first and from who is merged, so they may be taken out in any order."""

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model, self.sites = model, sites
        self._kept: dict[nn.Module, _Kept] = {}
        self._merged: dict[str, list[_Change]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the merged adapters, in the order in which they were merged."""
        return tuple(self._merged)

    @torch.no_grad()
    def merge(self, name: str, adapter: Adapter, bare: Bare) -> None:
        """Merges an adapter.

        bare: makes a context in which the model runs without adapters.

        Raises ValueError that says why it can't be; nothing is written then.
        """
        changes = self._changes(adapter, bare)
        self._write({**self._merged, name: changes}, {change.module for change in changes})
        self._merged[name] = changes

    @torch.no_grad()
    def unmerge(self, name: str) -> None:
        """Takes a merged adapter out. A projection with no other in it gets its own tensors back."""
        rest = {other: changes for other, changes in self._merged.items() if other != name}
        self._write(rest, {change.module for change in self._merged[name]})
        self._merged = rest
        busy = {change.module for changes in rest.values() for change in changes}
        self._kept = {module: kept for module, kept in self._kept.items() if module in busy}

    def _write(self, merged: dict[str, list[_Change]], modules: set[Any]) -> None:
        """Gives these projections what follows from those that are merged; all or nothing."""
        made: dict[Any, _Kept] = {}
        for module in modules:
            kept = self._kept.get(module) or _Kept(module.weight.data, _bias(module))
            self._kept[module] = kept
            mine = [change for changes in merged.values() for change in changes if change.module is module]
            try:
                made[module] = _changed(module, kept, mine) if mine else kept
            except ValueError:
                busy = {change.module for changes in self._merged.values() for change in changes}
                self._kept = {module: kept for module, kept in self._kept.items() if module in busy}
                raise
        for module, (weight, bias) in made.items():
            now = module.weight
            now.data = weight.to(now.device, now.dtype)
            if bias is None:
                module.bias = None
            elif module.bias is None:
                module.bias = nn.Parameter(bias.to(now.device, now.dtype), requires_grad=False)
            else:
                module.bias.data = bias.to(now.device, now.dtype)

    # What is changed -------------------------------------------------------------------------------------

    def _changes(self, adapter: Adapter, bare: Bare) -> list[_Change]:
        """Refuses what is not exact, and finds the projections."""
        if adapter.trainable:
            raise ValueError("adapter: is trainable, and would not train once merged; set trainable = False")
        if adapter.saved_modules:
            raise ValueError("adapter: has modules_to_save, which can't be merged")
        folds = adapter.folds()
        for one, fold in zip(adapter.interventions, folds):
            _check_exact(one, fold)
        where = [self.sites.at(SiteKey.of(one)) for one in adapter.interventions]
        behind = {at.module for at, before in where if not before and not is_projection(at.module)}
        found = projections_behind(self.model, behind, bare) if behind else {}
        changes = []
        for one, fold, (at, before) in zip(adapter.interventions, folds, where):
            what, module = f"{one.site} of layer {one.layer}", at.module
            if not is_projection(module):
                if before:
                    raise ValueError(
                        f"site: {what} goes into a {type(module).__name__}, and not into one linear layer"
                    )
                if module not in found:
                    raise ValueError(
                        f"site: {what} is not the output of one plain linear layer: something comes behind "
                        "it (a norm, a sum, a router), or it is quantised or wrapped"
                    )
                module = found[module]
            first = (one.head or 0) * one.width if at.first is None else at.first
            changes.append(_Change(module, fold, before, slice(first, first + one.width), what))
            self._check_weight(changes[-1], whole=at.first is None and one.head is None)
        return changes

    def _check_weight(self, change: _Change, whole: bool) -> None:
        module, what = change.module, change.what
        weight = module.weight
        if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS or type(weight.data) is not Tensor:
            raise ValueError(
                f"weight: the projection at {what} is quantised or wrapped: a {type(weight).__name__} of "
                f"{weight.dtype}"
            )
        if weight.device.type == "meta":
            raise ValueError(f"weight: the projection at {what} is offloaded, so it can't be changed")
        outputs, inputs = as_matrix(module, weight.data).shape
        size, stop = (inputs if change.before else outputs), change.part.stop
        if stop > size or (whole and stop < size):
            width = change.fold.width
            raise ValueError(f"width: {width} does not fit the projection at {what}, [{outputs}, {inputs}]")
        storage = weight.untyped_storage().data_ptr()
        named = self.model.named_parameters(remove_duplicate=False)
        names = [name for name, p in named if p.untyped_storage().data_ptr() == storage]
        if len(names) > 1:
            raise ValueError(
                f"weight: the projection at {what} is tied: {' and '.join(names)} are one tensor"
            )


def _check_exact(one: Intervention, fold: AnyFold) -> None:
    what = f"{one.method} at {one.site} of layer {one.layer}"
    if str(one.positions) != "all":
        raise ValueError(
            f"positions: {what} edits {str(one.positions)!r}; only edits of all tokens can be merged"
        )
    if one.keeps_norm:
        raise ValueError(f"options: {what} keeps the norm of each token, so weights can't hold it")
    if not is_linear(fold):
        raise ValueError(f"act_fn: {what} is not linear in h, so weights can't hold it")


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.data


def _changed(module: nn.Module, kept: _Kept, changes: list[_Change]) -> _Kept:
    """Weight and bias with the changes, summed in float32 at least and rounded once.

    Raises ValueError where the weight's dtype can't hold them.
    """
    dtype, device = kept.weight.dtype, kept.weight.device
    wide = torch.promote_types(dtype, torch.float32)
    weight = as_matrix(module, kept.weight).to(wide, copy=True)
    outputs = weight.shape[0]
    bias = torch.zeros(outputs, dtype=wide, device=device)
    if kept.bias is not None:
        bias += kept.bias
    for change in changes:
        fold, part = change.fold, change.part
        if isinstance(fold, ScaleFold):
            less, v = (t[0].to(device, wide) for t in fold)
            if change.before:
                bias = bias + weight[:, part] @ v
                weight[:, part] += weight[:, part] * less
            else:
                weight[part] += less[:, None] * weight[part]
                bias[part] += less * bias[part] + v
            continue
        down, up = (t.to(device, wide) for t in (fold.down, fold.up))
        c = _constant(fold).to(device, wide)
        # A row without a product leaves the weight alone, whatever it holds.
        product = (fold.kind & NO_PRODUCT).to(device) == 0
        d, u = down[product], up[product]
        if change.before:
            through = weight[:, part] @ up.mT
            bias = bias + through @ c
            weight[:, part] += through[:, product] @ d
        else:
            weight[part] += u.mT @ (d @ weight[part])
            bias[part] += u.mT @ (d @ bias[part]) + up.mT @ c
    rounded = _Kept(as_matrix(module, weight).to(dtype).contiguous(), bias.to(dtype))
    for name, tensor in (("weight", rounded.weight), ("bias", rounded.bias)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name}: of the projection at {changes[-1].what} would hold NaN or Inf in {dtype}"
            )
    keeps_none = kept.bias is None and not bool(bias.any())
    return rounded._replace(bias=None) if keeps_none else rounded


class Merges:
    """What `Reft` has of merging."""

    _merging: Merging
    _runtime: Runtime
    _was_active: str | None

    @property
    def _store(self) -> AdapterStore:
        return self._runtime.store

    @named_as_in_peft
    def merge_adapter(self, name: str | None = None) -> None:
        """Lays an adapter (the active one by default) into the model's weights: every row has it, at no cost.

        That is exact, up to one rounding to the weights' dtype, for edits of all tokens that are linear in h
        or constant, behind one plain linear layer (mlp_output and attention_output of most families) or in
        front of one (head_attention_value_output). A layer without a bias gets one where the edit has one.
        The tensors before are kept until `unmerge_adapter`. A merged adapter is named in no call; others work
        on top of it. What the model's own save_pretrained writes holds it; a family whose config knows no
        bias there (Llama's mlp_bias and attention_bias) needs that set to load it again.

        Raises ValueError, before anything is written, that says why an adapter can't be merged: positions,
        an activation, a site that is no linear layer's output, quantised, offloaded or tied weights, values
        that the weights' dtype can't hold, a trainable adapter.
        """
        name = self._runtime.active if name is None else name
        if name is None:
            raise ValueError("name: no adapter is active; say which to merge")
        adapter = self._known(name)  # type: ignore[attr-defined]
        if name in self._store.merged:
            raise ValueError(f"name: {name!r} is merged already")
        with self._runtime.lock:
            self._merging.merge(name, adapter, self.disable_adapter)  # type: ignore[attr-defined]
            self._store.merged.add(name)
            active = self._runtime.active
            if active is not None and self._store.owner(active) == name:
                self._was_active, self._runtime.active = active, None
            self._runtime.forget_compiled()

    @named_as_in_peft
    def unmerge_adapter(self, name: str | None = None) -> None:
        """Takes a merged adapter (all of them by default) out of the weights, which are bit for bit what they
        were. One that was active when it was merged is active again, unless another is.

        What was written into merged weights meanwhile, as by load_state_dict, is lost. Raises ValueError for
        an adapter that is not merged.
        """
        if name is not None and name not in self._store.merged:
            raise ValueError(f"name: {name!r} is not merged; merged are {list(self._merging.names)}")
        with self._runtime.lock:
            for one in self._merging.names if name is None else (name,):
                self._merging.unmerge(one)
                self._store.merged.discard(one)
                before = self._was_active
                if before is not None and self._store.owner(before) == one:
                    self._runtime.active, self._was_active = self._runtime.active or before, None
            self._runtime.forget_compiled()
