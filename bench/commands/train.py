"""The command `reft-bench train`: step time and peak memory, over the frozen model with one vector."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..measure import memory
from ..measure.session import INTERRUPTED, LeftOut, Session, Tick, prepare_torch
from ..measure.timer import Candidate, CpuClock, CudaEventClock, interleave
from ..records import record
from ..records.record import CaseResult, ResultError
from ..records.tables import conclude, train_table
from ..systems import models
from ..systems.base import Point, Setup, System, Unable
from ..systems.training import BASELINE, CONTROL, OursTrainee, Step, Trainee, all_systems
from .overhead import DTYPES, choose
from .sweep import axis_values

#: Largest relative distance of the first loss and of dW and db to those of the reference backend.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"model": "llama-512x8", "batch": "4", "prompt": "32", "completion": 32, "rounds": 11},
    "cpu": {
        "model": "llama-512x8,llama-1024x8",
        "batch": "4",
        "prompt": "32",
        "completion": 32,
        "rounds": 21,
    },
    "full": {"model": "1b", "batch": "8", "prompt": "256", "completion": 256, "rounds": 31},
}
UNASKED = ("reft_kernels reference",)
AXES = ("batch", "prompt", "rank", "layers", "positions")


@dataclasses.dataclass(frozen=True)
class TrainCase:
    """A point; completion: tokens of each row that the loss is on."""

    model: str
    dtype: str
    point: Point
    completion: int

    @property
    def id(self) -> str:
        p = self.point
        return (
            f"train {self.model} {self.dtype} batch={p.batch} prompt={p.prompt}+{self.completion} "
            f"rank={p.rank} layers={p.layers} positions={p.positions}"
        )

    @property
    def result_ids(self) -> list[str]:
        return [self.id]

    @property
    def params(self) -> dict[str, Any]:
        found = {"phase": "train", "model": self.model, "dtype": self.dtype, **dataclasses.asdict(self.point)}
        return found | {"completion": self.completion}


def batch_of(setup: Setup, completion: int) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), [batch, prompt + completion]; labels are −100 on the prompt."""
    generator = torch.Generator().manual_seed(setup.seed + 1)
    vocabulary = setup.original.config.get_text_config().vocab_size
    shape = (setup.point.batch, completion)
    rest = torch.randint(3, vocabulary, shape, generator=generator).to(setup.device)
    input_ids = torch.cat([setup.input_ids, rest], dim=1)
    labels = input_ids.clone()
    labels[:, : setup.point.prompt] = -100
    return input_ids, labels


def gradients(trainee: Trainee, input_ids: Tensor, labels: Tensor) -> tuple[float, list[Tensor]]:
    """The loss, and the gradients of what the trainee shows of itself; leaves no gradient behind."""
    with trainee.context():
        loss = trainee.loss(input_ids, labels)
        found = torch.autograd.grad(loss, trainee.probe) if trainee.probe else ()
    return loss.item(), [gradient.double() for gradient in found]


def error_of(trainee: Trainee, input_ids: Tensor, labels: Tensor) -> float:
    """Distance of the first loss, and of the gradients of W and b, to those of the reference, relative."""
    setup = trainee.setup
    loss, mine = gradients(trainee, input_ids, labels)
    if trainee.fresh:
        with torch.no_grad():
            model = models.twin(setup.original)
            wanted = model(input_ids=input_ids, labels=labels, use_cache=False).loss.item()
        return abs(loss - wanted) / abs(wanted)
    wanted, theirs = gradients(OursTrainee(setup, "reference"), input_ids, labels)
    size = sum(t.square().sum() for t in theirs).sqrt().item()
    off = sum((m.reshape(t.shape) - t).square().sum() for m, t in zip(mine, theirs)).sqrt().item()
    return max(abs(loss - wanted) / abs(wanted), off / max(size, 1e-30))


class Bench:
    """Measures one case after another."""

    def __init__(
        self,
        session: Session,
        built: dict[str, nn.Module],
        chosen: dict[str, System],
        args: argparse.Namespace,
        cuda: bool,
    ) -> None:
        self.session, self.built, self.chosen, self.args, self.cuda = session, built, chosen, args, cuda

    def _admit(self, system: System, setup: Setup, batch: tuple[Tensor, Tensor]) -> tuple[Trainee, float]:
        """The system's trainee and its error. Raises Unable where it is wrong or broken."""
        reason = system.why_not(setup)
        if reason is not None:
            raise Unable(reason)
        try:
            trainee = system.build(setup)
            error = error_of(trainee, *batch)
        except Unable:
            raise
        except Exception as failure:  # a peer that breaks must not end the run
            raise Unable(f"failed: {type(failure).__name__}: {failure}".splitlines()[0]) from failure
        allowed = TOLERANCE[setup.dtype]
        if not error <= allowed:
            raise Unable(f"wrong: loss or gradients off by {error:.2g}, allowed {allowed:g}")
        return trainee, error

    def measure(self, case: TrainCase, tick: Tick) -> list[CaseResult]:
        try:
            setup = Setup(self.built[case.model], case.point, self.args.seed)
        except Unable as error:
            raise LeftOut(str(error)) from error
        batch = batch_of(setup, case.completion)
        steps: dict[str, Step] = {}
        errors: dict[str, float | None] = {}
        left_out: dict[str, str] = {}
        for name, system in self.chosen.items():
            try:
                trainee, errors[name] = self._admit(system, setup, batch)
                steps[name] = Step(trainee, *batch)
            except Unable as reason:
                left_out[name] = str(reason)
                self.session.note(f"{name}: {reason}")
        if BASELINE not in steps:
            raise LeftOut(f"the baseline {BASELINE!r} can't be measured: {left_out[BASELINE]}")
        steps[CONTROL] = Step(self._admit(self.chosen[BASELINE], setup, batch)[0], *batch)
        candidates = [Candidate(name, [step], step.trainee.context) for name, step in steps.items()]
        clock = CudaEventClock(warmup=2) if self.cuda else CpuClock(span=0.0, warmup=2)
        samples = interleave(candidates, clock, self.args.rounds, self.args.seed, tick)
        found = record.summarize(samples, BASELINE, CONTROL, errors)
        tokens = case.point.batch * (case.point.prompt + case.completion)
        for name, step in steps.items():
            with step.trainee.context():
                step.optimizer.zero_grad(set_to_none=True)
                peak = memory.peak_bytes(step, self.cuda)
            found[name].extra |= {
                "tokens_per_s": tokens / found[name].time.median,
                "peak_bytes": peak,
                "trained_parameters": sum(p.numel() for p in step.trainee.parameters),
            }
        return [CaseResult(case.id, case.params, BASELINE, CONTROL, found, left_out)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="quick",
        help="quick: 2 CPU cores; cpu: the README's record, two widths; full: a 1B shape",
    )
    parser.add_argument(
        "--model", help='shapes ("1b", "llama-512x8"), paths or hub names, with commas between several'
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--completion", type=int, help="tokens of a row that the loss is on")
    defaults = {"rank": "8", "layers": "all", "positions": "f3+l3,all"}
    for axis in AXES:
        parser.add_argument(f"--{axis}", default=defaults.get(axis), help=f"values of {axis}, with commas")


def cases_of(args: argparse.Namespace, model: str, dtype: str, depth: int) -> list[TrainCase]:
    """The product of all values for one model. Raises ResultError."""
    cases = []
    for values in itertools.product(*(axis_values(axis, getattr(args, axis)) for axis in AXES)):
        given = dict(zip(AXES, values))
        given["layers"] = depth if given["layers"] == "all" else given["layers"]
        cases.append(TrainCase(model, dtype, Point(**given, adapters=1), args.completion))
    return list(dict.fromkeys(cases))


def run(args: argparse.Namespace, console: Console) -> int:
    device = prepare_torch(args)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.completion < 1:
        raise ResultError(f"--completion: must be at least 1, was {args.completion}")
    dtype = args.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    chosen = choose(args.systems, all_systems(), BASELINE, UNASKED)
    settings = {"rounds": args.rounds, "seed": args.seed, "model": args.model, "systems": list(chosen)}
    session = Session("train", settings, device, args, console)
    built: dict[str, nn.Module] = {}
    for name in args.model.split(","):
        with console.status(f"Building {name} …"):
            built[name] = models.build(name, DTYPES[dtype], device, args.seed)
    cases = [case for name in built for case in cases_of(args, name, dtype, models.depth(built[name]))]
    bench = Bench(session, built, chosen, args, torch.device(device).type == "cuda")
    finished = session.run(cases, bench.measure, args.rounds)
    console.print(train_table(session.results))
    conclude(console, session.results)
    return 0 if finished else INTERRUPTED
