"""One intervention: a method's parameters at a layer, a site and a set of positions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError, InterventionRecord
from ..ops.schema import Act
from ..positions import Positions
from ..scale_pool import AnyFold
from ..sites import canonical, takes_heads
from .config import check_dropout
from .methods import METHODS, Method, activation
from .orthonormal import only_rows, orthonormal_rows, orthonormality_error

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Above this |R Rᵀ − I|, training starts visibly elsewhere than the adapter stood.
_ORTHONORMAL = 1e-3


#: The random numbers of one forward in training, of the interventions that drew any.
Drawn = Mapping["Intervention", Mapping[str, Tensor]]


class Intervention(nn.Module):
    """An edit of the hidden states at one place.

    Args:
        method: a name of `METHODS`.
        layer: number of the decoder layer, from 0.
        site: where in the layer (see `reft_kernels.sites.SITES`).
        positions: which tokens.
        tensors: the method's parameters by name, shaped as its `shapes` say; they are not copied.
        act_fn: an activation by transformers' name, or None.
        dropout: probability with which an element of the edited hidden state is dropped in training.
        head: the attention head, for sites of one head such as "head_attention_value_output" only.
        options: settings of the method; those that are not given have the method's defaults.
        scale: what the edit is multiplied by.

    Attributes:
        keeps_norm: whether an edited token gets the norm back that it had before the edit.
        group: index of `positions` among the adapter's position groups (set by the adapter).
        orthonormalize: whether the fold takes the parameters named in the method's `orthonormal` through
            `orthonormal_rows` (set by the adapter while it is trainable).
        row_order: [pool_rows] int64, the order of the fold's rows, where the adapter has subspaces.

    Raises:
        ValueError: an argument is not what it may be; shapes or dtypes don't fit each other.
    """

    def __init__(
        self,
        method: str,
        layer: int,
        site: str,
        positions: Positions,
        tensors: Mapping[str, Tensor],
        *,
        act_fn: str | None = None,
        dropout: float = 0.0,
        head: int | None = None,
        options: Mapping[str, Any] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_place(method, layer, site, head, act_fn, dropout)
        self.method, self.layer, self.site, self.head = method, layer, site, head
        self.positions, self.act_fn, self.dropout = positions, act_fn, float(dropout)
        self.group = 0
        self.orthonormalize = False
        resolved = self.spec.resolve(options)
        self.options = self.spec.stored(resolved)
        self.keeps_norm = bool(resolved.get("keep_norm"))
        if self.keeps_norm:  # what folders without it mean is not written
            self.options["keep_norm"] = True
        _check_tensors(self.spec, tensors)
        self.spec.check(tensors, activation(act_fn), self.options)
        self.scale = self.spec.check_scale(scale)
        self.names = tuple(name for name in self.spec.shapes if name in tensors)
        self._folded_to: tuple[int, str] | None = None
        self.row_order: Tensor | None
        self.register_buffer("row_order", None, persistent=False)
        for name in self.names:
            if name in self.spec.fixed:
                self.register_buffer(name, tensors[name].detach())
            else:
                self.register_parameter(name, nn.Parameter(tensors[name].detach(), requires_grad=False))

    @classmethod
    def from_record(cls, record: InterventionRecord) -> Intervention:
        """What a file described. Raises CheckpointError that names it where that is no intervention."""
        try:
            made = cls(
                record.method,
                record.layer,
                record.site,
                record.positions,
                record.tensors,
                act_fn=record.act_fn,
                dropout=record.dropout,
                head=record.head,
                options=record.options,
                scale=record.scale,
            )
        except ValueError as error:
            raise CheckpointError(f"{record.where}: {error}") from error
        if made.rank != record.rank:
            raise CheckpointError(
                f"{record.where}: 'rank' is {record.rank}, its tensors have {made.rank} rows"
            )
        return made

    def to_record(self, raw: bool = False) -> InterventionRecord:
        """What a file holds of it. raw: the parameters as they are, rather than as the fold uses them."""
        tensors = {name: getattr(self, name) for name in self.names} if raw else self.materialized()
        return InterventionRecord(
            method=self.method,
            layer=self.layer,
            site=self.site,
            positions=self.positions,
            rank=self.rank,
            tensors=tensors,
            head=self.head,
            act_fn=self.act_fn,
            dropout=self.dropout,
            options=self.options,
            scale=self.scale,
        )

    @property
    def spec(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    @property
    def _first(self) -> Tensor:
        return getattr(self, self.names[0])

    @property
    def width(self) -> int:
        """d, the length of the hidden state."""
        return self._first.shape[1]

    @property
    def rank(self) -> int:
        """r, before folding."""
        return self._first.shape[0]

    @property
    def pool_rows(self) -> int:
        """Pool rows that the fold takes: r, or more where an edit is a sum of several; 1 if elementwise."""
        return self._fold_shape[0]

    @property
    def form(self) -> str:
        """What the fold is: "low_rank" (`Fold`) or "elementwise" (`ScaleFold`)."""
        return self._fold_shape[1]

    @property
    def _fold_shape(self) -> tuple[int, str]:
        if self._folded_to is None:
            with torch.no_grad():  # as it is: only the shape counts
                fold = self.fold({name: getattr(self, name) for name in self.names})
            self._folded_to = fold.rank, fold.form
        return self._folded_to

    @property
    def wants_grad(self) -> bool:
        """Whether a parameter requires a gradient."""
        return any(p is not None and p.requires_grad for p in self._parameters.values())

    @property
    def trains_orthonormal(self) -> tuple[str, ...]:
        """Names of the parameters that the fold takes through `orthonormal_rows`; none unless trainable."""
        return self.spec.orthonormal if self.orthonormalize else ()

    def materialized(self, orthonormal: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The parameters that the formula uses, by name: those kept orthonormal have been made so.

        Args:
            orthonormal: the results of `orthonormal_rows` by name, where the caller has them already.
        """
        tensors = {name: getattr(self, name) for name in self.names}
        if orthonormal is None:
            orthonormal = {name: orthonormal_rows(tensors[name]) for name in self.trains_orthonormal}
        return tensors | dict(orthonormal)

    def fold(
        self, orthonormal: Mapping[str, Tensor] | None = None, drawn: Mapping[str, Tensor] | None = None
    ) -> AnyFold:
        """The one form h + Uᵀ φ(D h + c), or s ⊙ h + v: `pool_rows` rows, in the widest of the parameters'
        dtypes and float32. Differentiable in the parameters; sums and differences are taken in that dtype.

        Args:
            orthonormal: as in `materialized`.
            drawn: what `draw` gave, for a forward in training.
        """
        return self._folded(self._widened(orthonormal) | dict(drawn or {}))

    @torch.no_grad()
    def draw(self) -> dict[str, Tensor]:
        """The random numbers of one forward in training; none for nearly all methods."""
        if type(self.spec).draw is Method.draw:
            return {}
        return self.spec.draw({name: getattr(self, name) for name in self.names}, self.options)

    @property
    def has_penalty(self) -> bool:
        """Whether the method has one."""
        return type(self.spec).penalty is not Method.penalty

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss in training, a scalar; None for nothing."""
        return self.spec.penalty(self._widened(), self.options) if self.has_penalty else None

    def _widened(self, orthonormal: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """`materialized` in one dtype: the widest of the parameters' and float32."""
        tensors = self.materialized(orthonormal)
        wide = torch.float32
        for tensor in tensors.values():
            if tensor.is_floating_point():
                wide = torch.promote_types(wide, tensor.dtype)
        return {name: t.to(wide) if t.is_floating_point() else t for name, t in tensors.items()}

    def _folded(self, tensors: dict[str, Tensor]) -> AnyFold:
        fold = self.spec.fold(tensors, activation(self.act_fn), self.options).times(self.scale)
        order = self._buffers["row_order"]  # past nn.Module's way of finding it, which is slow
        parts = fold if order is None else (tensor.index_select(0, order) for tensor in fold)
        return type(fold)(*(tensor.contiguous() for tensor in parts))

    def orthonormal_of(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The parameters that training keeps orthonormal, made so; only these rows get a gradient."""
        return {n: orthonormal_rows(only_rows(getattr(self, n), rows)) for n in self.trains_orthonormal}

    def check_rows_apart(self) -> None:
        """Raises ValueError, which names `subspaces`, where a row of the parameters is no edit by itself."""
        self.spec.check_subspaces()
        shared = [name for name in self.names if "r" not in self.spec.shapes[name]]
        if shared:
            raise ValueError(f"subspaces: {self.method} has {', '.join(shared)}, which belongs to no row")
        if self.pool_rows % self.rank:
            raise ValueError(
                f"subspaces: {self.method} folds {self.rank} rows to {self.pool_rows}, which tells none apart"
            )

    def lay_rows(self, order: Sequence[int] | None) -> None:
        """In which order the fold has the parameters' rows; None for theirs. Rows of the fold that are of one
        row (those r apart) come to lie side by side."""
        if order is None:
            self.row_order = None
        else:
            times = self.pool_rows // self.rank
            index = [part * self.rank + row for row in order for part in range(times)]
            self.row_order = torch.tensor(index, device=self._first.device)

    def widen_orthonormal(self) -> None:
        """Makes R float32 at least, as half precision can't hold orthonormal rows; warns if they are not."""
        for name in self.spec.orthonormal:
            parameter = getattr(self, name)
            error = orthonormality_error(parameter)
            if not error < _ORTHONORMAL:
                warnings.warn(
                    f"{name} of layer {self.layer} is not orthonormal (|R Rᵀ − I| up to {error:.2g}): "
                    "training starts from its orthonormal factor, not from the adapter as it was",
                    stacklevel=4,
                )
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def extra_repr(self) -> str:
        head = "" if self.head is None else f", head={self.head}"
        act = "" if self.act_fn is None else f", act_fn={self.act_fn!r}"
        norm = ", keep_norm=True" if self.keeps_norm else ""
        return (
            f"{self.method}, r={self.rank}, width={self.width}, layer={self.layer}, site={self.site!r}{head}"
            f", positions={str(self.positions)!r}{act}{norm}"
        )


def _check_place(
    method: str, layer: int, site: str, head: int | None, act_fn: str | None, dropout: float
) -> None:
    if method not in METHODS:
        raise ValueError(
            f"method: must be one of {', '.join(METHODS)} (register_method adds your own); was {method!r}"
        )
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layer: must be a layer's number from 0 up, was {layer!r}")
    if canonical(site) != site:
        raise ValueError(f"site: {site!r} is called {canonical(site)!r} here")
    METHODS[method].check_site(site)
    if takes_heads(site):
        if isinstance(head, bool) or not isinstance(head, int) or head < 0:
            raise ValueError(f"head: must be a head's number from 0 up at {site}, was {head!r}")
    elif head is not None:
        raise ValueError(f"head: must be None at {site}, was {head!r}")
    if activation(act_fn) is not Act.NONE and not METHODS[method].takes_activation:
        raise ValueError(f"act_fn: {method} takes none, was {act_fn!r}")
    check_dropout(dropout)


def _check_tensors(spec: Method, tensors: Mapping[str, Tensor]) -> None:
    unknown = [name for name in tensors if name not in spec.shapes]
    missing = [name for name in spec.shapes if name not in tensors and name not in spec.optional]
    if unknown or missing:
        raise ValueError(
            f"parameters of {spec.name}: must be {', '.join(spec.shapes)}; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
        )
    first = next(iter(spec.shapes))
    if tensors[first].dim() != 2:
        raise ValueError(f"{first}: must be [r, d], was {list(tensors[first].shape)}")
    rank, width = tensors[first].shape
    if rank < 1 or width < 1:
        raise ValueError(f"{first}: must be [r, d] with r and d at least 1, was {[rank, width]}")
    for name, tensor in tensors.items():
        shape = spec.shape(name, rank, width)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: must be {list(shape)} beside {first}, was {list(tensor.shape)}")
        if name != "kind" and tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{name}: dtype must be one of {', '.join(map(str, _FLOATS))}, was {tensor.dtype}"
            )
        if tensor.device != tensors[first].device:
            raise ValueError(f"{name}: is on {tensor.device}, but {first} is on {tensors[first].device}")
