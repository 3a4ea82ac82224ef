"""The command `reft-bench host`: the host's own time in decode steps of a model that costs nothing.

An eager GPU model waits for the host, and there the edit's own work is hidden: what counts is all that Python
and torch do around the kernel. So the layers are made so small that they cost nothing, on one CPU thread, and
what is read is the thread's CPU time, in which a busy neighbour has no part. Where a model's objects happen
to lie in memory makes some percent of such a step: every system is built several times, and rounds take them
in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from ..measure.session import INTERRUPTED, LeftOut, Session, Tick, prepare_torch
from ..measure.timer import interleaved
from ..records import host_report, record, stats
from ..records.record import CaseResult, ResultError
from ..records.tables import conclude
from ..systems import Runner, Unable, generation, models
from ..systems.base import Point
from ..systems.host import BASELINE, CONTROL, HostSystem, Setups, all_systems, one_for_all
from .overhead import DTYPES, choose
from .sweep import axis_values

#: How a decode step is run: by `generate`, by a loop of one's own around the model, or as compiled code.
GENERATE, FORWARD, COMPILED = "generate", "forward", "compiled"
MODES = (GENERATE, FORWARD, COMPILED)

#: (what, --quick's value, the default)
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "modes": (f"{GENERATE},{FORWARD}", ",".join(MODES)),
    "layers": ("2,16", "2,8,32"),
    "compiled_layers": ("2", "2,8"),
    "rounds": (9, 28),
    "instances": (1, 7),
    "steps": (6, 12),
}

#: A system that takes several times the bare step has fewer steps in a sample, but no fewer than these.
LEAST_STEPS = 4

#: Systems that are compiled: each takes seconds to compile, and the peers' eager steps are what they are for.
COMPILED_SYSTEMS = (BASELINE, "reft_kernels", "eager hooks")

VOCABULARY = 256

#: A step takes milliseconds; a clock that is coarser than this would show in its thousandths.
COARSEST = 1e-6


@dataclasses.dataclass(frozen=True)
class HostCase:
    """A model at several depths, all in the same rounds; gives a result for each depth and mode.

    point: of the mixed batch; its layers are the deepest model's.
    """

    modes: tuple[str, ...]
    depths: tuple[int, ...]
    dtype: str
    width: int
    point: Point
    steps: int

    @property
    def compiled(self) -> bool:
        return self.modes == (COMPILED,)

    def _id(self, layers: object) -> str:
        p = self.point
        return (
            f"llama-{self.width}x{layers} {self.dtype} batch={p.batch} prompt={p.prompt} "
            f"steps={self.steps} rank={p.rank} adapters={p.adapters}"
        )

    @property
    def id(self) -> str:
        return f"{','.join(self.modes)} {self._id(','.join(map(str, self.depths)))}"

    def result_id(self, mode: str, depth: int) -> str:
        return f"{mode} {self._id(depth)}"

    @property
    def result_ids(self) -> list[str]:
        return [self.result_id(mode, depth) for depth in self.depths for mode in self.modes]

    def params(self, mode: str, depth: int) -> dict[str, Any]:
        head = {"mode": mode, "width": self.width, "dtype": self.dtype, "steps": self.steps}
        return head | dataclasses.asdict(self.point) | {"layers": depth}


@dataclasses.dataclass
class Group:
    """The runners of a case at one depth. warm: what their steps took before anything was kept."""

    depth: int
    runners: dict[str, Runner] = dataclasses.field(default_factory=dict)
    errors: dict[str, float | None] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    warm: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


class Bench:
    """Measures one case after another."""

    def __init__(self, session: Session, chosen: dict[str, HostSystem], args: argparse.Namespace) -> None:
        self.session, self.chosen, self.args = session, chosen, args

    def _build(self, case: HostCase, depth: int) -> Group:
        shape = (case.width, depth, 2 * case.width, 4, 4, VOCABULARY)
        model = models.random_llama(shape, DTYPES[case.dtype], "cpu", self.args.seed)
        point = dataclasses.replace(case.point, layers=depth)
        try:
            setups = Setups(model, point, self.args.seed, case.compiled)
        except Unable as error:
            raise LeftOut(str(error)) from error
        group = Group(depth)
        for name, system in self.chosen.items():
            if case.compiled and not name.startswith(COMPILED_SYSTEMS):
                group.left_out[name] = "not compiled here: its eager step is what users run"
                continue
            try:
                runner, group.errors[name] = system.build(setups, case.steps + 1)
                group.warm[name] = self._warm_up(runner, case)
                group.runners[name] = runner
            except Unable as error:
                group.left_out[name] = str(error)
            except Exception as error:  # a peer that breaks must not end the run
                group.left_out[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            if name in group.left_out:
                self.session.note(f"{name}: {group.left_out[name]}")
        if BASELINE not in group.runners:
            raise LeftOut(f"the baseline {BASELINE!r} can't be measured: {group.left_out[BASELINE]}")
        group.runners[CONTROL], _ = self.chosen[BASELINE].build(setups, case.steps + 1)
        group.warm[CONTROL] = self._warm_up(group.runners[CONTROL], case)
        return group

    def measure(self, case: HostCase, tick: Tick) -> list[CaseResult]:
        # Compiled code takes long to make, and where it lies is not ours.
        instances = 1 if case.compiled else self.args.instances
        built = [[self._build(case, depth) for depth in case.depths] for _ in range(instances)]
        gc.freeze()  # the instances of other rounds are not gone through while one is timed
        try:
            return self._measure(case, built, tick)
        finally:
            gc.unfreeze()

    def _measure(self, case: HostCase, built: list[list[Group]], tick: Tick) -> list[CaseResult]:
        groups = built[0]
        takes: dict[str, Iterator[tuple[Runner, int]]] = {}
        for number, group in enumerate(groups):
            twins = [instance[number] for instance in built]
            for name in group.runners:
                # One that can't be measured once, can't ever.
                listed = [
                    (twin.runners[name], _steps(case, twin.warm[name], twin.warm[BASELINE])) for twin in twins
                ]
                takes[_key(group, name)] = itertools.cycle(listed)

        def on_round() -> None:
            gc.collect()
            tick()

        def take(key: str) -> dict[str, float]:
            runner, steps = next(takes[key])
            return _take(runner, case.modes, steps)

        timings = interleaved(list(takes), take, self.args.rounds, self.args.seed, on_round)
        found = []
        for group in groups:
            recompiled = {}
            if case.compiled:
                recompiled = {name: _recompiles(runner, case) for name, runner in group.runners.items()}
            for mode in case.modes:
                samples = {
                    name: [taken[mode] for taken in timings[_key(group, name)]] for name in group.runners
                }
                systems = record.summarize(samples, BASELINE, CONTROL, group.errors)
                for name, result in systems.items():
                    cost = stats.paired_difference(samples[name], samples[BASELINE])
                    result.extra |= {
                        "cost_s": cost.to_json(),
                        "layer_s": cost.scaled(1 / group.depth).to_json(),
                        "steps": _steps(case, group.warm[name], group.warm[BASELINE]),
                    }
                    if recompiled.get(name) is not None:
                        result.extra["recompiles"] = recompiled[name]
                of_case = case.result_id(mode, group.depth), case.params(mode, group.depth)
                found.append(CaseResult(*of_case, BASELINE, CONTROL, systems, dict(group.left_out)))
        return found

    def _warm_up(self, runner: Runner, case: HostCase) -> dict[str, float]:
        if case.compiled:
            _take(runner, case.modes, case.steps)
        return _take(runner, case.modes, case.steps)


def _key(group: Group, name: str) -> str:
    return f"{group.depth} layers, {name}"


def _take(runner: Runner, modes: Sequence[str], steps: int) -> dict[str, float]:
    """Seconds of the thread's CPU time that a decode step takes, the median of `steps`, by mode."""
    taken = {}
    for mode in modes:
        if mode == FORWARD:
            taken[mode] = generation.by_hand(runner, steps, time.thread_time)
        else:
            taken[mode] = generation.on_clock(runner, steps + 1, time.thread_time).decode
    return taken


def _steps(case: HostCase, warm: dict[str, float], bare: dict[str, float]) -> int:
    """Steps of a system's sample; compiled code is bound to the length of its generation."""
    if case.compiled:
        return case.steps
    times = max(warm[mode] / bare[mode] for mode in case.modes)
    return min(case.steps, max(LEAST_STEPS, round(case.steps / times)))


@torch.no_grad()
def _recompiles(runner: Runner, case: HostCase) -> int | None:
    """Graphs that are compiled as a mixed batch goes over to one adapter; None where nothing is mixed."""
    other = one_for_all(runner)
    if other is None:
        return None
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    with runner.context():
        runner.model.generate(**runner.generation(case.steps + 1), **other)
    return counted["unique_graphs"] - before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer layers, rounds and steps, nothing compiled: by estimate under a minute",
    )
    parser.add_argument("--modes", help=f"how a decode step is run, with commas: {', '.join(MODES)}")
    parser.add_argument("--layers", help="depths of the model, with commas; all layers are edited (2,8,32)")
    parser.add_argument(
        "--compiled-layers", help="the same for compiled steps, which take long to compile (2,8)"
    )
    parser.add_argument(
        "--instances", type=int, help="how often each system is built; rounds take them in turn (7)"
    )
    parser.add_argument("--steps", type=int, help="decode steps of a sample; their median counts (12)")
    parser.add_argument(
        "--width", type=int, default=64, help="of the model: so small that it costs nothing (64)"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=8, help="tokens of a prompt")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--adapters", type=int, help="of a mixed batch (as many as rows)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def cases_of(args: argparse.Namespace) -> list[HostCase]:
    """The eager modes, and the compiled one. Raises ResultError."""
    modes = args.modes.split(",")
    for mode in modes:
        if mode not in MODES:
            raise ResultError(f"--modes: unknown {mode!r}; allowed are {', '.join(MODES)}")
    for name, least in (
        ("steps", 1),
        ("instances", 1),
        ("batch", 1),
        ("prompt", 2),
        ("rank", 1),
        ("adapters", 1),
    ):
        if getattr(args, name) < least:
            raise ResultError(f"--{name}: must be at least {least}, was {getattr(args, name)}")
    if args.width < 16 or args.width % 8:
        raise ResultError(f"--width: must be a multiple of 8 and at least 16, was {args.width}")
    if args.rank > args.width:
        raise ResultError(f"--rank: must be at most the width {args.width}, was {args.rank}")
    if args.adapters > args.batch:
        raise ResultError(f"--adapters: must be at most the batch {args.batch}, was {args.adapters}")
    eager = tuple(mode for mode in (GENERATE, FORWARD) if mode in modes)
    cases = []
    for chosen, option, text in (
        (eager, "--layers", args.layers),
        ((COMPILED,) if COMPILED in modes else (), "--compiled-layers", args.compiled_layers),
    ):
        depths = axis_values(option.removeprefix("--"), text) if chosen else []
        if "all" in depths:
            raise ResultError(f"{option}: must be integers from 1 up with commas between them, was {text!r}")
        if depths:
            depths = sorted(set(depths))
            point = Point(args.batch, args.prompt, args.rank, depths[-1], "all", args.adapters)
            cases.append(HostCase(chosen, tuple(depths), args.dtype, args.width, point, args.steps))
    return cases


def run(args: argparse.Namespace, console: Console) -> int:
    if args.device not in (None, "cpu"):
        raise ResultError(f"--device {args.device}: the host's time is read on a model that runs on the CPU")
    clock = time.get_clock_info("thread_time")
    if clock.resolution > COARSEST:
        raise ResultError(f"a thread's CPU time is known to {clock.resolution} s here, too coarse for a step")
    for name, (quick, whole) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else whole)
    args.adapters = args.batch if args.adapters is None else args.adapters
    cases = cases_of(args)
    chosen = choose(args.systems, all_systems(), BASELINE, ())  # type: ignore[arg-type]
    args.device, args.threads = "cpu", args.threads or 1
    device = prepare_torch(args)
    torch._dynamo.config.recompile_limit = 256  # every system runs the same code
    settings = {"rounds": args.rounds, "instances": args.instances, "seed": args.seed}
    settings["systems"] = list(chosen)
    session = Session("host", settings, device, args, console)
    finished = session.run(cases, Bench(session, chosen, args).measure, args.rounds)
    for table in host_report.tables(session.results):
        console.print(host_report.shown(table))
    conclude(console, session.results)
    return 0 if finished else INTERRUPTED
