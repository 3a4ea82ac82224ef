"""The sites of a patched model: modules whose input or output is edited."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import BatchPlan, DecodeWorkspace, SiteKey, edit
from ..batch.edit import site_of
from ..batch.tables import numbers_of
from ..ops import launch
from ..sites import has_layers, is_path
from .compiled_step import layout_of, run_site
from .fused_norm import NextNorm, NormForward, edit_and_norm
from .locate import Location, Locator
from .runtime import Runtime
from .standin import StandIn

#: In place of a site's number.
NO_SITE, SEVERAL = -1, -2


class SiteForward(StandIn):
    """Edits what goes into a module and what comes out of it. Idle, it is one check.

    inputs, outputs: sites at this module (each head of attention is one).
    places: where each of them is, and whether its tensor is one of its own.
    norm: the norm that takes a block's output, where it is fused with the edit.
    index: for the short way (python_bindings/standin.cpp, which reads it and calls `after`): the number of
        the one site, or NO_SITE, or SEVERAL where a call takes more than one edit of the whole output.
    quick: the one site, where it is the whole output and may be edited in place with gradients, too.
    number: its name among the model's stand-ins, a number.
    """

    def __init__(self, module: nn.Module, runtime: Runtime) -> None:
        super().__init__(module)
        self.runtime = runtime
        self.inputs: tuple[SiteKey, ...] = ()
        self.outputs: tuple[SiteKey, ...] = ()
        self.places: dict[SiteKey, Location] = {}
        self.norm: NextNorm | None = None
        self.number = ""
        self.index = NO_SITE
        self.quick: SiteKey | None = None

    def use(self, inputs: tuple[SiteKey, ...], outputs: tuple[SiteKey, ...]) -> None:
        """Edits at these sites from now on."""
        self.inputs, self.outputs = inputs, outputs
        one = outputs[0] if len(outputs) == 1 and self._simple(outputs[0]) else None
        if inputs or (outputs and one is None):
            self.index = SEVERAL
        else:
            self.index = NO_SITE if one is None else numbers_of(self.runtime.store.places)[one]
        launch.bind_anew(self)
        self.quick = one if one is not None and has_layers(one.site) and not self.places[one].kept else None

    def _simple(self, key: SiteKey) -> bool:
        """Whether a site is the whole of an output that is the module's own."""
        place = self.places[key]
        whole = key.head is None and place.first is None
        return whole and not place.shared and key not in self.runtime.unseen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.runtime.plan
        if plan is None:
            return self.original(*args, **kwargs)
        workspace = plan.workspace
        if workspace is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return run_site(self, args, kwargs, plan, workspace)
        if self.inputs:
            args, kwargs = self._edit_input(args, kwargs, plan)
        return self.after(self.original(*args, **kwargs), plan)

    def after(self, output: Any, plan: BatchPlan) -> Any:
        """The module's output with its edits."""
        norm = self.norm
        if norm is None and not self.outputs:
            return output
        h = output[0] if isinstance(output, tuple) else output
        training = self.module.training
        if norm is not None and norm.gives(h, training):
            site = site_of(h, self.outputs[0], plan) if self.outputs else None
            self.runtime.fused.offer(norm, h, edit_and_norm(h, site, plan, norm))
            return output
        edited = h
        if self.quick is not None:
            edited = edit(h, self.quick, plan, training)
        else:
            for key in self.outputs:
                edited = self._edit(edited, key, plan)
        if edited is h:
            return output
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _edit(self, h: Tensor, key: SiteKey, plan: BatchPlan) -> Tensor:
        """h with the edit at one site: h itself, where it was edited in place."""
        if self.runtime.unseen:
            self._see(key)
        if key not in plan.sites:
            return h
        place, training = self.places[key], self.module.training
        if place.shared:
            h = h.clone()
        elif place.kept and torch.is_grad_enabled():
            h = h.view_as(h)  # not in place, then
        if place.first is None:
            return edit_fewer(h, key, plan, self.runtime, training)
        assert place.width is not None
        part = h.narrow(-1, place.first, place.width)
        edited = edit(part, key, plan, training)
        if edited is part:
            return h
        return h.slice_scatter(edited, -1, place.first, place.first + place.width)

    def _see(self, key: SiteKey) -> None:
        if key in self.runtime.unseen:
            del self.runtime.unseen[key]
            self.use(self.inputs, self.outputs)

    def _edit_input(
        self, args: tuple, kwargs: dict[str, Any], plan: BatchPlan
    ) -> tuple[tuple, dict[str, Any]]:
        name = next(iter(kwargs)) if not args else None
        if name is not None and "hidden_states" in kwargs:
            name = "hidden_states"
        h = given = args[0] if name is None else kwargs[name]
        for key in self.inputs:
            h = self._edit(h, key, plan)
        if h is given:
            return args, kwargs
        if name is None:
            return (h, *args[1:]), kwargs
        return args, {**kwargs, name: h}


def edit_fewer(h: Tensor, key: SiteKey, plan: BatchPlan, runtime: Runtime, training: bool) -> Tensor:
    """`edit`, also of hidden states [batch, kept, d] that are some columns of the plan's: what enters the
    language-model head, of which generate wants the last."""
    if h.dim() != 3 or h.shape[0] * h.shape[1] == plan.tokens or has_layers(key.site):
        return edit(h, key, plan, training)
    columns = plan.tokens // h.shape[0]
    kept = runtime.logits_to_keep
    index: Any = slice(columns - kept, columns) if isinstance(kept, int) else kept
    whole = h.new_zeros(h.shape[0], columns, h.shape[2])
    if whole[:, index].shape != h.shape:
        return edit(h, key, plan, training)  # which says what is wrong
    whole[:, index] = h
    return edit(whole, key, plan, training)[:, index]


class Sites:
    """Puts stand-ins on the modules of sites, and takes them off."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.blocks = runtime, runtime.blocks
        self.locator = Locator(runtime.model, runtime.blocks)
        self._modules: dict[nn.Module, SiteForward] = {}
        self._keys: dict[SiteKey, SiteForward] = {}
        self._count = itertools.count()

    def _stand_in(self, module: nn.Module) -> SiteForward:
        site = self._modules.get(module)
        if site is None:
            site = self._modules[module] = launch.shortened(SiteForward, "site")(module, self.runtime)
            site.number = str(next(self._count))
            site.attach()
        return site

    def lay_out(self, workspace: DecodeWorkspace) -> None:
        """Tells compiled code what the modules do with a workspace."""
        workspace.layout = layout_of(list(self._modules.values()), workspace)

    def add(self, keys: Iterable[SiteKey]) -> bool:
        """Attaches what is not there yet; returns whether there was any such."""
        new = [key for key in keys if key not in self._keys]
        for key in new:
            place = self.locator.find(key)
            site = self._keys[key] = self._stand_in(place.module)
            site.places[key] = place
            if is_path(key.site):
                self.runtime.unseen[key] = None
            if place.input:
                site.use((*site.inputs, key), site.outputs)
            else:
                site.use(site.inputs, (*site.outputs, key))
        return bool(new)

    def at(self, key: SiteKey) -> tuple[Location, bool]:
        """Where a site is that is attached, and whether it is what goes into the module."""
        site = self._keys[key]
        return site.places[key], key in site.inputs

    def keep(self, keys: set[SiteKey]) -> None:
        """Detaches all others."""
        for key in [key for key in self._keys if key not in keys]:
            site = self._keys.pop(key)
            self.runtime.unseen.pop(key, None)
            site.use(
                tuple(other for other in site.inputs if other != key),
                tuple(other for other in site.outputs if other != key),
            )
            self._drop_idle(site)

    def _drop_idle(self, site: SiteForward) -> None:
        if not site.inputs and not site.outputs and site.norm is None:
            site.detach()
            del self._modules[site.module]

    def reattach(self) -> None:
        """Puts stand-ins back that somebody threw out."""
        lost = [site for site in self._modules.values() if site.reattach()]
        if lost:
            self.runtime.forget_compiled()

    def fuse(self, norms: dict[int, NextNorm], alone: list[NormForward]) -> None:
        """Fuses the norms that follow these blocks with the edits at their outputs; others run alone."""
        for layer, norm in norms.items():
            block = self._stand_in(self.blocks.layers[layer])
            block.norm = norm
            if layer + 1 < len(self.blocks.layers):
                norm.reader = self._stand_in(self.blocks.layers[layer + 1])
            norm.stand_in.attach()
        for stand_in in alone:
            stand_in.attach()
        self.runtime.fused.use(norms, alone)

    def part_norms(self) -> None:
        """Undoes `fuse`."""
        for site in list(self._modules.values()):
            if site.norm is not None:
                site.norm.stand_in.detach()
                site.norm = None
            self._drop_idle(site)
        for stand_in in self.runtime.fused.alone:
            stand_in.detach()
        self.runtime.fused.use({}, [])
