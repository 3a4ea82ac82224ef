"""What people read of the adapters of a model, a line for each, and how they may name them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..batch.names import LISTED, unknown

if TYPE_CHECKING:
    from ..adapter import Adapter

_Result = TypeVar("_Result")


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 → "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _size(count: float) -> str:
    """Bytes with a unit: 96 bytes, 4.1 KiB, 2.0 MiB."""
    if count < 1024:
        return f"{count:.0f} bytes"
    kib = count / 1024
    return f"{kib:.1f} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"


def describe(name: str, adapter: Adapter) -> str:
    """One line: method, rank, layers, site, positions, bytes of its tensors, and whether it trains."""
    parts = adapter.interventions
    ranks = sorted({one.rank for one in parts})
    layers = sorted({one.layer for one in parts})
    words = [
        " and ".join(dict.fromkeys(one.method for one in parts)),
        f"rank {_ranges(ranks)}",
        f"layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}",
        " and ".join(dict.fromkeys(one.site for one in parts)),
        f"positions {' and '.join(map(str, adapter.groups))}",
        *(f"subspace {each} of rows {_ranges(rows)}" for each, rows in adapter.subspaces.items()),
        _size(sum(tensor.numel() * tensor.element_size() for tensor in adapter.parameters())),
        *(["keeps the norm"] if any(one.keeps_norm for one in parts) else []),
        *(["trainable"] if adapter.trainable else []),
    ]
    return f"{name!r}: {', '.join(words)}"


def listing(adapters: Mapping[str, Adapter]) -> list[str]:
    """`describe` of the first adapters, and how many others there are."""
    lines = [describe(name, adapters[name]) for name in list(adapters)[:LISTED]]
    rest = len(adapters) - len(lines)
    return [*lines, f"and {rest} more"] if rest else lines


def named_as_in_peft(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Lets a method's `name` be given as `adapter_name`, too, as PEFT's methods call it."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> _Result:
        if "adapter_name" in kwargs:
            if "name" in kwargs:
                raise TypeError(f"{method.__name__}: name and adapter_name are the same; give one of them")
            kwargs["name"] = kwargs.pop("adapter_name")
        return method(self, *args, **kwargs)

    return call


class Names:
    """What a container of adapters by name has of a mapping, and how it prints. `_adapters` holds them."""

    _adapters: dict[str, Adapter]

    @property
    def active_adapter(self) -> str | None:
        raise NotImplementedError

    def _known(self, name: object) -> Adapter:
        """The adapter of that name. Raises ValueError."""
        if not isinstance(name, str):
            raise ValueError(f"name: must be one adapter's name, was {name!r}")
        if name not in self._adapters:
            for owner, adapter in self._adapters.items():
                if (why := adapter.why_unknown(name, owner)) is not None:
                    raise ValueError(f"name: {why}")
            raise ValueError(f"name: {unknown(name, self._adapters, 'loaded are')}")
        return self._adapters[name]

    def __len__(self) -> int:
        """How many adapters there are."""
        return len(self._adapters)

    def __bool__(self) -> bool:
        """True without adapters too: `if model.reft` asks whether the model is patched."""
        return True

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._adapters

    def __iter__(self) -> Iterator[str]:
        """The names of the adapters, in the order in which they came."""
        return iter(list(self._adapters))

    def __repr__(self) -> str:
        """A line for each adapter, and not its modules: there may be hundreds."""
        lines = listing(self._adapters)
        count = f"{len(self)} adapter{'' if len(self) == 1 else 's'}"
        head = f"{type(self).__name__}({count}, active={self.active_adapter!r}"
        return "\n  ".join([head, *lines]) + ("\n)" if lines else ")")
