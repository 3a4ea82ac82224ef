"""The command `reft-bench kernels`."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..gpu.ceilings import GpuCeilings, rows_in_cache
from ..kernels import systems
from ..kernels.cases import DIRECTIONS, DTYPES, MIXES, KernelCase, Problem, problems
from ..kernels.systems import BASELINE, CONTROL, GATHER, System
from ..measure.ceilings import Ceilings, Work
from ..measure.session import INTERRUPTED, LeftOut, Session, Tick, prepare_torch
from ..measure.timer import Candidate, Clock, CpuClock, CudaEventClock, CudaGraphClock, interleave
from ..records import record, stats
from ..records.record import CaseResult, ResultError, Results
from ..records.tables import conclude

ROUNDS = 25

#: Input sets on a GPU together fill this many L2 caches, so that none finds its data there.
CACHES = 3

#: A graph holds a node or more for each, so there is an end.
MOST_SETS = 4096

CALL_WIDTH = 64


def _clock(kind: str, device: str) -> Clock:
    if torch.device(device).type == "cpu":
        return CpuClock()
    return CudaGraphClock() if kind == "graph" else CudaEventClock()


def cold_bytes(work: Work, rows_cached: bool) -> int:
    """Bytes of an input set that should come from memory: all but h's rows, if those lie in the cache."""
    return work.moved - work.of_rows if rows_cached else work.footprint


def sets_beyond(cache: int, cold: int) -> int:
    """How many input sets with `cold` bytes each fill CACHES caches of `cache` bytes."""
    return max(2, min(MOST_SETS, -(-CACHES * cache // cold)))


class Bench:
    """Measures one case after another with the chosen systems."""

    def __init__(
        self, session: Session, chosen: dict[str, System], args: argparse.Namespace, device: str
    ) -> None:
        self.session, self.chosen, self.args, self.device = session, chosen, args, device
        self.ceilings: dict[int, Ceilings] = {}
        self.captures = args.clock == "graph" and torch.device(device).type == "cuda"

    def _problems(self, case: KernelCase) -> list[Problem]:
        """The input sets that calls rotate through."""
        seed, device = self.args.seed, self.device
        if torch.device(device).type == "cpu":
            return problems(case, device, seed)
        work = case.work(seed)
        # As in a model: the adapters are cold, but few rows of h were written by the op before.
        cached = rows_in_cache(work, device)
        cache, cold = torch.cuda.get_device_properties(device).L2_cache_size, cold_bytes(work, cached)
        sets = sets_beyond(cache, cold)
        if sets * cold < CACHES * cache:
            self.session.note(f"{case.id}: {sets} sets of {cold} bytes may lie in the L2 of {cache} bytes")
        return problems(case, device, seed, sets, own_rows=not cached)

    def _ceilings(self, copies: int) -> Ceilings:
        cuda = torch.device(self.device).type == "cuda"
        key = 1 if cuda else copies
        if key not in self.ceilings:
            self.ceilings[key] = (
                GpuCeilings(self.device, CudaGraphClock())
                if cuda
                else Ceilings(self.device, CpuClock(), copies)
            )
        return self.ceilings[key]

    def _usable(self, case: KernelCase, problem: Problem) -> tuple[dict[str, float], dict[str, str]]:
        """(error of each system that is right, reason for each that is left out)."""
        errors: dict[str, float] = {}
        left_out: dict[str, str] = {}
        for name, system in self.chosen.items():
            reason = system.why_not(case, self.device) or self._not_captured(name)
            if reason is not None:
                left_out[name] = reason
                self.session.note(f"{name}: {reason}")
                continue
            try:
                system.start()
                error = systems.check(system, problem)
            except Exception as failure:  # a peer that breaks must not end the run
                left_out[name] = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
            else:
                if error <= systems.tolerance(case):
                    errors[name] = error
                    continue
                left_out[name] = f"wrong: error {error:.2g} of the edit, allowed {systems.tolerance(case):g}"
            self.session.note(f"{case.id}: {name} {left_out[name]}")
        return errors, left_out

    def _not_captured(self, name: str) -> str | None:
        """Why a system can't be timed by graph replays, or None."""
        if name == "reference" and self.captures:
            return "reads the plan back to the host, which a graph can't hold (--clock launch times it)"
        return None

    def _candidate(self, name: str, system: System, sets: list[Problem]) -> Candidate:
        """A forward is captured, and so is a backward; else its time would be autograd's on the host."""
        direction = sets[0].case.direction
        build = (
            system.backward_ops if self.captures and direction == "backward" else getattr(system, direction)
        )
        return Candidate(name, [build(problem) for problem in sets], system.context)

    def measure(self, case: KernelCase, tick: Tick) -> list[CaseResult]:
        seed, device = self.args.seed, self.device
        sets = self._problems(case)
        errors, left_out = self._usable(case, sets[0])
        if BASELINE not in errors:
            raise LeftOut(f"the baseline {BASELINE!r} can't be measured: {left_out[BASELINE]}")

        def not_timed(name: str, failure: Exception) -> None:
            left_out[name] = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
            self.session.note(f"{case.id}: {name} {left_out[name]}")

        clock = _clock(self.args.clock, device)
        with torch.set_grad_enabled(case.direction == "backward"):
            with clock.building():
                candidates = [self._candidate(name, self.chosen[name], sets) for name in errors]
                candidates.append(self._candidate(CONTROL, self.chosen[BASELINE], sets))
            samples = interleave(candidates, clock, self.args.rounds, seed, tick, not_timed)
        if not {BASELINE, CONTROL} <= samples.keys():
            raise LeftOut(f"the baseline {BASELINE!r} can't be timed: {left_out}")
        with torch.no_grad():
            floor = self._ceilings(len(sets)).floor(case.work(seed), DTYPES[case.dtype])
        floor["input_sets"] = len(sets)
        self.session.results.ceilings = {str(key): value.to_json() for key, value in self.ceilings.items()}
        found = record.summarize(samples, BASELINE, CONTROL, errors)
        for name, result in found.items():
            if name == CONTROL or self.chosen[name].single:
                continue
            result.extra["floor_fraction"] = floor["floor_s"] / result.time.median
            if GATHER in found and name != GATHER:
                ratio = stats.paired_ratio(samples[name], samples[GATHER])
                result.extra["ratio_over_gather"] = ratio.to_json()
        return [CaseResult(case.id, case.params, BASELINE, CONTROL, found, left_out, floor)]


def _numbers(text: str, name: str) -> list[int]:
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        raise ResultError(f"{name}: must be integers with commas between them, was {text!r}") from None
    if not values or min(values) < 1:
        raise ResultError(f"{name}: must be at least 1, was {text!r}")
    return values


def _words(text: str, name: str, allowed: Any) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in allowed:
            raise ResultError(f"{name}: unknown {word!r}; allowed are {', '.join(allowed)}")
    return words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="1,16,64,256", help="T: rows of h in a call")
    parser.add_argument("--width", default="4096", help="d: length of a hidden state")
    parser.add_argument("--rank", default="8")
    parser.add_argument("--dtype", default="float32,bfloat16", help="float32, bfloat16, float16")
    parser.add_argument("--adapters", default="16", help="adapters that the mix draws from")
    parser.add_argument("--mix", default="distinct", help=f"which adapter a row takes: {', '.join(MIXES)}")
    parser.add_argument(
        "--pool-rows",
        type=int,
        default=0,
        help="rows of the pool that the adapters lie in (default: few more than they need)",
    )
    parser.add_argument("--direction", default="forward", help=", ".join(DIRECTIONS))
    parser.add_argument(
        "--clock",
        choices=("graph", "launch"),
        default="graph",
        help="on a GPU: graph replays or single launches",
    )
    parser.add_argument(
        "--no-call-cost",
        action="store_true",
        help="leave out the cases that show the cost of a call (T=1, d=64)",
    )


def cases_of(args: argparse.Namespace) -> list[KernelCase]:
    """The product of all sweeps, and the cost of a call for each direction and dtype. Raises ResultError."""
    directions = _words(args.direction, "--direction", DIRECTIONS)
    dtypes = _words(args.dtype, "--dtype", DTYPES)
    sweeps = (
        directions,
        dtypes,
        _numbers(args.width, "--width"),
        _numbers(args.rank, "--rank"),
        _numbers(args.adapters, "--adapters"),
        _words(args.mix, "--mix", MIXES),
        _numbers(args.rows, "--rows"),
    )
    cases = [
        KernelCase(direction, dtype, rows, width, rank, adapters, mix, args.pool_rows)
        for direction, dtype, width, rank, adapters, mix, rows in itertools.product(*sweeps)
    ]
    if not args.no_call_cost:
        cases += [
            KernelCase(direction, dtype, 1, CALL_WIDTH, 8, 1, "identical")
            for direction in directions
            for dtype in dtypes
        ]
    cases = list(dict.fromkeys(cases))
    for case in cases:
        if case.rank > case.width:
            raise ResultError(f"--rank: {case.rank} is more than the width {case.width}")
        need = case.adapters * case.rank
        if args.pool_rows and args.pool_rows < need:
            raise ResultError(
                f"--pool-rows: was {args.pool_rows}; {case.adapters} adapters of rank {case.rank} need {need}"
            )
    return cases


def run(args: argparse.Namespace, console: Console) -> int:
    device = prepare_torch(args)
    args.rounds = args.rounds or ROUNDS
    cases = cases_of(args)
    available = systems.all_systems()
    usual = [name for name, system in available.items() if not system.only_named]
    names = _words(args.systems, "--systems", available) if args.systems else usual
    chosen = {name: available[name] for name in dict.fromkeys([BASELINE, *names])}
    settings = {"rounds": args.rounds, "seed": args.seed, "clock": args.clock, "systems": list(chosen)}
    session = Session("kernels", settings, device, args, console)
    bench = Bench(session, chosen, args, device)
    finished = session.run(cases, bench.measure, args.rounds)
    console.print(table(session.results))
    conclude(console, session.results)
    return 0 if finished else INTERRUPTED


def _cell(system: record.SystemResult) -> tuple[str, str]:
    if system.ratio is None:
        return "1", ""
    ratio = system.ratio
    return f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", system.verdict or ""


def table(results: Results) -> Table:
    """The results as a table for the terminal."""
    shown = Table(
        title="The op alone; ratios over torch's eager sequence with a single adapter", title_justify="left"
    )
    shown.add_column("case", no_wrap=True)
    shown.add_column("system")
    for heading in ("µs a call", "over eager [95%]", "over gather"):
        shown.add_column(heading, justify="right")
    shown.add_column("verdict")
    for heading in ("of the floor", "floor µs", "MB moved"):
        shown.add_column(heading, justify="right")
    for case in results.cases:
        label = case.id
        assert case.floor is not None
        for name, system in case.systems.items():
            ratio, verdict = _cell(system)
            over = system.extra.get("ratio_over_gather")
            ratios = (ratio, "" if over is None else f"{over['median']:.3f}")
            fraction = system.extra.get("floor_fraction")
            floor = (
                ("", "", "")
                if fraction is None
                else (
                    f"{fraction:.0%}",
                    f"{case.floor['floor_s'] * 1e6:.1f}",
                    f"{case.floor['moved_bytes'] / 1e6:.2f}",
                )
            )
            shown.add_row(label, name, f"{system.time.median * 1e6:.1f}", *ratios, verdict, *floor)
            label = ""
        shown.add_section()
    return shown
