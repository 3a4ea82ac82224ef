"""What `reft-bench overhead` sweeps: a base point and, one at a time, other values on each axis."""

from __future__ import annotations

import dataclasses
from typing import Any

PHASES = ("prefill", "decode", "generate")

#: What the device alone takes for a decode step, and what the host alone takes; where asked for, on a GPU.
DEVICE_PHASE, HOST_PHASE = "step", "host"

#: Axes of a sweep, in the order of a case's name. "layers" takes "all".
AXES = ("batch", "prompt", "rank", "layers", "positions", "adapters", "method", "site", "heads")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A base point, the axes that are varied around it, and the phases."""

    base: dict[str, Any]
    axes: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    phases: tuple[str, ...] = PHASES

    def points(self) -> list[dict[str, Any]]:
        """The base point, then every point that differs from it on one axis."""
        found = [dict(self.base)]
        for axis, values in self.axes.items():
            for value in values:
                point = {**self.base, axis: value}
                if point not in found:
                    found.append(point)
        return found


@dataclasses.dataclass(frozen=True)
class Preset:
    model: str
    rounds: int
    new_tokens: int
    sweeps: tuple[Sweep, ...]
    text: str


def _base(**changes: Any) -> dict[str, Any]:
    point = {"batch": 8, "prompt": 64, "rank": 8, "layers": "all", "positions": "f3+l3", "adapters": 8}
    return {**point, **changes}


_PAPER = Sweep(
    _base(batch=1, adapters=1),
    {
        "rank": (1, 2, 4, 8, 16, 32, 64),
        "layers": (1, 2, 4, 8, 16, "all"),
        "positions": ("f1", "f1+l1", "f3+l3", "f5+l5", "f10+l10", "all"),
    },
)
_SERVING = Sweep(
    _base(batch=256, prompt=128, positions="all", adapters=1),
    {"adapters": (1, 4, 16, 64, 256)},
)
_PAPER_CPU = (
    Sweep(
        _base(batch=4, prompt=32, adapters=1, positions="all"),
        {
            "rank": (1, 2, 4, 8, 16, 32, 64),
            "layers": (1, 2, 4, "all"),
            "positions": ("f1", "f1+l1", "f3+l3", "f5+l5", "f10+l10", "all"),
        },
        ("generate",),
    ),
    Sweep(
        _base(batch=64, prompt=8, adapters=1, positions="all"),
        {"adapters": (1, 4, 16, 64)},
        ("generate",),
    ),
)

PRESETS = {
    "quick": Preset(
        "llama-512x8",
        rounds=7,
        new_tokens=6,
        sweeps=(
            Sweep(
                _base(batch=4, prompt=32, adapters=4),
                {"rank": (1, 32), "layers": (2,), "positions": ("f1", "all")},
                ("prefill", "decode"),
            ),
            Sweep(_base(batch=4, prompt=32, adapters=4, positions="all")),
            Sweep(_base(batch=16, prompt=8, adapters=1, positions="all"), {"adapters": (16,)}, ("decode",)),
        ),
        text="2 CPU cores, under 3 minutes",
    ),
    "cpu": Preset(
        "llama-1024x8",
        rounds=15,
        new_tokens=16,
        sweeps=(
            Sweep(_base()),
            Sweep(_base(positions="all")),
            Sweep(_base(batch=64, prompt=16, adapters=64, positions="all"), phases=("decode",)),
        ),
        text="the recorded numbers of the README: hidden size 1024, 8 layers, 2 CPU cores",
    ),
    "paper": Preset(
        "7b", rounds=15, new_tokens=256, sweeps=(_PAPER,), text="the ReFT paper's sweeps on a 7B shape"
    ),
    "paper-cpu": Preset(
        "llama-512x8",
        rounds=15,
        new_tokens=8,
        sweeps=_PAPER_CPU,
        text="the paper's sweeps and distinct adapters, 2 CPU cores, by estimate under 25 minutes",
    ),
    "serving": Preset(
        "8b", rounds=31, new_tokens=64, sweeps=(_SERVING,), text="every position, 1 to 256 distinct adapters"
    ),
    "full": Preset(
        "8b",
        rounds=31,
        new_tokens=64,
        sweeps=(
            _PAPER,
            _SERVING,
            Sweep(_base(), {"batch": (8, 32, 128), "prompt": (16, 64, 256, 1024)}),
            Sweep(_base(positions="all"), {"batch": (8, 32, 128), "prompt": (16, 64, 256, 1024)}),
        ),
        text="all of these",
    ),
}
