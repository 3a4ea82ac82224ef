"""The sites of a patched model: modules whose input or output is edited."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .blocks import Blocks, edits_input, site_module
from .edit import edit, edit_and_norm
from .norms import NextNorm
from .planner import Planner
from .standin import StandIn
from .tables import BatchPlan, Place, SiteKey, SiteTable


class SiteForward(StandIn):
    """Edits what goes into a module and what comes out of it. Idle, it is one check.

    inputs, outputs: sites at this module (each head of attention is one).
    norm: the norm that takes a block's output, where it is fused with the edit.
    """

    def __init__(self, module: nn.Module, planner: Planner) -> None:
        super().__init__(module)
        self.planner, self.state = planner, planner.state
        self.inputs: tuple[SiteKey, ...] = ()
        self.outputs: tuple[SiteKey, ...] = ()
        self.norm: NextNorm | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.state.plan
        if plan is None:
            return self.original(*args, **kwargs)
        if self.inputs:
            args, kwargs = self._edit_input(args, kwargs, plan)
        output = self.original(*args, **kwargs)
        norm = self.norm
        if norm is None and not self.outputs:
            return output
        h = output[0] if isinstance(output, tuple) else output
        if norm is not None and norm.stands(h, self.module.training):
            site = self._site(self.outputs[0], h, plan) if self.outputs else None
            self.state.waiting = (h, edit_and_norm(h, site, plan, norm), norm)
            return output
        edited = h
        for key in self.outputs:
            edited = self._edit(edited, key, plan)
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
            h = self._edit(h.clone() if clone else h, key, plan)
        if h is given:
            return args, kwargs
        if name is None:
            return (h, *args[1:]), kwargs
        return args, {**kwargs, name: h}

    def _site(self, key: SiteKey, h: Tensor, plan: BatchPlan) -> SiteTable | None:
        """What is done at a site in this forward."""
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
            site = self.planner.moved(key, Place(h.device, h.dtype), plan)
        return site

    def _edit(self, h: Tensor, key: SiteKey, plan: BatchPlan) -> Tensor:
        site = self._site(key, h, plan)
        return h if site is None else edit(h, key, site, plan, self.module.training)


class Sites:
    """Puts stand-ins on the modules of sites, and takes them off."""

    def __init__(self, blocks: Blocks, planner: Planner) -> None:
        self.blocks, self.planner = blocks, planner
        self._modules: dict[nn.Module, SiteForward] = {}
        self._keys: dict[SiteKey, SiteForward] = {}

    def _stand_in(self, module: nn.Module) -> SiteForward:
        site = self._modules.get(module)
        if site is None:
            site = self._modules[module] = SiteForward(module, self.planner)
            site.attach()
        return site

    def add(self, keys: Iterable[SiteKey]) -> bool:
        """Attaches what is not there yet; returns whether there was any such."""
        new = [key for key in keys if key not in self._keys]
        for key in new:
            site = self._keys[key] = self._stand_in(site_module(self.blocks.layers[key.layer], key.site))
            if edits_input(key.site):
                site.inputs += (key,)
            else:
                site.outputs += (key,)
        return bool(new)

    def keep(self, keys: set[SiteKey]) -> None:
        """Detaches all others."""
        for key in [key for key in self._keys if key not in keys]:
            site = self._keys.pop(key)
            site.inputs = tuple(other for other in site.inputs if other != key)
            site.outputs = tuple(other for other in site.outputs if other != key)
            self._drop_idle(site)

    def _drop_idle(self, site: SiteForward) -> None:
        if not site.inputs and not site.outputs and site.norm is None:
            site.detach()
            del self._modules[site.module]

    def hold(self) -> bool:
        """Puts stand-ins back that somebody threw out; returns whether there was any."""
        lost = [site for site in self._modules.values() if site.hold()]
        return bool(lost)

    def fuse(self, norms: dict[int, NextNorm]) -> None:
        """Fuses the norms that follow these blocks with the edits at the blocks' outputs."""
        for layer, norm in norms.items():
            block = self._stand_in(self.blocks.layers[layer])
            block.norm = norm
            if layer + 1 < len(self.blocks.layers):
                norm.reader = self._stand_in(self.blocks.layers[layer + 1])
            norm.stand_in.attach()

    def part_norms(self) -> None:
        """Undoes `fuse`."""
        for site in list(self._modules.values()):
            if site.norm is not None:
                site.norm.stand_in.detach()
                site.norm = None
            self._drop_idle(site)
