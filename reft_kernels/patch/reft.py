"""`Reft`, what `patch(model)` returns: the adapters of one model and the calls that manage them."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..config import ReftConfig
from ..positions import LastPosition, Positions
from .blocks import Blocks, NotPatchable, find_blocks, head_width, place_of, site_module, text_config
from .calls import ContinuousBatching, Forward, Generate, PrepareInputs, StackForward
from .describe import Names
from .freezing import Freeze
from .heads import Heads
from .norms import next_norms
from .planner import BASE, Planner
from .recompute import forget_plans
from .sites import Sites
from .standin import StandIn
from .state import State
from .tables import Place, Registry, SiteKey, keys_of

_CALLS = {
    "forward": Forward,
    "prepare_inputs_for_generation": PrepareInputs,
    "generate": Generate,
    "generate_batch": ContinuousBatching,
    "init_continuous_batching": ContinuousBatching,
}


class Reft(Names, nn.Module):
    """The adapters of a patched model; also found as `model.reft`.

    It is a submodule of the model, so that optimizers and `.to()` find its parameters, but keeps out of the
    model's state_dict: adapters are saved by `save_pretrained`, the base model by its own.
    """

    _model: nn.Module
    _blocks: Blocks
    _sites: Sites
    _heads: Heads
    _planner: Planner

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        capacity: int | None = None,
        pool_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._modules_of = nn.ModuleDict()
        self._adapters: dict[str, Adapter] = {}
        self._state = State()
        self._registry = Registry(capacity, pool_dtype)
        self._freeze = Freeze()
        self._calls: list[StandIn] = []
        # In __dict__, past nn.Module's registration: the model must not become its own descendant.
        self.__dict__.update(
            _model=model,
            _blocks=blocks,
            _planner=Planner(blocks, self._registry, self._adapters, self._state),
            _heads=Heads(model, self._state),
        )
        self.__dict__["_sites"] = Sites(blocks, self._planner)
        self._planner.hold = self._hold_sites
        self.register_load_state_dict_post_hook(_forget_missing)

    # Adapters --------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Name → Adapter, read-only."""
        return MappingProxyType(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        """The adapter of calls that name none; None for the bare model."""
        return self._planner.active

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
        is_trainable: bool = False,
    ) -> Adapter:
        """Loads an adapter from a folder (ours, or one that pyreft saved) or a hub id, under `name`.

        Args:
            path: the folder or "org/name" on the hub.
            name: how calls refer to it.
            positions, act_fn, dropout, last_position: what a folder of pyreft's does not hold.
            is_trainable: to train on; freezes the base model.

        Raises:
            ValueError: the name is taken, the file is bad (`CheckpointError`), or the adapter is for another
                width or depth. PoolFull: a fixed capacity is exceeded. Adapters that were there stay.
        """
        self._check_name(name)
        adapter = Adapter.from_pretrained(
            path, positions=positions, act_fn=act_fn, dropout=dropout, last_position=last_position
        )
        if is_trainable:
            adapter.trainable = True
        self._install(name, adapter)
        return adapter

    @torch.inference_mode(False)
    def add_adapter(self, name: str, adapter: ReftConfig | Adapter) -> Adapter:
        """Adds a fresh trainable adapter made from a config (the base is frozen), or one made elsewhere.

        Raises ValueError as `load_adapter` does, for a layer that the model lacks, and for r > d.
        """
        self._check_name(name)
        if isinstance(adapter, ReftConfig):
            width = head_width(self._model) if adapter.heads is not None else self._blocks.width
            adapter = Adapter.from_config(adapter, len(self._blocks.layers), width)
        elif not isinstance(adapter, Adapter):
            raise ValueError(f"adapter: must be a ReftConfig or an Adapter, was {type(adapter).__name__}")
        self._install(name, adapter)
        return adapter

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"name: must be a non-empty string other than {BASE!r}, was {name!r}")
        if name in self._adapters:
            raise ValueError(f"name: there is an adapter {name!r} already; delete it first")

    def _check_fit(self, adapter: Adapter) -> None:
        depth = len(self._blocks.layers)
        if adapter.n_layers is not None and adapter.n_layers != depth:
            raise ValueError(
                f"adapter: was made for a model of {adapter.n_layers} layers; this one has {depth}"
            )
        for intervention in adapter.interventions:
            if not 0 <= intervention.layer < depth:
                raise ValueError(f"adapter: edits layer {intervention.layer}; the model has {depth} layers")
            wanted = head_width(self._model) if intervention.head is not None else self._blocks.width
            if intervention.width != wanted:
                raise ValueError(
                    f"adapter: has width {intervention.width}; {intervention.site} of this model has {wanted}"
                )
            site_module(self._blocks.layers[intervention.layer], intervention.site)
            heads = text_config(self._model).num_attention_heads
            if intervention.head is not None and intervention.head >= heads:
                raise ValueError(f"adapter: edits head {intervention.head}; the model has {heads} heads")
        adapter.heads.check(self._model)
        if any(adapter is other for other in self._adapters.values()):
            raise ValueError("adapter: is loaded under another name already; copy it (copy.deepcopy) first")

    def _install(self, name: str, adapter: Adapter) -> None:
        self._check_fit(adapter)
        _warn_of_bad_values(name, adapter)
        with self._state.lock:
            for intervention, key in zip(adapter.interventions, _keys(adapter)):
                if key not in self._registry.places:
                    block = self._blocks.layers[intervention.layer]
                    self._registry.places[key] = Place(*place_of(block, self._model))
            place = self._registry.places[next(iter(keys_of(adapter)))]
            wanted = self._registry.pool_dtype
            if wanted not in (None, torch.float32, place.dtype):
                raise ValueError(
                    f"pool_dtype: must be the model's ({place.dtype}) or torch.float32, was {wanted}"
                )
            adapter.to(place.device)
            adapter.heads.meet(self._model, adapter.trainable)
            self._registry.lay(name, adapter)
            self._adapters[name] = adapter
            self._modules_of[_module_key(name, self._modules_of)] = adapter
            if self._sites.add(keys_of(adapter)) | self._heads.add(adapter.heads.modules_by_path):
                self._forget_compiled()
            if len(self._adapters) == 1:
                self._planner.active = name
            if adapter.trainable:
                self._freeze.freeze(self._model, self)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter and frees its room. Raises ValueError for an unknown name."""
        self._known(name)
        with self._state.lock:
            adapter = self._adapters.pop(name)
            self._registry.remove(name)
            for key, module in list(self._modules_of.items()):
                if module is adapter:
                    del self._modules_of[key]
            if self._planner.active == name:
                self._planner.active = None
            others = self._adapters.values()
            self._sites.keep({key for other in others for key in keys_of(other)})
            self._heads.keep({path for other in others for path in other.heads.modules_by_path})

    def set_adapter(self, name: str | None) -> None:
        """Makes `name` the adapter of calls that name none; None or "__base__" for the bare model.

        Raises ValueError for an unknown name, and for several: a call takes those as adapter_names.
        """
        if name == BASE:
            name = None
        if name is not None:
            self._known(name)
        self._planner.active = name

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block, calls that name no adapter run the bare model."""
        before, self._planner.active = self._planner.active, None
        try:
            yield
        finally:
            self._planner.active = before if before in self._adapters else None

    def save_pretrained(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Saves one adapter (the active one by default) as reft_config.json and reft_model.safetensors."""
        name = self.active_adapter if name is None else name
        if name is None:
            raise ValueError("name: no adapter is active; say which to save")
        self._known(name).save_pretrained(path)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, of how many there are."""
        everything = dict.fromkeys(self._model.parameters())
        trainable = sum(p.numel() for p in everything if p.requires_grad)
        total = sum(p.numel() for p in everything)
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")

    # Attachment ------------------------------------------------------------------------------------------

    def _attach(self, fuse_norm: bool) -> None:
        model, stack = self._model, self._blocks.stack
        for name, call in _CALLS.items():
            if hasattr(model, name):
                self._calls.append(call(model, name, self._planner))
        if stack is not model:
            self._calls.append(StackForward(stack, "forward", self._planner))
        for stand_in in self._calls:
            stand_in.attach()
        if fuse_norm:
            norms = next_norms(self._blocks, self._state)
            self._sites.fuse(norms)
            self._planner.norm_devices = list(
                dict.fromkeys(norm.parameters["weight"].device for norm in norms.values())
            )
        self._forget_compiled()

    def _hold_sites(self) -> None:
        if self._sites.hold():
            self._forget_compiled()

    def _detach(self) -> None:
        for name in list(self._adapters):
            self.delete_adapter(name)
        self._sites.part_norms()
        self._planner.norm_devices = []
        for stand_in in self._calls:
            stand_in.detach()
        forget_plans(self._blocks)
        self._freeze.thaw(self._model)
        self._forget_compiled()

    def _forget_compiled(self) -> None:
        """Drops compiled code that was traced without our stand-ins."""
        for module in (self._model, self._blocks.stack):
            module.__dict__.pop("_compiled_call", None)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()

    # Its place in the model ------------------------------------------------------------------------------

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


def _keys(adapter: Adapter) -> list[SiteKey]:
    return [SiteKey(i.site, i.layer, i.head) for i in adapter.interventions]


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


def _warn_of_bad_values(name: str, adapter: Adapter) -> None:
    for key, tensor in adapter.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            warnings.warn(f"adapter {name!r}: {key} holds NaN or Inf", stacklevel=4)


def patch(
    model: nn.Module,
    capacity: int | None = None,
    pool_dtype: torch.dtype | None = None,
    fuse_norm: bool = False,
) -> Reft:
    """Lets a Hugging Face model run ReFT adapters, by changes to this instance alone.

    The model keeps its class, weights and API. Its `forward` and `generate` take `adapter_names` (one name a
    row of the batch, "__base__" for the bare model; under PEFT `reft_adapter_names`) and `prompt_lengths`.

    Args:
        model: a transformers model with decoder (or encoder) layers. Of PEFT's wrapper the model inside is
            patched; `reft` is found on both.
        capacity: pool rows; fixed, so that addresses stay, and a full pool is an error. None: grows.
        pool_dtype: dtype of folded adapters; None for the model's. torch.float32 is nearer to a pyreft that
            keeps R in float32.
        fuse_norm: computes each norm that reads a block's output together with the edit of that output, in
            one pass, for edited rows and others alike. For inference; off by itself where it does not agree
            with the model's own norm within rounding, in training, and where a hook of somebody else's or
            an edit of the next block's input comes in between.

    Returns:
        The model's `Reft`, also `model.reft`.

    Raises:
        NotPatchable: (a ValueError) no layers were found, or the model is patched already.
    """
    if not isinstance(model, nn.Module):
        raise NotPatchable(f"model: must be a transformers model, was {type(model).__name__}")
    if isinstance(getattr(model, "reft", None), Reft):
        raise NotPatchable("model: is patched already; its adapters are at model.reft (unpatch it first)")
    if hasattr(model, "reft"):
        raise NotPatchable(f"model: has an attribute 'reft' of its own, a {type(model.reft).__name__}")
    if pool_dtype is not None and pool_dtype not in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise ValueError(f"pool_dtype: must be a floating dtype, was {pool_dtype}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity: must be at least 1 pool row or None, was {capacity}")
    if hasattr(model, "get_base_model"):
        # PEFT's wrapper: its generate runs the model inside, so that is the one to patch.
        return patch(model.get_base_model(), capacity, pool_dtype, fuse_norm)  # type: ignore[operator]
    blocks = find_blocks(model)
    if any(isinstance(module, Reft) for module in model.modules()) or isinstance(
        blocks.stack.__dict__.get("forward"), StackForward
    ):
        raise NotPatchable(
            "model: shares its layers with a model that is patched already; unpatch that first"
        )
    reft = Reft(model, blocks, capacity, pool_dtype)
    model.add_module("reft", reft)
    reft._attach(fuse_norm)
    return reft


def unpatch(model: nn.Module) -> nn.Module:
    """Takes everything off that `patch` put on: the model is bit for bit what it was. Returns the model.

    Raises ValueError for a model that is not patched.
    """
    reft = getattr(model, "reft", None)
    if not isinstance(reft, Reft):
        raise ValueError("model: is not patched")
    reft._detach()
    del reft._model.reft
    return model
