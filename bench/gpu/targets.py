"""What a GPU's records say of the targets that docs/kernels.md sets: a row each, with what was reached.

Every value is a ratio of times of one run, or their difference. A target that no record speaks of is left
out of the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from ..records.record import CaseResult, Results

BACKENDS = ("native", "triton")

#: Rows of a pool that holds 64 adapters of rank 8 on each of 32 layers.
LARGE_POOL = 16384

#: (results, backend) → the value reached, or None where it was not measured.
Reached = Callable[[Sequence[Results], str], float | None]


@dataclasses.dataclass(frozen=True)
class Target:
    """text: what is measured. limit: the most that it may be, or with `least` the least."""

    text: str
    limit: float
    reached: Reached
    least: bool = False
    percent: bool = False
    microseconds: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.least else value <= self.limit

    def show(self, value: float) -> str:
        if self.microseconds:
            return f"{1e6 * value:.0f} µs"
        return f"{100 * value:.1f}%" if self.percent else f"{value:.2f}"


def _cases(results: Iterable[Results], command: str, **wanted: object) -> list[CaseResult]:
    return [
        case
        for run in results
        if run.command == command and run.machine["gpu"]
        for case in run.cases
        if all(case.params.get(key) == value for key, value in wanted.items())
    ]


def _seconds(results: Sequence[Results], system: str, **params: object) -> tuple[float, CaseResult] | None:
    wanted = {"dtype": "bfloat16", "width": 4096, "rank": 8, "mix": "distinct", "pool_rows": 0} | params
    for case in _cases(results, "kernels", **wanted):
        if system in case.systems:
            return case.systems[system].time.median, case
    return None


def _over_floor(rows: int, **params: object) -> Reached:
    def reached(results: Sequence[Results], backend: str) -> float | None:
        found = _seconds(results, backend, direction="forward", rows=rows, adapters=rows, **params)
        return found and found[0] / found[1].floor["floor_s"]

    return reached


def _over_copy(results: Sequence[Results], backend: str) -> float | None:
    found = _seconds(results, backend, direction="forward", rows=4096, adapters=1)
    return found and found[0] / found[1].floor["copy_of_rows_s"]


def _peer_over_ours(rows: int) -> Reached:
    def reached(results: Sequence[Results], backend: str) -> float | None:
        ours = _seconds(results, backend, direction="forward", rows=rows, adapters=rows)
        peer = _seconds(results, "shrink+expand", direction="forward", rows=rows, adapters=rows)
        return peer[0] / ours[0] if ours and peer else None

    return reached


def _backward(adapters: int) -> Reached:
    def reached(results: Sequence[Results], backend: str) -> float | None:
        pair = [
            _seconds(results, backend, direction=direction, rows=4096, adapters=adapters)
            for direction in ("backward", "forward")
        ]
        return pair[0][0] / pair[1][0] if all(pair) else None

    return reached


def _overhead(system: str, **params: object) -> Reached:
    """The overhead of a whole model; of several models the worst."""

    def reached(results: Sequence[Results], backend: str) -> float | None:
        found = [
            case.systems[name].ratio.median - 1
            for case in _cases(results, "overhead", **params)
            if (name := system.format(backend)) in case.systems
        ]
        return max(found, default=None)

    return reached


def _host(system: str, **params: object) -> Reached:
    """Seconds of a step that the host takes more than for the bare model; of several models the worst."""

    def reached(results: Sequence[Results], backend: str) -> float | None:
        found = [
            case.systems[name].extra["difference_s"]["median"]
            for case in _cases(results, "overhead", **{**_STEP, "phase": "host", **params})
            if (name := system.format(backend)) in case.systems
        ]
        return max(found, default=None)

    return reached


def _train(positions: str) -> Reached:
    def reached(results: Sequence[Results], backend: str) -> float | None:
        for case in _cases(results, "train", model="1b", positions=positions):
            if f"reft_kernels {backend}" in case.systems:
                return case.systems[f"reft_kernels {backend}"].ratio.median
        return None

    return reached


_OURS, _FUSED = "reft_kernels {}", "reft_kernels {} fused"
_STEP = {"phase": "step", "compiled": True, "positions": "all"}

TARGETS = [
    *(
        Target(f"op over its floor, {rows} rows, as many adapters", 1.25, _over_floor(rows))
        for rows in (1, 64, 256)
    ),
    Target(f"the same, 64 rows, in a pool of {LARGE_POOL} rows", 1.25, _over_floor(64, pool_rows=LARGE_POOL)),
    Target("op over copying h, 4096 rows, one adapter", 1.5, _over_copy),
    *(
        Target(f"shrink and expand over the op, {rows} rows", 1.5, _peer_over_ours(rows), least=True)
        for rows in (1, 64)
    ),
    *(
        Target(
            f"compiled decode of 8B's shape, batch 64, every layer and position, {text}{kind}",
            limit,
            _overhead(system, batch=64, adapters=adapters, **_STEP),
            percent=True,
        )
        for kind, system, limits in (("", _OURS, (0.03, 0.05)), (", with the norm", _FUSED, (0.01, 0.03)))
        for adapters, text, limit in ((1, "one adapter", limits[0]), (64, "64 adapters", limits[1]))
    ),
    Target(
        "the same, batch 256, 256 adapters",
        0.08,
        _overhead(_OURS, batch=256, adapters=256, **_STEP),
        percent=True,
    ),
    Target(
        "the same, batch 64, f3+l3",
        0.001,
        _overhead(_OURS, batch=64, **(_STEP | {"positions": "f3+l3"})),
        percent=True,
    ),
    *(
        Target(
            f"the host's time of such a step beyond the bare one, batch 64, 64 adapters{kind}",
            20e-6,
            _host(system, batch=64, adapters=64),
            microseconds=True,
        )
        for kind, system in (("", _OURS), (", with the norm", _FUSED))
    ),
    Target(
        "eager decode of a 1B shape, every position, with the norm",
        0.0,
        _overhead(_FUSED, model="1b", phase="decode", compiled=False, positions="all"),
        percent=True,
    ),
    *(
        Target(f"backward over forward, 4096 rows, adapters: {adapters}", 3.0, _backward(adapters))
        for adapters in (1, 64)
    ),
    Target("training step of a 1B shape over the frozen model, f3+l3", 1.05, _train("f3+l3")),
]


def rows(results: Sequence[Results]) -> list[tuple[str, ...]]:
    """(what, target, native, triton) of every target that the records speak of."""
    found = []
    for target in TARGETS:
        values = [target.reached(results, backend) for backend in BACKENDS]
        if all(value is None for value in values):
            continue
        cells = []
        for value in values:
            missed = "" if value is None or target.met(value) else " (missed)"
            cells.append("–" if value is None else target.show(value) + missed)
        bound = "at least" if target.least else "at most"
        found.append((target.text, f"{bound} {target.show(target.limit)}", *cells))
    return found


HEADINGS = ("", "target", *BACKENDS)
