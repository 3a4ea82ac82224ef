"""`Adapter`: the interventions that make up one adapter, without a model."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import AdapterRecord, BaseModel, CheckpointError, native, read
from ..pool import Fold
from ..positions import LastPosition, Positions
from .compose import summed, with_rows
from .config import ReftConfig
from .intervention import Intervention
from .methods import METHODS
from .orthonormal import orthonormal_rows, orthonormality_error
from .saved_modules import SavedModules

#: Above this |R Rᵀ − I|, training starts visibly elsewhere than the adapter stood.
_ORTHONORMAL = 1e-3


class Adapter(nn.Module):
    """Interventions at layers, sites and positions; what a checkpoint holds and what a pool is filled from.

    >>> import reft_kernels as rk
    >>> adapter = rk.Adapter.from_config(rk.ReftConfig(r=4, layers=[1], positions="l1"), n_layers=2, width=64)
    >>> adapter.pool_rows, adapter.select_subspace([0, 3]).pool_rows
    (4, 2)
    >>> rk.Adapter.compose([adapter, adapter]).pool_rows
    8

    Args:
        interventions: at least one, all of one width. No two at one place may share a position.
        config: what the adapter was made from, if known.
        n_layers: depth of the model it was made for, if known.
        saved_modules: copies of the model's modules that belong to the adapter; by default those that the
            config's `modules_to_save` names, made when it is added to a model.
        base: the model that it was made for, if known; a patched model sets it on adapters that train.

    Attributes:
        interventions: the `Intervention`s, in a stable order.
        groups: the distinct position specs; `intervention.group` is an index into them.
        width: d, the length of the hidden states.

    Raises:
        ValueError: interventions that contradict each other, or a layer beyond n_layers.
    """

    # An nn.ModuleList; typed by what it holds.
    interventions: Sequence[Intervention]

    def __init__(
        self,
        interventions: Iterable[Intervention],
        config: ReftConfig | None = None,
        n_layers: int | None = None,
        saved_modules: SavedModules | None = None,
        base: BaseModel | None = None,
    ) -> None:
        super().__init__()
        listed = list(interventions)
        _check_together(listed, n_layers)
        self.interventions = nn.ModuleList(listed)  # type: ignore[assignment]
        self.config, self.n_layers, self.base = config, n_layers, base
        self.groups: tuple[Positions, ...] = tuple(dict.fromkeys(one.positions for one in listed))
        for one in listed:
            one.group = self.groups.index(one.positions)
        if saved_modules is None:
            saved_modules = SavedModules((config and config.modules_to_save) or ())
        self.saved_modules = saved_modules
        self._trainable = False
        #: Called when the adapter becomes trainable; set by the patched model that it is on.
        self.on_trainable: Callable[[], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to no model, and must not bring one along.
        return {**self.__dict__, "on_trainable": None}

    @property
    def width(self) -> int:
        """d, the length of the hidden states that are edited."""
        return self.interventions[0].width

    @property
    def pool_rows(self) -> int:
        """Pool rows that all folds take together."""
        return sum(one.pool_rows for one in self.interventions)

    @property
    def has_copies(self) -> bool:
        """Whether `saved_modules` met a model. Each batch asks each of its adapters, so past nn.Module's
        way of finding an attribute, which is slow."""
        return self._modules["saved_modules"].has_copies  # type: ignore[union-attr, return-value]

    @property
    def trainable(self) -> bool:
        """Whether the parameters require a gradient and R is kept orthonormal by the fold.

        Setting it to True raises ValueError for methods that can't be trained here. It makes R float32
        where it was narrower, and warns of an R that is far from orthonormal. On a patched model it freezes
        the base.
        """
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        if value == self._trainable:
            self.requires_grad_(value)  # others may have frozen it, as get_peft_model does
            return
        if value:
            for one in self.interventions:
                _check_trainable(one.method)
            for one in self.interventions:
                _widen_orthonormal(one)
        else:
            for one in self.interventions:
                with torch.no_grad():
                    for name, tensor in one.materialized().items():
                        getattr(one, name).data = tensor.detach()
        for one in self.interventions:
            one.orthonormalize = value
            one.requires_grad_(value)
        self.saved_modules.requires_grad_(value)
        self._trainable = value
        if value and self.on_trainable is not None:
            self.on_trainable()

    def take_as_raw(self) -> None:
        """Makes it trainable with the parameters as they are: raw ones, of which the fold makes orthonormal
        rows. For what was saved in the middle of training."""
        for one in self.interventions:
            _check_trainable(one.method)
            one.orthonormalize = True
            one.requires_grad_(True)
        self.saved_modules.requires_grad_(True)
        self._trainable = True

    def folds(self) -> list[Fold]:
        """The fold of every intervention, in order; the same values as `intervention.fold()` one by one.

        While the adapter is trainable, R is made orthonormal in one batch for all interventions of a shape.
        """
        batches: dict[tuple, list[tuple[int, str, Tensor]]] = {}
        for index, one in enumerate(self.interventions):
            for name in one.trains_orthonormal:
                tensor = getattr(one, name)
                key = (tensor.shape, tensor.dtype, tensor.device)
                batches.setdefault(key, []).append((index, name, tensor))
        ready: list[dict[str, Tensor]] = [{} for _ in self.interventions]
        for batch in batches.values():
            results = orthonormal_rows(torch.stack([tensor for _, _, tensor in batch])).unbind()
            for (index, name, _), result in zip(batch, results):
                ready[index][name] = result
        return [one.fold(found) for one, found in zip(self.interventions, ready)]

    @classmethod
    def from_config(
        cls,
        config: ReftConfig,
        n_layers: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> Adapter:
        """A fresh, trainable adapter, initialised as pyreft does.

        R has orthonormal rows (of a Gaussian matrix) in float32 at least; W and b are a torch.nn.Linear's:
        uniform in ±1/√d. They are drawn on the CPU.

        Args:
            config: rank, layers, site and positions.
            n_layers: depth of the model.
            width: d at the config's site (a head's width at "head_attention_value_output").
            dtype: of W and b.
            generator: source of the random numbers; None for torch's own.

        Raises:
            ValueError: a layer that the model lacks, a rank above the width, a method that can't be trained.
        """
        _check_trainable(config.method)
        if config.r > width:
            raise ValueError(f"r: {config.r} rows can't be orthonormal in a width of {width}")
        made: list[Intervention] = []
        for positions in config.position_groups():
            for layer in config.resolve_layers(n_layers):
                for head in config.heads or (None,):
                    tensors = _fresh(config.method, config.r, width, dtype, generator)
                    made.append(
                        Intervention(
                            config.method,
                            layer,
                            config.site,
                            positions,
                            tensors,
                            act_fn=config.act_fn,
                            dropout=config.dropout,
                            head=head,
                        )
                    )
        adapter = cls(made, config=config, n_layers=n_layers)
        adapter.trainable = True
        return adapter

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        positions: str | Sequence[int] | Positions | None = None,
        act_fn: str | None = None,
        dropout: float | None = None,
        last_position: LastPosition | None = None,
    ) -> Adapter:
        """Reads an adapter from a folder, or from the Hugging Face hub by its "organisation/name".

        Args:
            path: a folder that `save_pretrained` wrote, or one that pyreft's `save` wrote.
            positions, act_fn, dropout, last_position: for a folder of pyreft's only, which does not hold
                them; positions is required there. The others default to None, 0.0 and "length".

        Returns:
            An adapter on the CPU, in the stored dtypes, not trainable.

        Raises:
            reft_kernels.checkpoint.CheckpointError: (a ValueError) names the file and what is wrong with it.
        """
        return cls.from_record(
            read(path, positions=positions, act_fn=act_fn, dropout=dropout, last_position=last_position)
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes reft_config.json and reft_model.safetensors into the folder `path`, to the bit.

        Both are written aside and then renamed: a save that fails leaves the previous files as they were.
        While the adapter is trainable, R is written as the fold uses it, orthonormal.
        """
        native.write(self.to_record(), path)

    @classmethod
    def from_record(cls, record: AdapterRecord, keep_raw: bool = False) -> Adapter:
        """The adapter that a file described.

        Args:
            record: what a reader of `reft_kernels.checkpoint` gave.
            keep_raw: give what was saved in the middle of training back trainable, with its raw parameters.

        Raises:
            reft_kernels.checkpoint.CheckpointError: the record is of no adapter; names the file.
        """
        made = [Intervention.from_record(one) for one in record.interventions]
        try:
            config = None if record.config is None else ReftConfig.from_dict(record.config)
            saved = SavedModules((config and config.modules_to_save) or tuple(record.modules), record.modules)
            adapter = cls(made, config, record.n_layers, saved, record.base)
        except ValueError as error:
            raise CheckpointError(f"{record.where}: {error}") from error
        if adapter.width != record.width:
            raise CheckpointError(
                f"{record.where}: 'width' is {record.width}, the tensors have {adapter.width}"
            )
        if record.raw:
            adapter.take_as_raw()
            adapter.trainable = keep_raw
        return adapter

    @torch.no_grad()
    def to_record(self, raw: bool = False) -> AdapterRecord:
        """What a file holds of the adapter; the tensors are not copied.

        raw: keep a trainable adapter's parameters as the optimizer has them, so that training goes on from
            them, rather than as the fold uses them.
        """
        return AdapterRecord(
            interventions=tuple(one.to_record(raw) for one in self.interventions),
            width=self.width,
            n_layers=self.n_layers,
            config=None if self.config is None else self.config.to_dict(),
            modules=self.saved_modules.tensors(),
            raw=raw and self.trainable,
            base=self.base,
        )

    @classmethod
    def compose(cls, adapters: Sequence[Adapter]) -> Adapter:
        """The sum of several adapters' edits, each computed from the unedited hidden state.

        At one place their positions must be equal, or share no token. The result holds concatenated folds
        and is not trainable. Warns of adapters that were made for different models.

        Raises:
            ValueError: no adapters; widths or depths that differ; positions that overlap without being equal.
        """
        if not adapters:
            raise ValueError("adapters: at least one is needed")
        if any(adapter.saved_modules for adapter in adapters):
            raise ValueError("adapters: those with modules_to_save can't be composed, as modules have no sum")
        depths = {adapter.n_layers for adapter in adapters if adapter.n_layers is not None}
        if len(depths) > 1:
            raise ValueError(f"adapters: made for models of different depth, {sorted(depths)} layers")
        parts = [one for adapter in adapters for one in adapter.interventions]
        return cls(summed(parts), n_layers=depths.pop() if depths else None, base=_common_base(adapters))

    def select_subspace(self, rows: Sequence[int]) -> Adapter:
        """An adapter that keeps only the given of the r rows of D, U and c, in that order.

        For LoReFT this is R[rows], W[rows], b[rows]; for a "folded" adapter, rows of the fold. The tensors
        are copies, and the result is not trainable.

        Raises:
            ValueError: rows that are empty, named twice, or that an intervention lacks.
        """
        kept = with_rows(self.interventions, rows)
        config = self.config and dataclasses.replace(self.config, r=kept[0].rank)
        return type(self)(kept, config, self.n_layers, self.saved_modules.stored_copy(), self.base)

    def extra_repr(self) -> str:
        return f"width={self.width}, groups={[str(g) for g in self.groups]}, trainable={self.trainable}"


def _check_together(interventions: list[Intervention], n_layers: int | None) -> None:
    if not interventions:
        raise ValueError("interventions: an adapter needs at least one")
    places: dict[tuple[str, int, int | None], list[Intervention]] = {}
    for one in interventions:
        if one.width != interventions[0].width:
            raise ValueError(
                f"interventions: one adapter has one width; layer {one.layer} has {one.width}, "
                f"layer {interventions[0].layer} has {interventions[0].width}"
            )
        if n_layers is not None and one.layer >= n_layers:
            raise ValueError(f"layer: the model has no layer {one.layer}; it has {n_layers}")
        others = places.setdefault((one.site, one.layer, one.head), [])
        for other in others:
            if one.positions.overlaps(other.positions):
                raise ValueError(
                    f"positions: two interventions at {one.site} of layer {one.layer} would edit the same "
                    f"token: {str(other.positions)!r} and {str(one.positions)!r}"
                )
        others.append(one)


def _common_base(adapters: Sequence[Adapter]) -> BaseModel | None:
    """The model that the adapters were made for, as far as known; None, with a warning, if several."""
    known = [adapter.base for adapter in adapters if adapter.base is not None]
    for base in known[1:]:
        if not base.matches(known[0]):
            warnings.warn(f"adapters: were made for {known[0]} and for {base}", stacklevel=3)
            return None
    return known[0] if known else None


def _check_trainable(method: str) -> None:
    if not METHODS[method].trainable:
        able = ", ".join(name for name, spec in METHODS.items() if spec.trainable)
        raise ValueError(f"method: {method} can't be trained here; {able} can")


def _widen_orthonormal(one: Intervention) -> None:
    """R in float32 at least, as half precision can't hold orthonormal rows."""
    for name in METHODS[one.method].orthonormal:
        parameter = getattr(one, name)
        error = orthonormality_error(parameter)
        if not error < _ORTHONORMAL:
            warnings.warn(
                f"{name} of layer {one.layer} is not orthonormal (|R Rᵀ − I| up to {error:.2g}): training "
                "starts from its orthonormal factor, not from the adapter as it was",
                stacklevel=4,
            )
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _fresh(
    method: str, rank: int, width: int, dtype: torch.dtype, generator: torch.Generator | None
) -> dict[str, Tensor]:
    spec = METHODS[method]
    bound = 1 / math.sqrt(width)
    tensors: dict[str, Tensor] = {}
    for name, kind in spec.shapes.items():
        if name in spec.orthonormal:
            rows = torch.empty(rank, width, dtype=torch.promote_types(dtype, torch.float32))
            tensors[name] = nn.init.orthogonal_(rows, generator=generator)
        else:
            shape = (rank, width) if kind == "rd" else (rank,)
            drawn = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32))
            tensors[name] = drawn.uniform_(-bound, bound, generator=generator).to(dtype)
    return tensors
