"""`Adapter`: the interventions that make up one adapter, without a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import AdapterRecord, BaseModel, CheckpointError, native, read
from ..positions import LastPosition, Positions
from ..scale_pool import AnyFold
from .compose import check_together, check_weights, common_base, summed
from .config import ReftConfig
from .construct import Where, from_tensors
from .intervention import Drawn, Intervention
from .methods import METHODS
from .orthonormal import only_rows, orthonormal_rows
from .saved_modules import SavedModules
from .subspaces import Subspaces


class Adapter(Subspaces, nn.Module):
    """Interventions at layers, sites and positions; what a checkpoint holds and what a pool is filled from.

    >>> import reft_kernels as rk
    >>> adapter = rk.Adapter.from_config(rk.ReftConfig(r=4, layers=[1], positions="l1"), n_layers=2, width=64)
    >>> adapter.pool_rows, adapter.select_subspace([0, 3]).pool_rows
    (4, 2)
    >>> rk.Adapter.compose([adapter, adapter]).pool_rows
    8

    Args:
        interventions: at least one, all of one width. Where several at one place share a token their edits
            add up, each of the unedited state; no two of a place may have the same positions.
        config: what the adapter was made from, if known.
        n_layers: depth of the model it was made for, if known.
        saved_modules: copies of the model's modules that belong to the adapter; by default those that the
            config's `modules_to_save` names, made when it is added to a model.
        base: the model that it was made for, if known; a patched model sets it on adapters that train.
        subspaces: rows by name, see `subspaces`; by default the config's.

    Attributes:
        interventions: the `Intervention`s, in a stable order.
        groups: the distinct position specs; `intervention.group` is an index into them.
        width: d, the length of the hidden states.
        overlapping: whether interventions at one place may share a token.

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
        subspaces: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        listed = list(interventions)
        self.overlapping = check_together(listed, n_layers)
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
        self.subspaces = subspaces or (config and config.subspaces) or {}

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
                one.spec.check_trainable()
            for one in self.interventions:
                one.widen_orthonormal()
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
            one.spec.check_trainable()
            one.orthonormalize = True
            one.requires_grad_(True)
        self.saved_modules.requires_grad_(True)
        self._trainable = True

    def folds(self, drawn: Drawn | None = None, rows: Sequence[int] | None = None) -> list[AnyFold]:
        """The fold of every intervention, in order; the same values as `intervention.fold()` one by one.

        While the adapter is trainable, R is made orthonormal in one batch for all interventions of a shape.

        drawn: as of `Intervention.fold`, for those that drew something. rows: of a subspace; the other rows
        of R then get no gradient.
        """
        batches: dict[tuple, list[tuple[int, str, Tensor]]] = {}
        for index, one in enumerate(self.interventions):
            for name in one.trains_orthonormal:
                tensor = getattr(one, name)
                key = (tensor.shape, tensor.dtype, tensor.device)
                batches.setdefault(key, []).append((index, name, tensor))
        ready: list[dict[str, Tensor]] = [{} for _ in self.interventions]
        for batch in batches.values():
            stacked = only_rows(torch.stack([tensor for _, _, tensor in batch]), rows)
            results = orthonormal_rows(stacked).unbind()
            for (index, name, _), result in zip(batch, results):
                ready[index][name] = result
        return [one.fold(found, (drawn or {}).get(one)) for one, found in zip(self.interventions, ready)]

    def check_scale(self, scale: float, argument: str = "scale") -> None:
        """Raises ValueError, which names the argument, where the edits times this mean nothing."""
        for one in self.interventions:
            one.spec.check_scale(scale, argument)

    def rescale(self, scale: float) -> None:
        """Multiplies the edits by a finite number, in place of the one before; it is saved with the adapter.

        For an adapter that is on no model yet; calls of a model take `scale` for each of their rows.
        """
        self.check_scale(scale)
        for one in self.interventions:
            one.scale = float(scale)

    def penalty(self) -> Tensor:
        """What the methods add to the loss in training, a scalar; 0 where they add nothing.

        Differentiable; `ReftTrainer` adds it to the loss of a step, and so does a loop of your own.
        """
        found = [it for one in self.interventions if (it := one.penalty()) is not None]
        if not found:
            return torch.zeros((), device=next(self.parameters()).device)
        return torch.stack(found).sum()

    @classmethod
    def from_config(
        cls,
        config: ReftConfig,
        n_layers: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> Adapter:
        """A fresh, trainable adapter, initialised as the method says (docs/methods.md).

        Of pyreft's methods as pyreft does: R has orthonormal rows (of a Gaussian matrix) in float32 at least;
        W and b are a torch.nn.Linear's, uniform in ±1/√d. They are drawn on the CPU.

        Args:
            config: rank, layers, site and positions.
            n_layers: depth of the model.
            width: d at the config's site (a head's width at "head_attention_value_output").
            dtype: of the parameters that are not kept orthonormal.
            generator: source of the random numbers; None for torch's own.

        Raises:
            ValueError: a layer that the model lacks, a rank above the width, a method that can't be trained.
        """
        method = METHODS[config.method]
        method.check_trainable()
        options = method.resolve(config.options)
        if config.r > width and method.orthonormal:
            raise ValueError(f"r: {config.r} rows can't be orthonormal in a width of {width}")
        made: list[Intervention] = []
        for positions in config.position_groups():
            for layer in config.resolve_layers(n_layers):
                for head in config.heads or (None,):
                    tensors = method.fresh(config.r, width, dtype, options, generator)
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
                            options=options,
                        )
                    )
        adapter = cls(made, config=config, n_layers=n_layers)
        adapter.trainable = True
        return adapter

    @classmethod
    def from_tensors(
        cls,
        method: str,
        tensors: Mapping[Where, Tensor | Mapping[str, Tensor]],
        *,
        site: str = "block_output",
        positions: str | Sequence[int] | Positions = "all",
        act_fn: str | None = None,
        options: Mapping[str, Any] | None = None,
        per_position: bool = False,
        n_layers: int | None = None,
    ) -> Adapter:
        """An adapter of tensors that were computed elsewhere: a steering vector, a direction, a feature.

        >>> import reft_kernels as rk
        >>> happy = torch.ones(8)
        >>> push = rk.Adapter.from_tensors("vector", {14: happy}, options={"coefficient": 2.0})
        >>> push.interventions[0].coefficient.tolist(), push.interventions[0].v.shape
        ([2.0], torch.Size([1, 8]))
        >>> calm = rk.Adapter.from_tensors("ablation", dict.fromkeys(range(4), happy), site="mlp_output")

        Args:
            method: a method's name; docs/methods.md has its parameters.
            tensors: by layer, or by (layer, head) at a head's site: the parameters by name, or the first of
                them alone. [d] stands for one row of [r, d]. They are not copied.
            site, positions: of all of them.
            act_fn, options: of the method. An option fills the parameter of its name that is not given.
            per_position: row i of the parameters is for the i-th of `positions`, a list of indices into the
                prompt (ActAdd).
            n_layers: depth of the model, for negative layers.

        Returns:
            An adapter that is not trainable yet.

        Raises:
            ValueError: names what is missing, unknown or of another shape than it must be.
        """
        made = from_tensors(method, tensors, site, positions, act_fn, options, per_position, n_layers)
        return cls(made, n_layers=n_layers)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        positions: str | Sequence[int] | Positions | None = None,
        act_fn: str | None = None,
        dropout: float | None = None,
        last_position: LastPosition | None = None,
        scale: float | None = None,
    ) -> Adapter:
        """Reads an adapter from a folder, or from the Hugging Face hub by its "organisation/name".

        Args:
            path: a folder that `save_pretrained` wrote, pyreft's `save`, or RED's code (delta_vector.pth).
            positions, act_fn, dropout, last_position: for a folder of pyreft's only, which does not hold
                them; positions is required there, and of RED. The others: None, 0.0 and "length".
            scale: what its edits are multiplied by; by default what the file says.

        Returns:
            An adapter on the CPU, in the stored dtypes, not trainable.

        Raises:
            reft_kernels.checkpoint.CheckpointError: (a ValueError) names the file and what is wrong with it.
        """
        record = read(path, positions=positions, act_fn=act_fn, dropout=dropout, last_position=last_position)
        adapter = cls.from_record(record)
        if scale is not None:
            adapter.rescale(scale)
        return adapter

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
            adapter = cls(made, config, record.n_layers, saved, record.base, record.subspaces)
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
            config=None if self.config is None else self.config.without_subspaces().to_dict(),
            modules=self.saved_modules.tensors(),
            raw=raw and self.trainable,
            base=self.base,
            subspaces=self.subspaces,
        )

    @classmethod
    def compose(
        cls, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, in_turn: bool = False
    ) -> Adapter:
        """The sum of several adapters' edits, each computed from the unedited hidden state.

        The result is not trainable. Warns of adapters that were made for different models.

        Args:
            adapters: at least one.
            weights: what each one's edits are multiplied by; by default 1.
            in_turn: each edits what those before it have left; of low rank only the last with an activation.

        Raises:
            ValueError: no adapters; widths or depths that differ; weights that are no finite numbers, or
                that a method does not take; edits that in turn are not one edit.
        """
        if not adapters:
            raise ValueError("adapters: at least one is needed")
        factors = check_weights(adapters, weights)
        if any(adapter.saved_modules for adapter in adapters):
            raise ValueError("adapters: those with modules_to_save can't be composed, as modules have no sum")
        depths = {adapter.n_layers for adapter in adapters if adapter.n_layers is not None}
        if len(depths) > 1:
            raise ValueError(f"adapters: made for models of different depth, {sorted(depths)} layers")
        parts = [(one, w) for adapter, w in zip(adapters, factors) for one in adapter.interventions]
        depth = depths.pop() if depths else None
        return cls(summed(parts, in_turn), n_layers=depth, base=common_base(adapters))

    def extra_repr(self) -> str:
        return f"width={self.width}, groups={[str(g) for g in self.groups]}, trainable={self.trainable}"
