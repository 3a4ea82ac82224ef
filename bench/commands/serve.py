"""The command `reft-bench serve`: what adapters cost a vLLM server, against their number.

Every engine is a process of its own; they take turns, a batch of requests each, in rounds of shuffled order.
A sample is the time of a whole batch; beside it stand the times to the first token and between tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..measure.session import INTERRUPTED, Session, Tick, prepare_torch
from ..measure.timer import interleaved
from ..records import record
from ..records.record import CaseResult, ResultError
from ..records.tables import interval_text, time_text
from ..serving.engines import (
    BARE,
    CONTROL,
    FOLDERS,
    IDLE,
    LORA,
    LORA_FOLDER,
    POSITIONS,
    Engine,
    arguments,
    requests_of,
    save_adapters,
    save_loras,
)
from ..serving.http import HttpEngine
from ..systems import models
from .sweep import axis_values

SYSTEMS = (BARE, CONTROL, *POSITIONS, LORA)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class ServeCase:
    """A batch of requests with so many different adapters; 0 for the plugin without any."""

    adapters: int
    params: dict[str, Any] = dataclasses.field(hash=False)

    @property
    def id(self) -> str:
        p = self.params
        return (
            f"{p['model']} {p['dtype']} requests={p['requests']} prompt={p['prompt']} new={p['new_tokens']} "
            f"rank={p['rank']} adapters={self.adapters}"
        )

    @property
    def result_ids(self) -> list[str]:
        return [self.id]


class Bench:
    """Starts the engines and has them take turns."""

    def __init__(self, args: argparse.Namespace, session: Session, folder: Path, chosen: list[str]) -> None:
        self.args, self.session, self.folder, self.chosen = args, session, folder, chosen
        self.engines: dict[str, Engine | HttpEngine] = {}
        self.left_out: dict[str, str] = {}

    def prepare(self, most: int) -> None:
        """Writes the model and the adapters, and starts the engines."""
        args = self.args
        model = models.build(args.model, DTYPES[args.dtype], "cpu", args.seed)
        path = self.folder / "model"
        model.save_pretrained(path)
        shape = models.width(model), models.depth(model)
        settings = arguments(path, args)
        named = {}
        for system, positions in POSITIONS.items():
            if system in self.chosen:
                name = FOLDERS[system]
                save_adapters(self.folder / name, most, positions, shape, args.rank)
                named |= {f"{name}-{n}": str(self.folder / name / str(n)) for n in range(most)}
        reft = {"reft": {"adapters": named, "max_rank": args.rank}}
        wanted = {BARE: settings, CONTROL: settings}
        if named:
            wanted["reft_kernels"] = settings | {"additional_config": reft}
        if LORA in self.chosen:
            save_loras(self.folder / LORA_FOLDER, most, model, args.rank)
            at_once = min(most, args.requests)
            lora = {"enable_lora": True, "max_lora_rank": max(8, args.rank), "max_loras": at_once}
            wanted[LORA] = settings | lora | {"max_cpu_loras": max(most, at_once)}
        del model
        for name, engine in wanted.items():
            self.session.console.print(f"starting {name}", highlight=False)
            try:
                self.engines[name] = self._start(name, path, engine, most)
            except RuntimeError as error:
                self.left_out[name] = str(error)
                self.session.note(f"{name}: {error}")
                if name in (BARE, CONTROL):
                    raise ResultError(f"{name} does not start: {error}") from error

    def _start(self, name: str, model: Path, engine: dict[str, Any], most: int) -> Engine | HttpEngine:
        args = self.args
        if not args.http:
            spec = {"engine": engine, "requests": args.requests, "prompt": args.prompt}
            return Engine(name, self.folder, spec | {"new": args.new_tokens, "seed": args.seed})
        left = ("model", "disable_log_stats", "enable_prefix_caching", "enforce_eager")
        options = {key: value for key, value in engine.items() if key not in left}
        options |= {"no_enable_prefix_caching": True} | ({"enforce_eager": True} if args.eager else {})
        if name == LORA:
            options["lora_modules"] = [f"{n}={self.folder / LORA_FOLDER / str(n)}" for n in range(most)]
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        drawn = np.random.default_rng(args.seed).integers(3, vocabulary, size=(args.requests, args.prompt))
        log = self.folder / f"server-{len(self.engines)}.log"
        return HttpEngine(model, log, options, drawn.tolist(), args.new_tokens)

    def _engine(self, system: str) -> Engine | HttpEngine | None:
        return self.engines.get("reft_kernels" if system in (*POSITIONS, IDLE) else system)

    def measure(self, case: ServeCase, tick: Tick) -> list[CaseResult]:
        wanted = [one for one in self.chosen if one in (BARE, CONTROL) or case.adapters]
        if not case.adapters and "reft_kernels" in self.engines:
            wanted.append(IDLE)
        names = [one for one in wanted if self._engine(one) is not None]
        asked = {one: requests_of(one, self.folder, case.adapters, self.args.requests) for one in names}

        def take(name: str) -> dict[str, Any]:
            engine = self._engine(name)
            assert engine is not None
            return engine.run(asked[name])

        bare = take(BARE)["tokens"]
        for name in names:  # once for its compiled code, caches and adapters; and a look at what it gives
            tokens = take(name)["tokens"]
            if name in (CONTROL, IDLE) and tokens != bare:
                raise ResultError(f"{name} gives other tokens than {BARE}")
            if name not in (BARE, CONTROL, IDLE) and tokens == bare:
                raise ResultError(f"{name} gives the same tokens as {BARE}: its adapters do nothing")
        taken = interleaved(names, take, self.args.rounds, self.args.seed, tick)
        samples = {name: [one["seconds"] for one in several] for name, several in taken.items()}
        systems = record.summarize(samples, BARE, CONTROL, {})
        tokens_made = self.args.requests * self.args.new_tokens
        for name, result in systems.items():
            result.extra |= {
                "tokens_per_s": tokens_made / result.time.median,
                "first_s": float(np.median([one["first"] for one in taken[name]])),
                "between_s": float(np.median([one["between"] for one in taken[name]])),
            }
        params = {**case.params, "adapters": case.adapters}
        return [CaseResult(case.id, params, BARE, CONTROL, systems, dict(self.left_out))]

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="llama-1024x8", help="a shape, a path or a hub name (llama-1024x8)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--adapters", default="0,1,8,32,64", help="how many different ones, with commas")
    parser.add_argument("--requests", type=int, default=64, help="that run together (64)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer (32)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--http", action="store_true", help="HTTP servers and clients, not engines in process"
    )
    parser.add_argument("--eager", action="store_true", help="nothing compiled, no CUDA graphs")
    parser.add_argument(
        "--memory", type=float, default=0.3, help="gpu_memory_utilization of each engine (0.3)"
    )
    parser.add_argument("--block-size", type=int, default=32, help="of the KV cache; 0 for vLLM's own (32)")


def cases_of(args: argparse.Namespace) -> list[ServeCase]:
    """Raises ResultError."""
    for name in ("requests", "prompt", "new_tokens", "rank"):
        if getattr(args, name) < 1:
            raise ResultError(f"--{name.replace('_', '-')}: must be at least 1, was {getattr(args, name)}")
    idle = "0" in args.adapters.split(",")
    text = ",".join(word for word in args.adapters.split(",") if word != "0")
    counts = [0] * idle + sorted(set(axis_values("adapters", text) if text else []))
    if counts and counts[-1] > args.requests:
        raise ResultError(
            f"--adapters: {counts[-1]} different ones need as many --requests, were {args.requests}"
        )
    params = {
        name: getattr(args, name) for name in ("model", "dtype", "requests", "prompt", "new_tokens", "rank")
    }
    return [ServeCase(count, params) for count in counts]


def shown(results: record.Results) -> Table:
    table = Table(title="A batch of requests, over bare vLLM", title_justify="left")
    for heading in ("adapters", "system", "tokens/s", "throughput [95%]", "first token", "next", "verdict"):
        table.add_column(heading, no_wrap=True)
    for case in results.cases:
        label = str(case.params["adapters"])
        for name, system in case.systems.items():
            rate = f"{system.extra['tokens_per_s']:.0f}"
            share = "1"
            if system.ratio is not None:
                low, high = 1 / system.ratio.high, 1 / system.ratio.low
                share = interval_text(type(system.ratio)(1 / system.ratio.median, low, high))
            times = (time_text(system.extra["first_s"]), time_text(system.extra["between_s"]))
            table.add_row(label, name, rate, share, *times, system.verdict or "")
            label = ""
        table.add_section()
    return table


def run(args: argparse.Namespace, console: Console) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise ResultError("vLLM is not installed here; make test-serving makes an environment that has it")
    args.rounds = args.rounds or 7
    cases = cases_of(args)
    chosen = [BARE, CONTROL]
    for name in args.systems.split(",") if args.systems else SYSTEMS:
        matching = [one for one in SYSTEMS if one.startswith(name.strip())]
        if not matching:
            raise ResultError(f"--systems: unknown {name!r}; allowed are {', '.join(SYSTEMS)}")
        chosen += [one for one in matching if one not in chosen]
    device = prepare_torch(args)
    settings = {"rounds": args.rounds, "seed": args.seed, "systems": chosen, "eager": args.eager}
    settings["http"] = args.http
    session = Session("serve", settings, device, args, console)
    with tempfile.TemporaryDirectory(prefix="reft-bench-serve-") as folder:
        bench = Bench(args, session, Path(folder), chosen)
        try:
            bench.prepare(max((case.adapters for case in cases), default=0))
            finished = session.run(cases, bench.measure, args.rounds)
        finally:
            bench.close()
    console.print(shown(session.results))
    return 0 if finished else INTERRUPTED
