"""`Reft`, what `patch(model)` returns: the adapters of one model and the calls that manage them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, ReftConfig
from ..batch import BASE, AdapterStore, Place, SiteKey
from ..batch.tables import keys_of
from ..positions import LastPosition, Positions
from ..sites import has_layers
from .base_model import meet_base
from .blocks import Blocks, place_of
from .calls import ContinuousBatching, Forward, Generate, PrepareInputs, StackForward
from .checkpointing import forget_plans
from .continuous import unused
from .describe import Names, named_as_in_peft
from .freezing import Freeze
from .fused_norm import Kinds, next_norms, other_norms
from .merging import Merges, Merging
from .reading import CallReader
from .runtime import Runtime
from .saved_modules import SavedModuleStandIns
from .sites import Sites
from .slips import warn_of_bad_values
from .standin import StandIn

_CALLS = {
    "forward": Forward,
    "prepare_inputs_for_generation": PrepareInputs,
    "generate": Generate,
    "generate_batch": ContinuousBatching,
    "init_continuous_batching": ContinuousBatching,
}


class Reft(Names, Merges, nn.Module):
    """The adapters of a patched model; also found as `model.reft`.

    It is a submodule of the model, so that optimizers and `.to()` find its parameters, but keeps out of the
    model's state_dict: adapters are saved by `save_pretrained`, the base model by its own.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        capacity: int | None = None,
        pool_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._modules_of = nn.ModuleDict()
        self._runtime = Runtime(model, blocks, AdapterStore(capacity, pool_dtype))
        self._sites = Sites(self._runtime)
        self._merging = Merging(model, self._sites)
        self._was_active: str | None = None
        self._reader = CallReader(self._runtime, self._sites)
        self._copied = SavedModuleStandIns(self._runtime)
        self._freeze = Freeze()
        self._calls: list[StandIn] = []
        self.register_load_state_dict_post_hook(_forget_missing)

    @property
    def _adapters(self) -> dict[str, Adapter]:  # type: ignore[override]
        return self._runtime.store.adapters

    @property
    def _store(self) -> AdapterStore:
        return self._runtime.store

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self._runtime.model

    # Adapters --------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Name → Adapter, read-only."""
        return MappingProxyType(self._store.adapters)

    @property
    def active_adapter(self) -> str | None:
        """The adapter of calls that name none; None for the bare model."""
        return self._runtime.active

    @named_as_in_peft
    @torch.inference_mode(False)  # what is loaded in inference mode must be fit to train with
    def load_adapter(
        self,
        path: str | os.PathLike[str],
        name: str = "default",
        *,
        positions: str | Sequence[int] | Positions | None = None,
        act_fn: str | None = None,
        dropout: float | None = None,
        last_position: LastPosition | None = None,
        scale: float | None = None,
        is_trainable: bool = False,
    ) -> Adapter:
        """Loads an adapter from a folder (ours, or one that pyreft saved) or a hub id, under `name`.

        The first adapter of a model becomes the active one; later ones wait for `set_adapter`, or for a call
        that names them.

        Args:
            path: the folder or "org/name" on the hub.
            name: how calls refer to it; `adapter_name`, as in PEFT, is the same.
            positions, act_fn, dropout, last_position: what a folder of pyreft's does not hold.
            scale: what its edits are multiplied by, in every call; saved with it.
            is_trainable: to train on; freezes the base model.

        Raises:
            ValueError: the name is taken, the file is bad (`CheckpointError`), or the adapter is for another
                width or depth. PoolFull: a fixed capacity is exceeded. Adapters that were there stay.

        Warns if the file says that the adapter was made for a model of another type or shape.
        """
        self._check_name(name)
        adapter = Adapter.from_pretrained(
            path,
            positions=positions,
            act_fn=act_fn,
            dropout=dropout,
            last_position=last_position,
            scale=scale,
        )
        if is_trainable:
            adapter.trainable = True
        self._install(name, adapter)
        return adapter

    @named_as_in_peft
    @torch.inference_mode(False)
    def add_adapter(self, name: str, adapter: ReftConfig | Adapter) -> Adapter:
        """Adds a fresh trainable adapter made from a config (the base is frozen), or one made elsewhere.

        The first adapter of a model becomes the active one.

        Raises ValueError as `load_adapter` does, for a layer that the model lacks, and for r > d.
        """
        self._check_name(name)
        if isinstance(adapter, ReftConfig):
            width = self._width_at(adapter)
            adapter = Adapter.from_config(adapter, len(self._runtime.blocks.layers), width)
        elif not isinstance(adapter, Adapter):
            raise ValueError(f"adapter: must be a ReftConfig or an Adapter, was {type(adapter).__name__}")
        self._install(name, adapter)
        return adapter

    def _width_at(self, config: ReftConfig) -> int:
        """d at a config's site, the same in all of its layers."""
        heads = config.heads or (None,)
        layers = config.resolve_layers(len(self._runtime.blocks.layers))
        keys = [SiteKey(config.site, layer, head) for layer in layers for head in heads]
        widths = {self._sites.locator.find(key).width for key in keys}
        width = widths.pop()
        if width is None or widths:
            raise ValueError(
                f"site: the width of {config.site!r} is not known, or not the same in all layers; add an "
                "rk.Adapter that is made for it"
            )
        return width

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"name: must be a non-empty string other than {BASE!r}, was {name!r}")
        if name in self._store.adapters or name in self._store.subspaces:
            raise ValueError(f"name: there is an adapter {name!r} already; delete it first")

    def _check_fit(self, adapter: Adapter) -> None:
        depth = len(self._runtime.blocks.layers)
        if adapter.n_layers is not None and adapter.n_layers != depth:
            raise ValueError(
                f"adapter: was made for a model of {adapter.n_layers} layers; this one has {depth}"
            )
        for intervention in adapter.interventions:
            if not 0 <= intervention.layer < depth:
                raise ValueError(f"adapter: edits layer {intervention.layer}; the model has {depth} layers")
            wanted = self._sites.locator.find(SiteKey.of(intervention)).width
            if wanted is not None and intervention.width != wanted:
                raise ValueError(
                    f"adapter: has width {intervention.width}; {intervention.site} of this model has {wanted}"
                )
        adapter.saved_modules.check(self.model)
        if any(adapter is other for other in self._store.adapters.values()):
            raise ValueError("adapter: is loaded under another name already; copy it (copy.deepcopy) first")

    def _install(self, name: str, adapter: Adapter) -> None:
        self._store.check_name(name, adapter)
        self._check_fit(adapter)
        warn_of_bad_values(name, adapter)
        meet_base(name, adapter, self.model)
        with self._runtime.lock:
            place = self._place_of(next(iter(keys_of(adapter))))
            wanted = self._store.pool_dtype
            if wanted not in (None, torch.float32, place.dtype):
                raise ValueError(
                    f"pool_dtype: must be the model's ({place.dtype}) or torch.float32, was {wanted}"
                )
            adapter.to(place.device).train(self.model.training)
            adapter.saved_modules.meet(self.model, adapter.trainable)
            self._store.add(name, adapter, self._place_of)
            self._modules_of[_module_key(name, self._modules_of)] = adapter
            if self._sites.add(keys_of(adapter)) | self._copied.add(adapter.saved_modules.modules_by_path):
                self._runtime.forget_compiled()
            if len(self._store.adapters) == 1:
                self._runtime.active = name
            adapter.on_trainable = self._freeze_base
            if adapter.trainable:
                self._freeze_base()

    def _freeze_base(self) -> None:
        self._freeze.freeze(self.model, self._modules_of)

    def _place_of(self, key: SiteKey) -> Place:
        known = self._store.places.get(key)
        if known is not None:
            return known
        at = self._runtime.blocks.layers[key.layer] if has_layers(key.site) else self._module_at(key)
        return Place(*place_of(at, self.model))

    def _module_at(self, key: SiteKey) -> nn.Module:
        return self._sites.locator.find(key).module

    @named_as_in_peft
    def delete_adapter(self, name: str) -> None:
        """Removes an adapter and frees its room.

        Raises ValueError for an unknown name, one that is merged, and one that requests of continuous
            batching wait or run with.
        """
        self._known(name)
        if name in self._store.merged:
            raise ValueError(f"name: {name!r} is merged into the weights; unmerge_adapter first")
        with unused(self._runtime, name), self._runtime.lock:
            adapter = self._store.remove(name)
            adapter.on_trainable = None
            for key, module in list(self._modules_of.items()):
                if module is adapter:
                    del self._modules_of[key]
            if self._runtime.active is not None and not self._has(self._runtime.active):
                self._runtime.active = None
            others = self._store.adapters.values()
            self._sites.keep({key for other in others for key in keys_of(other)})
            self._copied.keep({path for other in others for path in other.saved_modules.modules_by_path})

    @named_as_in_peft
    def set_adapter(self, name: str | None) -> None:
        """Makes `name` (or "adapter/subspace") the adapter of calls that name none; None or "__base__" for
        the bare model.

        Raises ValueError for an unknown name, and for several: a call takes those as adapter_names.
        """
        if name == BASE:
            name = None
        if name is not None:
            self._named(name)
            if self._store.owner(name) in self._store.merged:
                raise ValueError(f"name: {name!r} is merged into the weights; unmerge_adapter first")
        self._runtime.active, self._runtime.told.active_chosen = name, True

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block, calls that name no adapter run the bare model."""
        before, self._runtime.active = self._runtime.active, None
        try:
            yield
        finally:
            if before is not None and self._store.owner(before) in self._store.merged:
                # It was merged in the block, and is active again once it is unmerged.
                before, self._was_active = None, before
            self._runtime.active = before if before is not None and self._has(before) else None

    @named_as_in_peft
    def save_pretrained(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Saves one adapter (the active one by default) as reft_config.json and reft_model.safetensors.

        Of "adapter/subspace" the subspace's rows, as an adapter of their own.
        """
        name = self.active_adapter if name is None else name
        if name is None:
            raise ValueError("name: no adapter is active; say which to save")
        self._named(name).save_pretrained(path)

    def _has(self, name: str) -> bool:
        """Whether a call may name it: an adapter, or a subspace."""
        return name in self._store.adapters or name in self._store.subspaces

    def _named(self, name: object) -> Adapter:
        """The adapter, or the subspace, of that name. Raises ValueError."""
        known = isinstance(name, str) and name in self._store.subspaces
        return self._store.find(str(name)) if known else self._known(name)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, of how many there are."""
        everything = dict.fromkeys(self.model.parameters())
        trainable = sum(p.numel() for p in everything if p.requires_grad)
        total = sum(p.numel() for p in everything)
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    # Attachment ------------------------------------------------------------------------------------------

    def _attach(self, fuse_norm: bool) -> None:
        model, blocks = self.model, self._runtime.blocks
        for name, call in _CALLS.items():
            if hasattr(model, name):
                self._calls.append(call(model, name, self._reader))
        if blocks.stack is not model:
            self._calls.append(StackForward(blocks.stack, "forward", self._reader))
        for stand_in in self._calls:
            stand_in.attach()
        if fuse_norm:
            fused, kinds = self._runtime.fused, Kinds()
            norms = next_norms(blocks, fused, kinds)
            self._sites.fuse(norms, other_norms(blocks, fused, norms, kinds))
        self._runtime.forget_compiled()

    def _detach(self) -> None:
        for name in self._store.adapters:  # before anything is undone
            with unused(self._runtime, name):
                pass
        self.unmerge_adapter()
        for name in list(self._store.adapters):
            self.delete_adapter(name)
        self._sites.part_norms()
        for stand_in in self._calls:
            stand_in.detach()
        forget_plans(self._runtime)
        self._freeze.thaw(self.model)
        self._runtime.forget_compiled()

    # Its place in the model ------------------------------------------------------------------------------

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """The adapters' parameters. (Whoever walks through the model's modules does not recurse.)"""
        self._runtime.told.parameters_taken |= recurse
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for adapter in self._modules_of.values():  # copies of adapters have no owner
            adapter.on_trainable = self._freeze_base  # type: ignore[assignment]

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """As a part of the model's state_dict it is empty; called alone it holds the adapters' tensors."""
        if prefix:
            return destination
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> Reft:
        """Moves between devices with the model, but keeps the adapters' dtypes: they are the checkpoint."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def _module_key(name: str, taken: nn.ModuleDict) -> str:
    key = name.replace(".", "_")
    while key in taken or hasattr(taken, key):
        key += "_"
    return key


def _forget_missing(module: nn.Module, incompatible: Any) -> None:
    """A base model's state_dict has no adapters: that is not an error."""
    own = tuple(f"reft.{key}" for key in module.state_dict())
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.endswith(own)] if own else missing
