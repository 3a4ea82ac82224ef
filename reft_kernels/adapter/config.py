"""`ReftConfig`: what a fresh adapter should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..positions import LastPosition, Positions
from ..sites import SITES, canonical, has_layers, takes_heads
from .methods import METHODS, activation

#: Stands between an adapter's name and that of its subspace, so none of these may have it.
SUBSPACE_MARK = "/"


def _integers(name: str, value: Any, what: str) -> tuple[int, ...]:
    """`value` as a tuple of distinct integers, at least one."""
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not listed or not value or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
        raise ValueError(f"{name}: must be {what}, was {value!r}")
    if len(set(value)) != len(value):
        raise ValueError(f"{name}: a number stands twice in {list(value)!r}")
    return tuple(value)


@dataclasses.dataclass(frozen=True)
class ReftConfig:
    """Shape and place of an adapter.

    >>> config = ReftConfig(r=8, layers=[2, -1], positions="f3+l3")
    >>> config.resolve_layers(12)
    [2, 11]
    >>> [str(group) for group in config.position_groups()]  # f and l have parameters of their own
    ['f3', 'l3']

    Attributes:
        method: "loreft", "direft", … (docs/methods.md has the table), or one that `register_method` added.
        r: rank, at least 1; where rows are kept orthonormal the width of the hidden state bounds it. By
            default the method's: 4 for most, 1 for vectors.
        layers: "all", or distinct layer numbers; negative ones count from the last layer.
        site: where in the layer, one of `reft_kernels.sites.SITES`, a synonym of one, or a module's path
            (docs/sites.md).
        positions: which tokens: "f3+l3", "all", "prompt[2:-1]+generated", … (docs/positions.md), or a list
            of indices into the prompt.
        share_weights: whether all terms of a union share parameters. False gives each a set of its own.
            None is False for the f and the l positions of "f3+l3", as in pyreft, and True for other unions.
        act_fn: an activation by transformers' name, or None.
        dropout: probability with which an element of an edited hidden state is dropped in training, [0, 1).
        last_position: what an l position counts back from: the prompt's "length", or "length-1".
        heads: attention heads, for sites of one head such as "head_attention_value_output" only (one
            intervention a head).
        modules_to_save: names of modules of which the adapter trains and saves a copy of its own, such as
            ["classifier"] or ["score"]; every module of the model whose path ends so.
        options: settings of the method by name, such as {"coefficient": 2.0}.
        subspaces: rows of the r by name, such as {"happy": [0, 1], "formal": [2, 3]}; calls take
            "adapter/happy" for an adapter's name, and edit and train those rows alone.

    Raises:
        ValueError: a field is not what it may be.
    """

    method: str = "loreft"
    r: int = None  # type: ignore[assignment] # the method's own, set below
    layers: Literal["all"] | Sequence[int] = "all"
    site: str = "block_output"
    positions: str | Sequence[int] | Positions = "f3+l3"
    share_weights: bool | None = None
    act_fn: str | None = None
    dropout: float = 0.0
    last_position: LastPosition = "length"
    heads: Sequence[int] | None = None
    modules_to_save: Sequence[str] | None = None
    options: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    subspaces: Mapping[str, Sequence[int]] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(
                f"method: must be one of {', '.join(METHODS)} (register_method adds your own); "
                f"was {self.method!r}"
            )
        if self.r is None:
            self._set("r", METHODS[self.method].rank)
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r: must be an integer of at least 1, was {self.r!r}")
        if self.layers != "all":
            self._set("layers", _integers("layers", self.layers, 'a list of layer numbers, or "all"'))
        self._set("site", canonical(self.site))
        if (self.heads is not None) != takes_heads(self.site):
            of_heads = ", ".join(site for site in SITES if takes_heads(site))
            raise ValueError(
                f"heads: needed for the sites of one head ({of_heads}) and for no other; was {self.heads!r} "
                f"for {self.site!r}"
            )
        if self.heads is not None:
            self._set("heads", _integers("heads", self.heads, "a list of head numbers from 0 up"))
            if min(self.heads) < 0:
                raise ValueError(f"heads: must be head numbers from 0 up, was {list(self.heads)}")
        if not isinstance(self.share_weights, bool | None):
            raise ValueError(f"share_weights: must be True, False or None, was {self.share_weights!r}")
        if activation(self.act_fn) and not METHODS[self.method].takes_activation:
            raise ValueError(f"act_fn: {self.method} takes none, was {self.act_fn!r}")
        METHODS[self.method].check_site(self.site)
        check_dropout(self.dropout)
        self._set("options", self._checked_options())
        if self.subspaces is not None:
            METHODS[self.method].check_subspaces()
            self._set("subspaces", check_named_rows(self.subspaces, self.r))
        if self.modules_to_save is not None:
            self._set("modules_to_save", _module_names(self.modules_to_save))
        if isinstance(self.positions, Positions):
            self._set("last_position", self.positions.last_position)
        # What was written is kept in its shortest form, so that equal configs compare equal.
        parsed = Positions.parse(self.positions, self.last_position)
        spec = parsed.to_json()
        self._set("positions", spec if isinstance(spec, str) else tuple(spec))
        if self.share_weights is None:
            self._set("share_weights", parsed.terms is not None)

    def _checked_options(self) -> dict[str, Any] | None:
        """What was given, None for nothing."""
        if self.options is not None and not isinstance(self.options, Mapping):
            raise ValueError(f"options: must be settings by name, was {self.options!r}")
        METHODS[self.method].resolve(self.options)
        return dict(self.options) if self.options else None

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def resolve_layers(self, n_layers: int) -> list[int]:
        """The layers' numbers in a model of `n_layers` layers, in the order given.

        Raises ValueError that names a layer which the model lacks, or which is named twice.
        """
        if not has_layers(self.site):
            if self.layers != "all" and tuple(self.layers) != (0,):
                raise ValueError(f"layers: {self.site!r} is in no layer, so give none; was {self.layers!r}")
            return [0]
        if self.layers == "all":
            return list(range(n_layers))
        found: list[int] = []
        for layer in self.layers:
            if not -n_layers <= layer < n_layers:
                raise ValueError(
                    f"layers: the model has no layer {layer}; it has {n_layers} "
                    f"(0 to {n_layers - 1}, or −{n_layers} to −1 from the end)"
                )
            resolved = layer % n_layers
            if resolved in found:
                raise ValueError(f"layers: {list(self.layers)} names layer {resolved} twice ({layer})")
            found.append(resolved)
        return found

    def position_groups(self) -> tuple[Positions, ...]:
        """The position specs that have parameters of their own: one, or one for each term."""
        parsed = Positions.parse(self.positions, self.last_position)
        return (parsed,) if self.share_weights else parsed.untied()

    def without_subspaces(self) -> ReftConfig:
        """The same but for names of rows."""
        return self if self.subspaces is None else dataclasses.replace(self, subspaces=None)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ReftConfig:
        """What `to_dict` gave. Raises ValueError, also for fields that a config does not have."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"'config': {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them; `from_dict` makes an equal config of them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("options", "subspaces"):
            if fields[name] is None:
                del fields[name]  # earlier versions don't know the field
        if "subspaces" in fields:
            fields["subspaces"] = {name: list(rows) for name, rows in fields["subspaces"].items()}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


def _module_names(value: Any) -> tuple[str, ...]:
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not listed or not value or any(not isinstance(name, str) or not name for name in value):
        raise ValueError(f"modules_to_save: must be a list of module names, was {value!r}")
    if len(set(value)) != len(value):
        raise ValueError(f"modules_to_save: a name stands twice in {list(value)!r}")
    return tuple(value)


def check_dropout(dropout: float) -> None:
    """Raises ValueError unless `dropout` is a probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"dropout: must be a probability in [0, 1), was {dropout!r}")


def check_named_rows(given: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """The rows of each subspace by its name. Raises ValueError that names `subspaces`."""
    if not isinstance(given, Mapping):
        raise ValueError(f"subspaces: must be rows by name, such as {{'happy': [0, 1]}}; was {given!r}")
    for name, rows in given.items():
        if not isinstance(name, str) or not name or SUBSPACE_MARK in name:
            raise ValueError(f"subspaces: a name must be a string without {SUBSPACE_MARK!r}, was {name!r}")
        listed = isinstance(rows, Sequence) and not isinstance(rows, str)
        if not listed or not rows or any(isinstance(i, bool) or not isinstance(i, int) for i in rows):
            raise ValueError(f"subspaces: {name!r} must be a list of row numbers, was {rows!r}")
        if len(set(rows)) < len(rows) or min(rows) < 0 or max(rows) >= rank:
            raise ValueError(
                f"subspaces: the rows of {name!r} must be distinct and from 0 to {rank - 1}, was {list(rows)}"
            )
    return {name: tuple(rows) for name, rows in given.items()}
