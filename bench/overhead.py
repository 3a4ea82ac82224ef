"""The command `reft-bench overhead`: whole forwards of a model, beside the one with a merged LoRA."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from . import attribution, models, record, stats
from .correctness import AGREEMENT, TOLERANCE, References
from .presets import AXES, PHASES, PRESETS, Sweep
from .record import CaseResult, ResultError
from .session import INTERRUPTED, LeftOut, Session, Tick, prepare_torch
from .sweep import axis_values
from .systems import BASELINE, CONTROL, Runner, Setup, System, Unable, all_systems
from .systems.base import Point
from .systems.lora import merge, peft_missing
from .tables import overhead_table
from .timer import Candidate, Clock, CpuClock, CudaEventClock, interleave

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The reference backend computes in fp64 and reads plans back: it is there to check, and timed on request.
UNASKED = ("reft_kernels reference",)


@dataclasses.dataclass(frozen=True)
class OverheadCase:
    """A point in one phase. new_tokens: of the phase "generate", else 0."""

    phase: str
    model: str
    dtype: str
    point: Point
    new_tokens: int = 0

    @property
    def id(self) -> str:
        p = self.point
        tokens = f"+{self.new_tokens}" if self.new_tokens else ""
        return (
            f"{self.phase}{tokens} {self.model} {self.dtype} batch={p.batch} prompt={p.prompt} rank={p.rank} "
            f"layers={p.layers} positions={p.positions} adapters={p.adapters}"
        )

    @property
    def params(self) -> dict[str, Any]:
        head = {"phase": self.phase, "model": self.model, "dtype": self.dtype}
        return head | dataclasses.asdict(self.point) | {"new_tokens": self.new_tokens}


@dataclasses.dataclass
class Group:
    """The runners of a point, which its phases share. errors: of those that are right."""

    setup: Setup
    references: References
    runners: dict[str, Runner]
    errors: dict[str, float | None]
    left_out: dict[str, str]


class Bench:
    """Measures one case after another; the systems of a point are built once for all its phases."""

    def __init__(
        self, session: Session, model: nn.Module, chosen: dict[str, System], args: argparse.Namespace
    ) -> None:
        self.session, self.model, self.chosen, self.args = session, model, chosen, args
        self.cuda = next(model.parameters()).device.type == "cuda"
        self._point: Point | None = None
        self._group: Group | None = None

    def _build(self, point: Point) -> Group:
        setup = Setup(self.model, point, self.args.seed)
        if peft_missing() is None:
            setup.merged = merge(setup)
        group = Group(setup, References(setup), {}, {}, {})
        for name, system in self.chosen.items():
            reason = system.why_not(setup)
            if reason is None:
                try:
                    runner = system.build(setup)
                    reason = self._admit(group, name, system, runner)
                except Unable as error:
                    reason = str(error)
                except Exception as error:  # a peer that breaks must not end the run
                    reason = f"failed: {type(error).__name__}: {error}".splitlines()[0]
            if reason is not None:
                group.left_out[name] = reason
                self.session.note(f"{name}: {reason}")
        return group

    def _admit(self, group: Group, name: str, system: System, runner: Runner) -> str | None:
        """Lets a runner in that gives the right logits; returns why not."""
        try:
            error = group.references.error(runner, system.family, decode=True)
        except Unable:
            error = group.references.error(runner, system.family, decode=False)
        allowed = TOLERANCE[group.setup.dtype]
        if not error <= allowed:
            return f"wrong: error {error:.2g} of what the adapters change, allowed {allowed:g}"
        group.runners[name], group.errors[name] = runner, error
        return None

    def group(self, point: Point) -> Group:
        if self._point != point:
            self._group = None  # frees the models of the point before
            self._group, self._point = self._build(point), point
        assert self._group is not None
        return self._group

    def _agreement(self, group: Group, name: str, case: OverheadCase) -> dict[str, Any]:
        """Share of tokens that are the reference's. Raises LeftOut where too few are."""
        if case.phase != "generate" or self.chosen[name].family != "reft":
            return {}
        share = group.references.agreement(group.runners[name], case.new_tokens)
        if group.setup.dtype is torch.float32 and share < AGREEMENT:
            raise LeftOut(f"wrong: {share:.0%} of its tokens are the reference's, {AGREEMENT:.0%} asked for")
        return {"token_agreement": share}

    def _candidate(self, name: str, runner: Runner, case: OverheadCase) -> Candidate:
        if case.phase == "prefill":
            return Candidate(name, [runner.prefill], runner.context)
        if case.phase == "generate":
            return Candidate(name, [lambda: runner.generate(case.new_tokens)], runner.context)
        with runner.context():
            runner.prefill()
            try:
                runner.decode()
            except Unable as error:
                raise LeftOut(str(error)) from error
        return Candidate(name, [runner.decode], runner.context, runner.rewind)

    @torch.no_grad()
    def measure(self, case: OverheadCase, tick: Tick) -> CaseResult:
        try:
            group = self.group(case.point)
        except Unable as error:
            raise LeftOut(str(error)) from error
        left_out = dict(group.left_out)
        candidates: dict[str, Candidate] = {}
        agreements: dict[str, dict[str, Any]] = {}
        for name, runner in group.runners.items():
            try:
                agreements[name] = self._agreement(group, name, case)
                candidates[name] = self._candidate(name, runner, case)
            except LeftOut as reason:
                left_out[name] = str(reason)
                self.session.note(f"{case.phase}: {name}: {reason}")
        if BASELINE not in candidates:
            raise LeftOut(f"the baseline {BASELINE!r} can't be measured: {left_out.get(BASELINE)}")
        twin = Runner(group.setup, models.twin(group.setup.merged))
        candidates[CONTROL] = self._candidate(CONTROL, twin, case)
        clock = self._clock(case)
        samples = interleave(list(candidates.values()), clock, self.args.rounds, self.args.seed, tick)
        found = record.summarize(samples, BASELINE, CONTROL, group.errors)
        for name, runner in group.runners.items():
            if name in found:
                found[name].extra |= agreements[name]
                found[name].extra |= self._extra(case, runner, samples[name], samples[BASELINE])
            if name in found and runner.attributed:
                found[name].extra |= self._attributed(candidates[name], runner, samples[BASELINE])
        return CaseResult(case.id, case.params, BASELINE, CONTROL, found, left_out)

    def _clock(self, case: OverheadCase) -> Clock:
        warmup = 1 if case.phase == "generate" else 2
        return CudaEventClock(warmup=warmup) if self.cuda else CpuClock(span=0.0, warmup=warmup)

    def _extra(
        self, case: OverheadCase, runner: Runner, taken: list[float], baseline: list[float]
    ) -> dict[str, Any]:
        """Throughput, the difference of totals, and whether all rows had to take one adapter."""
        point = case.point
        tokens = {"prefill": point.prompt, "decode": 1, "generate": case.new_tokens}[case.phase]
        rate = point.batch * tokens / stats.median_interval(taken).median
        difference = stats.paired_difference(taken, baseline)
        return {
            "tokens_per_s": rate,
            "difference_s": difference.to_json(),
            "adapters_served": 1 if runner.single else point.adapters,
        }

    def _attributed(self, candidate: Candidate, runner: Runner, baseline: list[float]) -> dict[str, Any]:
        """Attributed seconds a call, and their share of the baseline's."""
        costs = attribution.call_costs()
        taken: list[float] = []
        with candidate.context(), attribution.attributing(runner.model, runner.attributed) as ledger:
            for _ in range(self.args.rounds):
                if candidate.before:
                    candidate.before()
                ledger.reset()
                candidate.calls[0]()
                taken.append(ledger.seconds(costs))
        return {
            "attributed_s": stats.median_interval(taken).to_json(),
            "attributed_share": stats.share(taken, baseline).to_json(),
            "attributed_samples": taken,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {preset.text}" for name, preset in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, default="quick", help=presets)
    parser.add_argument("--model", help='a shape ("1b", "7b", "llama-1024x8"), a path or a hub name')
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--phases", help=f"instead of the preset's: {', '.join(PHASES)}")
    parser.add_argument("--new-tokens", type=int, help="length of a generation")
    for axis in AXES:
        text = f"instead of the preset's sweep: values of {axis}, with commas"
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
        sweeps = (Sweep(base, {axis: tuple(values) for axis, values in given.items()}, sweeps[0].phases),)
    phases = args.phases.split(",") if args.phases else None
    for phase in phases or ():
        if phase not in PHASES:
            raise ResultError(f"--phases: unknown {phase!r}; allowed are {', '.join(PHASES)}")
    new_tokens = preset.new_tokens if args.new_tokens is None else args.new_tokens
    if new_tokens < 1:
        raise ResultError(f"--new-tokens: must be at least 1, was {new_tokens}")
    cases = []
    for sweep in sweeps:
        for values in sweep.points():
            layers = depth if values["layers"] == "all" else values["layers"]
            point = Point(**{**values, "layers": layers})
            for phase in phases or sweep.phases:
                tokens = new_tokens if phase == "generate" else 0
                cases.append(OverheadCase(phase, name, dtype, point, tokens))
    # Phases of a point follow each other, so that its systems are built once.
    points = list(dict.fromkeys(case.point for case in cases))
    return sorted(dict.fromkeys(cases), key=lambda case: points.index(case.point))


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
    preset = PRESETS[args.preset]
    args.rounds = args.rounds or preset.rounds
    name = args.model or preset.model
    dtype = args.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    chosen = choose(args.systems, all_systems(), BASELINE, UNASKED)
    settings = {"rounds": args.rounds, "seed": args.seed, "model": name, "systems": list(chosen)}
    session = Session("overhead", settings, device, args, console)
    with console.status(f"Building {name} …"):
        model = models.build(name, DTYPES[dtype], device, args.seed)
    bench = Bench(session, model, chosen, args)
    finished = session.run(cases_of(args, name, dtype, models.depth(model)), bench.measure, args.rounds)
    console.print(overhead_table(session.results))
    return 0 if finished else INTERRUPTED
