"""`Method`: one way to edit hidden states, and the registry that configs and files name methods from.

docs/methods.md has the table of those that there are, and an example of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.schema import NO_PRODUCT, Act
from ..pool import Fold
from ..scale_pool import AnyFold
from ..sites import SITES

#: Names of activations (transformers' ACT2FN) → codes of the kernels.
ACTIVATIONS: dict[str, Act] = {
    "linear": Act.NONE,
    "relu": Act.RELU,
    "gelu": Act.GELU,
    "gelu_python": Act.GELU,
    "gelu_new": Act.GELU_TANH,
    "gelu_fast": Act.GELU_TANH,
    "gelu_accurate": Act.GELU_TANH,
    "gelu_python_tanh": Act.GELU_TANH,
    "gelu_pytorch_tanh": Act.GELU_TANH,
    "silu": Act.SILU,
    "swish": Act.SILU,
    "sigmoid": Act.SIGMOID,
    "tanh": Act.TANH,
    "quick_gelu": Act.QUICK_GELU,
    "leaky_relu": Act.LEAKY_RELU,
}


def activation(act_fn: str | None) -> Act:
    """The code of an activation's name. Raises ValueError that lists the names."""
    if act_fn is None:
        return Act.NONE
    if not isinstance(act_fn, str) or act_fn not in ACTIVATIONS:
        raise ValueError(f"act_fn: must be None or one of {', '.join(ACTIVATIONS)}; was {act_fn!r}")
    return ACTIVATIONS[act_fn]


#: An intervention's tensors by name.
Parameters = Mapping[str, Tensor]
#: A method's options by name, all of them.
Options = Mapping[str, Any]


class Option(NamedTuple):
    """A setting that a method takes beside its parameters; a value that JSON knows.

    default: what holds where nothing is given. fits: whether a value is one. allowed: which are, in words.
    """

    default: Any
    fits: Callable[[Any], bool]
    allowed: str


def number(default: float) -> Option:
    """An option that is a finite number."""
    return Option(default, _is_number, "a finite number")


def flag(default: bool) -> Option:
    """An option that is True or False."""
    return Option(default, lambda value: isinstance(value, bool), "True or False")


def word(default: str, *others: str) -> Option:
    """An option that is one of some words."""
    words = (default, *others)
    return Option(default, lambda value: value in words, f"one of {', '.join(map(repr, words))}")


#: Options of every method. keep_norm: edited tokens get the norm back that they had before the edit.
EVERY: dict[str, Option] = {"keep_norm": flag(False)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Method:
    """One way to edit a hidden state h, of the form h + Uᵀ φ(D h + c). Subclass it, and register an instance.

    >>> class Push(rk.Method):  # h + s (V h + b) V: a push along r directions
    ...     shapes = {"V": "rd", "b": "r"}
    ...     options = {"strength": rk.Option(1.0, lambda value: isinstance(value, float), "a float")}
    ...     def fold(self, p, act, options):
    ...         return self.rows(p["V"], options["strength"] * p["V"], p["b"])
    >>> rk.register_method("push", Push())
    >>> config = rk.ReftConfig(method="push", r=2, layers=[0], positions="all", options={"strength": 0.5})
    >>> rk.Adapter.from_config(config, n_layers=1, width=8).pool_rows
    2
    >>> rk.unregister_method("push")

    Attributes:
        shapes: parameter → its axes, each "r" (the rank) or "d" (the width of h): "rd" is [r, d], "r" is [r],
            "d" is [d] and "" one number. The first is "rd": rank and width are read off it.
        optional: parameters that may be absent.
        fixed: parameters that are never trained. One that is called as an option, and was not given, is
            filled with the option.
        orthonormal: parameters [r, d] whose rows training keeps orthonormal; their r is at most d.
        takes_activation: whether an act_fn means something.
        options: settings by name, beside `EVERY`. Those that are no fixed parameter's are given to `fold` and
            stored.
        sites: where the method means something; None for every site.
        trainable: whether it can be trained.
        separable: whether the edit is a sum over the rows, so that some of them are an edit by themselves (a
            subspace). Of k·r rows of the fold those r apart are one row's, as `joined` leaves them.
        scalable: whether the edit times a number (an adapter's `scale`) means something.
        rank: the r of a config that names none.
        name: what it is registered as.
    """

    shapes: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[frozenset[str]] = frozenset()
    fixed: ClassVar[frozenset[str]] = frozenset()
    orthonormal: ClassVar[tuple[str, ...]] = ()
    takes_activation: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Option]] = {}
    sites: ClassVar[tuple[str, ...] | None] = None
    trainable: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    scalable: ClassVar[bool] = True
    rank: ClassVar[int] = 4
    name: str = ""

    # What a method of one's own says -----------------------------------------------------------------

    def fold(self, p: Parameters, act: Act, options: Options) -> AnyFold:
        """The edit in the one form, differentiable in the parameters; `rows` and `joined` make it. Or s ⊙ h +
        v, a `ScaleFold`. A method has one of the two forms, whatever its options.

        p: in one dtype, float32 at least. act: the code of the act_fn. options: all of them.
        """
        raise NotImplementedError(f"method {self.name!r} has no fold")

    def draw(self, p: Parameters, options: Options) -> dict[str, Tensor]:
        """The random numbers of one forward in training, by names that no parameter has: `fold` finds them
        among p there, and does not elsewhere. Drawn once a forward, whatever checkpointing runs again."""
        return {}

    def init(
        self, name: str, tensor: Tensor, width: int, options: Options, generator: torch.Generator | None
    ) -> None:
        """Fills a fresh parameter (float32 at least, on the CPU) in place.

        By default as pyreft does: rows that are kept orthonormal are a Gaussian matrix's, the others uniform
        in ±1/√d as of a torch.nn.Linear of d inputs.
        """
        if name in self.orthonormal:
            nn.init.orthogonal_(tensor, generator=generator)
        else:
            bound = 1 / math.sqrt(width)
            tensor.uniform_(-bound, bound, generator=generator)

    def has(self, name: str, options: Options) -> bool:
        """Whether a fresh adapter has this optional parameter."""
        return False

    def penalty(self, p: Parameters, options: Options) -> Tensor | None:
        """What is to be added to the loss in training, a scalar; None for nothing. p: as of `fold`."""
        return None

    def check(self, p: Parameters, act: Act, options: Options) -> None:
        """Raises ValueError, named after the parameter, for values or combinations that mean nothing."""

    # What it is given for that -----------------------------------------------------------------------

    @staticmethod
    def rows(down: Tensor | None, up: Tensor, bias: Tensor, act: Act = Act.NONE) -> Fold:
        """Rows upᵀ act(down h + bias): down and up [rows, d], bias [rows]. down None: upᵀ act(bias), and h is
        not read (so that an infinite h can't make a NaN of it)."""
        code = int(act) | (NO_PRODUCT if down is None else 0)
        kind = torch.full((up.shape[0],), code, dtype=torch.int32, device=up.device)
        return Fold(torch.zeros_like(up) if down is None else down, up, bias, kind)

    @staticmethod
    def joined(*folds: Fold) -> Fold:
        """The sum of several folds' edits, each of the unedited h."""
        return Fold(*(torch.cat(parts) for parts in zip(*folds)))

    # What is asked of it -----------------------------------------------------------------------------

    def shape(self, name: str, rank: int, width: int) -> tuple[int, ...]:
        """The shape of a parameter at this rank and width."""
        return tuple({"r": rank, "d": width}[axis] for axis in self.shapes[name])

    def resolve(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """All options of its own, of which some were given, and of `EVERY` those that are set.

        Raises ValueError that names one that is none.
        """
        given, known = {} if given is None else given, {**self.options, **EVERY}
        for name, value in given.items():
            if name not in known:
                listed = ", ".join(map(repr, known))
                raise ValueError(f"options: {self.name} has no {name!r}; it has {listed}")
            if not known[name].fits(value):
                raise ValueError(f"options: {name} must be {known[name].allowed}, was {value!r}")
        own = {name: given.get(name, option.default) for name, option in self.options.items()}
        return {**own, **{name: value for name in EVERY if (value := given.get(name))}}

    def stored(self, options: Options) -> dict[str, Any]:
        """The options that are kept beside the parameters: those that no fixed parameter has taken in."""
        return {
            name: value for name, value in options.items() if name not in self.fixed and name not in EVERY
        }

    def check_site(self, site: str) -> None:
        """Raises ValueError where the method means nothing at a site."""
        if self.sites is not None and site not in self.sites:
            allowed = ", ".join(map(repr, self.sites))
            raise ValueError(f"site: {self.name} means something at {allowed} only, was {site!r}")

    def check_scale(self, scale: Any, argument: str = "scale") -> float:
        """What an edit may be multiplied by. Raises ValueError that names the argument."""
        if not _is_number(scale):
            raise ValueError(f"{argument}: must be a finite number, was {scale!r}")
        if scale != 1 and not self.scalable:
            raise ValueError(f"{argument}: an edit of the method {self.name} can't be multiplied")
        return float(scale)

    def check_subspaces(self) -> None:
        """Raises ValueError where some of the rows are no edit by themselves."""
        if not self.separable:
            raise ValueError(
                f"subspaces: the rows of {self.name} are made into its edit together, so some of them are "
                "none by themselves"
            )

    def check_trainable(self) -> None:
        """Raises ValueError where the method can't be trained."""
        if not self.trainable:
            able = ", ".join(name for name, other in METHODS.items() if other.trainable)
            raise ValueError(f"method: {self.name} can't be trained; {able} can")

    def fresh(
        self,
        rank: int,
        width: int,
        dtype: torch.dtype,
        options: Options,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The parameters of a fresh adapter. Those kept orthonormal are float32 at least."""
        tensors: dict[str, Tensor] = {}
        wide = torch.promote_types(dtype, torch.float32)
        for name in self.shapes:
            if name in self.optional and not self.has(name, options):
                continue
            tensor = torch.empty(self.shape(name, rank, width), dtype=wide)
            if name in self.fixed and name in options:
                tensor.fill_(options[name])
            else:
                with torch.no_grad():
                    self.init(name, tensor, width, options, generator)
            tensors[name] = tensor if name in self.orthonormal else tensor.to(dtype)
        return tensors


#: Every method by the name that configs and files call it.
METHODS: dict[str, Method] = {}

#: What an intervention has already, so that no parameter may be called so.
_TAKEN = frozenset(
    "act_fn dropout group head keeps_norm layer method names options orthonormalize pool_rows positions rank "
    "row_order scale site spec width".split()
)


def register_method(name: str, method: Method) -> None:
    """Lets configs and files name a method; whoever loads what was saved with it registers it first.

    `Method` has an example.

    Raises:
        ValueError: the name is taken; the method's attributes contradict each other. Nothing is registered.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name: must be a name such as 'mine', was {name!r}")
    if name in METHODS:
        raise ValueError(f"name: there is a method {name!r} already")
    if not isinstance(method, Method):
        raise ValueError(f"method: must be an instance of a subclass of Method, was {method!r}")
    if method.name:
        raise ValueError(f"method: is registered already, as {method.name!r}")
    _check_shapes(method)
    method.name = name
    METHODS[name] = method


def unregister_method(name: str) -> None:
    """Forgets a method. Adapters of it that there are can't be used any more. `Method` has an example.

    Raises ValueError where there is none of that name.
    """
    if name not in METHODS:
        raise ValueError(f"name: there is no method {name!r}")
    METHODS.pop(name).name = ""


def _check_shapes(method: Method) -> None:
    shapes = method.shapes
    if not shapes or next(iter(shapes.values())) != "rd":
        raise ValueError(f'shapes: must begin with a parameter of the axes "rd", was {dict(shapes)}')
    for name, axes in shapes.items():
        if not isinstance(axes, str) or set(axes) - {"r", "d"}:
            raise ValueError(f'shapes: {name} must have the axes "r" and "d", was {axes!r}')
        if not str(name).isidentifier() or name in _TAKEN or hasattr(nn.Module, name):
            raise ValueError(f"shapes: no parameter can be called {name!r}, which every intervention has")
    for what in ("optional", "fixed", "orthonormal"):
        unknown = [name for name in getattr(method, what) if name not in shapes]
        if unknown:
            raise ValueError(f"{what}: names {', '.join(unknown)}, which shapes lacks")
    for name in method.orthonormal:
        if shapes[name] != "rd" or name in method.fixed:
            raise ValueError(f'orthonormal: {name} must have the axes "rd" and not be fixed')
    for name, option in method.options.items():
        if name in EVERY:
            raise ValueError(f"options: {name} is one that every method has")
        if not isinstance(option, Option) or not option.fits(option.default):
            raise ValueError(f"options: {name} must be an Option whose default is allowed, was {option!r}")
    for site in method.sites or ():
        if site not in SITES:
            raise ValueError(f"sites: must be among {', '.join(SITES)}; was {site!r}")
