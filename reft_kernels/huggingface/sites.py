"""The sites of a patched model: modules whose input or output is edited."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..batch import BatchPlan, DecodeWorkspace, SiteKey, edit
from ..batch.edit import site_of
from ..ops import launch
from .blocks import edits_input, site_module
from .compiled_step import layout_of, run_site
from .fused_norm import NextNorm, NormForward, edit_and_norm
from .runtime import Runtime
from .standin import StandIn


class SiteForward(StandIn):
    """Edits what goes into a module and what comes out of it. Idle, it is one check.

    inputs, outputs: sites at this module (each head of attention is one).
    norm: the norm that takes a block's output, where it is fused with the edit.
    key: for the short way (python_bindings/standin.cpp, which reads it and calls `after`): the one site,
        False where there is none, None where a call takes more than one edit of the whole output.
    number: its name among the model's stand-ins, a number.
    """

    def __init__(self, module: nn.Module, runtime: Runtime) -> None:
        super().__init__(module)
        self.runtime = runtime
        self.inputs: tuple[SiteKey, ...] = ()
        self.outputs: tuple[SiteKey, ...] = ()
        self.norm: NextNorm | None = None
        self.number = ""
        self.key: SiteKey | bool | None = False

    def use(self, inputs: tuple[SiteKey, ...], outputs: tuple[SiteKey, ...]) -> None:
        """Edits at these sites from now on."""
        self.inputs, self.outputs = inputs, outputs
        one = outputs[0] if len(outputs) == 1 and outputs[0].head is None else None
        self.key = None if inputs else (one if outputs else False)

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
        for key in self.outputs:
            edited = edit(edited, key, plan, training)
        if edited is h:
            return output
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _edit_input(
        self, args: tuple, kwargs: dict[str, Any], plan: BatchPlan
    ) -> tuple[tuple, dict[str, Any]]:
        name = next(iter(kwargs)) if not args else None
        if name is not None and "hidden_states" in kwargs:
            name = "hidden_states"
        h = given = args[0] if name is None else kwargs[name]
        for key in self.inputs:
            # What enters the first block may be the caller's own inputs_embeds.
            clone = key.site == "block_input" and key.layer == 0 and key in plan.sites
            h = edit(h.clone() if clone else h, key, plan, self.module.training)
        if h is given:
            return args, kwargs
        if name is None:
            return (h, *args[1:]), kwargs
        return args, {**kwargs, name: h}


class Sites:
    """Puts stand-ins on the modules of sites, and takes them off."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.blocks = runtime, runtime.blocks
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
            site = self._keys[key] = self._stand_in(site_module(self.blocks.layers[key.layer], key.site))
            if edits_input(key.site):
                site.use((*site.inputs, key), site.outputs)
            else:
                site.use(site.inputs, (*site.outputs, key))
        return bool(new)

    def module_at(self, key: SiteKey) -> tuple[nn.Module, bool]:
        """The module of a site that is attached, and whether the site is its input."""
        site = self._keys[key]
        return site.module, key in site.inputs

    def keep(self, keys: set[SiteKey]) -> None:
        """Detaches all others."""
        for key in [key for key in self._keys if key not in keys]:
            site = self._keys.pop(key)
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
