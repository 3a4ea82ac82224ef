"""The command `reft-bench overhead`: whole forwards of a model, beside the one with a merged LoRA."""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Collection, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from reft_kernels.adapter.methods import METHODS
from reft_kernels.sites import has_layers, takes_heads

from ..measure import attribution
from ..measure.session import INTERRUPTED, LeftOut, Session, Tick, prepare_torch
from ..measure.timer import interleaved
from ..records import record, stats
from ..records.record import CaseResult, ResultError
from ..records.tables import conclude, overhead_table
from ..systems import (
    BASELINE,
    CONTROL,
    Runner,
    Setup,
    System,
    Unable,
    adapters,
    all_systems,
    generation,
    models,
)
from ..systems.base import Point
from ..systems.correctness import References, check
from ..systems.lora import merge, peft_missing
from .presets import AXES, DEVICE_PHASE, HOST_PHASE, PHASES, PRESETS, Sweep
from .sweep import axis_values

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The reference backend computes in fp64 and reads plans back: it is there to check, and timed on request.
UNASKED = ("reft_kernels reference",)

#: Timed on request too, and where methods or sites are compared: the baseline costs what it does.
BARE = "bare model"

#: Generations that the attributed time is read from, at least; each gives many decode steps.
LEAST_ATTRIBUTED = 5


@dataclasses.dataclass(frozen=True)
class OverheadCase:
    """A point on a model; its generations give a result for each phase."""

    phases: tuple[str, ...]
    model: str
    dtype: str
    point: Point
    new_tokens: int
    compiled: bool = False

    @property
    def id(self) -> str:
        p = self.point
        return (
            f"{self.model} {self.dtype} batch={p.batch} prompt={p.prompt} new={self.new_tokens} "
            f"rank={p.rank} layers={p.layers} positions={p.positions} adapters={p.adapters}"
            + "".join(
                f" {name}={getattr(p, name)}"
                for name in ("method", "site", "heads")
                if getattr(p, name) != getattr(Point, name)
            )
            + (" compiled" if self.compiled else "")
        )

    def result_id(self, phase: str) -> str:
        return f"{phase} {self.id}"

    @property
    def result_ids(self) -> list[str]:
        return [self.result_id(phase) for phase in self.phases]

    def params(self, phase: str) -> dict[str, Any]:
        head = {"phase": phase, "model": self.model, "dtype": self.dtype}
        return (
            head | dataclasses.asdict(self.point) | {"new_tokens": self.new_tokens, "compiled": self.compiled}
        )


@dataclasses.dataclass
class Group:
    """The runners of a case. facts: what is known of each that is right; left_out: why the others aren't."""

    setup: Setup
    runners: dict[str, Runner] = dataclasses.field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)


class Bench:
    """Measures one case after another."""

    def __init__(
        self, session: Session, model: nn.Module, chosen: dict[str, System], args: argparse.Namespace
    ) -> None:
        self.session, self.model, self.chosen, self.args = session, model, chosen, args

    def _build(self, case: OverheadCase) -> Group:
        setup = Setup(self.model, case.point, self.args.seed, case.compiled)
        if peft_missing() is None:
            setup.merged = merge(setup)
        group = Group(setup)
        references = References(setup)
        for name, system in self.chosen.items():
            try:
                reason = system.why_not(setup)
                if reason is not None:
                    raise Unable(reason)
                runner = system.build(setup)
                group.facts[name] = check(references, system, runner, case.new_tokens)
                group.runners[name] = runner
            except Unable as error:
                group.left_out[name] = str(error)
            except Exception as error:  # a peer that breaks must not end the run
                group.left_out[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            if name in group.left_out:
                self.session.note(f"{name}: {group.left_out[name]}")
        return group

    def measure(self, case: OverheadCase, tick: Tick) -> list[CaseResult]:
        try:
            group = self._build(case)
        except Unable as error:
            raise LeftOut(str(error)) from error
        if BASELINE not in group.runners:
            raise LeftOut(f"the baseline {BASELINE!r} can't be measured: {group.left_out[BASELINE]}")
        runners = dict(group.runners)
        runners[CONTROL] = Runner(group.setup, models.twin(group.setup.merged))
        for runner in runners.values():
            for _ in range(2 if case.compiled else 1):  # warm-up; a static cache is as long as its generation
                generation.timed(runner, case.new_tokens if case.compiled else 2)

        def on_round() -> None:
            gc.collect()
            tick()

        timings = interleaved(
            list(runners),
            lambda name: generation.timed(runners[name], case.new_tokens, case.phases),
            self.args.rounds,
            self.args.seed,
            on_round,
        )
        parts = {
            name: self._attributed(runner, case)
            for name, runner in runners.items()
            if runner.attributed and not case.compiled  # no stopwatch ticks inside compiled code
        }
        return [self._result(case, phase, group, timings, parts) for phase in case.phases]

    def _attributed(self, runner: Runner, case: OverheadCase) -> list[generation.Timing]:
        rounds = max(LEAST_ATTRIBUTED, self.args.rounds // 3)
        costs, tokens = attribution.call_costs(), case.new_tokens
        bare = Runner(runner.setup, models.twin(runner.setup.merged))
        packages = runner.attributed
        taken = []
        with (
            attribution.mirroring(bare.model, runner.model, packages) as nothing,
            attribution.attributing(runner.model, packages) as ledger,
        ):
            for _ in range(rounds):
                part = generation.attributed(runner, tokens, ledger, costs)
                taken.append(part.less(generation.attributed(bare, tokens, nothing, {})))
        return taken

    def _result(
        self,
        case: OverheadCase,
        phase: str,
        group: Group,
        timings: dict[str, list[generation.Timing]],
        parts: dict[str, list[generation.Timing]],
    ) -> CaseResult:
        point = case.point
        samples = {name: [getattr(timing, phase) for timing in taken] for name, taken in timings.items()}
        errors = {name: facts.get("error") for name, facts in group.facts.items()}
        found = record.summarize(samples, BASELINE, CONTROL, errors)
        tokens = {"prefill": point.prompt, "generate": case.new_tokens}.get(phase, 1)
        for name, result in found.items():
            difference = stats.paired_difference(samples[name], samples[BASELINE])
            result.extra |= {
                "tokens_per_s": point.batch * tokens / result.time.median,
                "difference_s": difference.to_json(),
            }
            if name in group.runners:
                result.extra |= group.facts[name]
                result.extra["adapters_served"] = 1 if group.runners[name].single else point.adapters
            if name in parts and phase in PHASES:
                taken = [getattr(timing, phase) for timing in parts[name]]
                part = stats.median_interval(taken)
                result.extra |= {
                    "attributed_s": part.to_json(),
                    "attributed_agrees": part.overlaps(difference),
                    "attributed_share": stats.share(taken, samples[BASELINE]).to_json(),
                    "attributed_samples": taken,
                }
        params = case.params(phase)
        return CaseResult(case.result_id(phase), params, BASELINE, CONTROL, found, dict(group.left_out))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {preset.text}" for name, preset in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, default="quick", help=presets)
    parser.add_argument("--model", help='a shape ("1b", "7b", "llama-1024x8"), a path or a hub name')
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--phases",
        help=f"instead of the preset's: {', '.join(PHASES)}; on a GPU also {HOST_PHASE}, the host's own time "
        f"of a decode step, and with --compiled {DEVICE_PHASE}, the device's",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="generate with a static cache and a compiled decode step"
    )
    parser.add_argument("--new-tokens", type=int, help="length of a generation")
    more = {
        "method": f" (any of {', '.join(adapters.KNOWN)})",
        "site": " (a name or a module's path, docs/sites.md)",
        "heads": ": how many of each layer's, at sites of one head (there 1 by default)",
    }
    for axis in AXES:
        text = f"instead of the preset's sweep: values of {axis}, with commas{more.get(axis, '')}"
        parser.add_argument(f"--{axis}", help=text)


def cases_of(args: argparse.Namespace, name: str, dtype: str, depth: int) -> list[OverheadCase]:
    """The preset's cases, or the sweep around what the arguments give. Raises ResultError."""
    preset = PRESETS[args.preset]
    sweeps = preset.sweeps
    given = {axis: axis_values(axis, getattr(args, axis)) for axis in AXES if getattr(args, axis)}
    if given:
        base = {**sweeps[0].base, **{axis: values[0] for axis, values in given.items()}}
        if "batch" not in given:
            base["batch"] = max(base["batch"], *given.get("adapters", [1]))
        if "adapters" not in given:
            base["adapters"] = min(base["adapters"], base["batch"])
        sweeps = (Sweep(base, {axis: tuple(values) for axis, values in given.items()}, PHASES),)
    phases = args.phases.split(",") if args.phases else None
    for phase in phases or ():
        if phase not in (known := (*PHASES, DEVICE_PHASE, HOST_PHASE)):
            raise ResultError(f"--phases: unknown {phase!r}; allowed are {', '.join(known)}")
        if phase == DEVICE_PHASE and not args.compiled:
            raise ResultError(f"--phases: {DEVICE_PHASE} needs --compiled; without it the host sets the pace")
    new_tokens = preset.new_tokens if args.new_tokens is None else args.new_tokens
    if new_tokens < 2:
        raise ResultError(f"--new-tokens: must be at least 2 (a prefill and a decode step), was {new_tokens}")
    wanted: dict[Point, list[str]] = {}
    for sweep in sweeps:
        for values in sweep.points():
            of_point = wanted.setdefault(_point(values, depth, given), [])
            of_point += [phase for phase in phases or sweep.phases if phase not in of_point]
    return [
        OverheadCase(tuple(p), name, dtype, point, new_tokens, args.compiled) for point, p in wanted.items()
    ]


def _point(values: dict[str, Any], depth: int, given: Collection[str]) -> Point:
    """A point of a sweep. given: the axes that the command line names. Raises ResultError."""
    method, site = values.get("method", adapters.METHOD), values.get("site", adapters.SITE)
    filled = {**values, "layers": depth if values["layers"] == "all" else values["layers"]}
    if "rank" not in given and METHODS[method].rank == 1:
        filled["rank"] = 1  # a vector, a direction or a feature
    if takes_heads(site):
        filled.setdefault("heads", 1)
    if "layers" in given and not has_layers(site):
        raise ResultError(f"--layers: {site!r} is in no layer, so give none")
    point = Point(**filled)
    try:
        adapters.config_of(method, site, point.heads, point.rank, range(point.layers), point.positions)
    except ValueError as error:
        raise ResultError(f"--method {method} --site {site}: {error}") from error
    return point


def choose(
    names: str | None, available: dict[str, System], baseline: str, unasked: Sequence[str]
) -> dict[str, System]:
    """The systems that were asked for, the baseline first; without a wish all but the unasked."""
    if names is None:
        return {name: system for name, system in available.items() if name not in unasked}
    asked = names.split(",")
    for name in asked:
        if name not in available:
            raise ResultError(f"--systems: unknown {name!r}; allowed are {', '.join(available)}")
    return {name: available[name] for name in dict.fromkeys([baseline, *asked])}


def run(args: argparse.Namespace, console: Console) -> int:
    device = prepare_torch(args)
    if torch.device(device).type == "cpu":
        for phase in {DEVICE_PHASE, HOST_PHASE} & {*(args.phases or "").split(",")}:
            raise ResultError(
                f"--phases: {phase} tells a GPU's time from its host's, was asked for on {device}"
            )
    if args.compiled:
        torch._dynamo.config.recompile_limit = 256  # every system runs the same code
    preset = PRESETS[args.preset]
    args.rounds = args.rounds or preset.rounds
    name = args.model or preset.model
    dtype = args.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    unasked = UNASKED if args.method or args.site else (*UNASKED, BARE)
    chosen = choose(args.systems, all_systems(), BASELINE, unasked)
    settings = {"rounds": args.rounds, "seed": args.seed, "model": name, "systems": list(chosen)}
    settings["compiled"] = args.compiled
    session = Session("overhead", settings, device, args, console)
    with console.status(f"Building {name} …"):
        model = models.build(name, DTYPES[dtype], device, args.seed)
    if peft_missing() is not None:
        session.note(f"{peft_missing()}: the baseline is the bare model, which costs what a merged LoRA does")
    cases = cases_of(args, name, dtype, models.depth(model))
    for site, heads in dict.fromkeys((case.point.site, case.point.heads) for case in cases):
        try:
            adapters.width_at(model, site, heads)
        except ValueError as error:
            raise ResultError(f"--site {site}: {error}") from error
    bench = Bench(session, model, chosen, args)
    finished = session.run(cases, bench.measure, args.rounds)
    console.print(overhead_table(session.results))
    conclude(console, session.results)
    return 0 if finished else INTERRUPTED
