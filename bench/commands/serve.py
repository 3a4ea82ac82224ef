"""The command `reft-bench serve`: what adapters cost a vLLM server, against their number.

Every engine is a process of its own; they take turns, a batch of requests each, in rounds of shuffled order.
A sample is the time of a whole batch; beside it stand the times to the first token and between tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..measure.session import INTERRUPTED, Session, Tick, prepare_torch
from ..records import record, serve_costs, serve_report
from ..records.record import CaseResult, ResultError, SystemResult
from ..records.serve_costs import BARE, CONTROL, IDLE, LORA
from ..serving.engines import (
    FOLDERS,
    LORA_FOLDER,
    POSITIONS,
    Engine,
    arguments,
    requests_of,
    save_adapters,
    save_loras,
)
from ..serving.http import HttpEngine, ServerError
from ..systems import models
from . import serve_cases
from .serve_cases import HTTP, ServeCase, cases_of

SYSTEMS = (BARE, CONTROL, *POSITIONS, LORA)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: What the plugin's systems share.
PLUGIN = "reft_kernels"


class Engines:
    """One engine for each kind, all asked in the same way; started when the first case needs them.

    cold: of each system, what its first batch with adapters took, and the same batch again.
    plain: of each engine, the first tokens of requests without an adapter, before any asked for one.
    """

    def __init__(self, bench: Bench, through: str) -> None:
        self.bench, self.through = bench, through
        self.running: dict[str, Engine | HttpEngine] = {}
        self.cold: dict[str, dict[str, float]] = {}
        self.plain: dict[str, list[list[int]]] = {}

    def start(self) -> None:
        bench = self.bench
        for name, settings in bench.settings.items():
            bench.say(f"starting {name} ({self.through})")
            try:
                self.running[name] = self._start(name, settings)
            except (RuntimeError, ServerError) as error:
                bench.left_out[name] = str(error)
                bench.session.note(f"{name}: {error}")
                if name in (BARE, CONTROL):
                    raise ResultError(f"{name} does not start: {error}") from error
        bare = [None] * bench.args.requests
        for name, engine in self.running.items():
            self.plain[name] = engine.run(bare)["tokens"]  # its code is compiled then, its caches are warm
        if self.through != HTTP:
            # What is compiled with the edits in it rounds in other places.
            for name in (CONTROL, PLUGIN) if bench.args.eager else (CONTROL,):
                if name in self.plain and self.plain[name] != self.plain[BARE]:
                    raise ResultError(f"{name} gives other tokens than {BARE}")
        for system in (*POSITIONS, LORA):
            running = self.of(system)
            if running is not None and system in bench.chosen and bench.most:
                bench.say(f"first use of {bench.most} adapters: {system} ({self.through})")
                asked = requests_of(system, bench.folder, bench.most, bench.args.requests)
                first, again = running.run(asked), running.run(asked)
                self.cold[system] = {
                    "cold_adapters": bench.most,
                    "cold_s": first["seconds"],
                    "warm_s": again["seconds"],
                    "cold_first_s": float(np.median(first["first"])),
                    "warm_first_s": float(np.median(again["first"])),
                }

    def _start(self, name: str, settings: dict[str, Any]) -> Engine | HttpEngine:
        bench, args = self.bench, self.bench.args
        if self.through != HTTP:
            spec = {"engine": settings, "requests": args.requests, "prompt": args.prompt}
            return Engine(name, bench.folder, spec | {"new": args.new_tokens, "seed": args.seed})
        left = ("model", "disable_log_stats", "enable_prefix_caching", "enforce_eager")
        options = {key: value for key, value in settings.items() if key not in left}
        options |= {"no_enable_prefix_caching": True} | ({"enforce_eager": True} if args.eager else {})
        if name == LORA:
            options["lora_modules"] = [
                f"{n}={bench.folder / LORA_FOLDER / str(n)}" for n in range(bench.most)
            ]
        model = Path(settings["model"])
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        drawn = np.random.default_rng(args.seed).integers(3, vocabulary, size=(args.requests, args.prompt))
        log = bench.folder / f"server-{len(self.running)}.log"
        environment = {"VLLM_CACHE_ROOT": str(bench.folder / "cache")}
        return HttpEngine(model, log, options, drawn.tolist(), args.new_tokens, environment)

    @staticmethod
    def kind(system: str) -> str:
        """The engine that a system is of."""
        return PLUGIN if system in (*POSITIONS, IDLE) else system

    def of(self, system: str) -> Engine | HttpEngine | None:
        return self.running.get(self.kind(system))

    def close(self) -> None:
        for engine in self.running.values():
            engine.close()
        self.running = {}


def summarized(samples: dict[str, list[float]]) -> dict[str, SystemResult]:
    """As `record.summarize`; a system with fewer rounds is paired with the first of the others."""
    systems = {}
    for count in sorted({len(taken) for taken in samples.values()}, reverse=True):
        part = {
            name: taken[:count]
            for name, taken in samples.items()
            if len(taken) == count or name in (BARE, CONTROL)
        }
        systems = record.summarize(part, BARE, CONTROL, {}) | systems
    return {name: systems[name] for name in samples}


class Bench:
    """Writes the model and the adapters, and has engines take turns."""

    def __init__(
        self, args: argparse.Namespace, session: Session, folder: Path, chosen: list[str], most: int
    ) -> None:
        self.args, self.session, self.folder, self.chosen, self.most = args, session, folder, chosen, most
        self.left_out: dict[str, str] = {}
        self.engines: Engines | None = None
        #: vllm.LLM's arguments of each engine.
        self.settings: dict[str, dict[str, Any]] = {}

    def _prepare(self) -> None:
        args, most = self.args, self.most
        model = models.build(args.model, DTYPES[args.dtype], "cpu", args.seed)
        path = self.folder / "model"
        model.save_pretrained(path)
        shape = models.width(model), models.depth(model)
        settings = arguments(path, args)
        self.settings = {BARE: settings, CONTROL: settings}
        mine = [system for system in POSITIONS if system in self.chosen]
        adapters = self.folder / "adapters"
        adapters.mkdir()
        for system in mine:
            save_adapters(adapters, FOLDERS[system], most, POSITIONS[system], shape, args.rank)
        if mine:
            # Room for all that are asked for, as vLLM's LoRA has.
            places = max(args.requests, len(mine) * most)
            reft = {"directory": str(adapters), "max_rank": args.rank, "max_adapters": places}
            self.settings[PLUGIN] = settings | {"additional_config": {"reft": reft}}
        if LORA in self.chosen and most:
            save_loras(self.folder / LORA_FOLDER, most, model, args.rank)
            at_once = min(most, args.requests)
            lora = {"enable_lora": True, "max_lora_rank": max(8, args.rank), "max_loras": at_once}
            self.settings[LORA] = settings | lora | {"max_cpu_loras": max(most, at_once)}

    def measure(self, case: ServeCase, tick: Tick) -> list[CaseResult]:
        if not self.settings:
            self._prepare()
        if self.engines is None or self.engines.through != case.through:
            self.close()
            self.engines = Engines(self, case.through)
            self.engines.start()
        engines, args = self.engines, self.args
        wanted = [one for one in self.chosen if one in (BARE, CONTROL) or case.adapters]
        if not case.adapters and PLUGIN in engines.running:
            wanted.append(IDLE)
        names = [one for one in wanted if engines.of(one) is not None]
        asked = {one: requests_of(one, self.folder, case.adapters, args.requests) for one in names}

        def take(name: str) -> dict[str, Any]:
            engine = engines.of(name)
            assert engine is not None
            return engine.run(asked[name])

        # All of these adapters were in use before (see `Engines.start`): nothing is warmed up here.
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        rng = random.Random(args.seed)
        for number in range(args.rounds):
            order = [name for name in names if name != LORA or number < args.lora_rounds]
            rng.shuffle(order)
            for name in order:
                taken[name].append(take(name))
            tick()
        for name in names:
            self._check_tokens(name, [one["tokens"] for one in taken[name]], case)
        systems = summarized({name: [one["seconds"] for one in several] for name, several in taken.items()})
        tokens_made = args.requests * args.new_tokens
        for name, result in systems.items():
            result.extra["tokens_per_s"] = tokens_made / result.time.median
            for key in ("first", "between"):
                medians = [float(np.median(one[key])) for one in taken[name]]
                result.extra |= {f"{key}_s": float(np.median(medians)), f"{key}_samples": medians}
            if case.adapters == self.most:
                result.extra |= engines.cold.get(name, {})
        found = ", ".join(f"{name} {1 / one.ratio.median:.3f}" for name, one in systems.items() if one.ratio)
        self.say(f"{case.through}, {case.adapters} adapters, throughput over {BARE}: {found}")
        return [CaseResult(case.id, case.all_params, BARE, CONTROL, systems, dict(self.left_out))]

    def say(self, text: str) -> None:
        """A line of progress, for logs that have no bar."""
        self.session.console.print(text, highlight=False)

    def _check_tokens(self, name: str, found: list[Any], case: ServeCase) -> None:
        """Raises ResultError where adapters do nothing, or requests without one get something else."""
        assert self.engines is not None
        plain = self.engines.plain[self.engines.kind(name)]
        for tokens in found:
            if name not in (BARE, CONTROL, IDLE):
                if tokens == plain:
                    raise ResultError(f"{name} gives the tokens of no adapter: its adapters do nothing")
            elif tokens != plain and case.through != HTTP:  # there batches form as clients come
                raise ResultError(f"{name} gives other tokens than before adapters were asked for")

    def close(self) -> None:
        if self.engines is not None:
            self.engines.close()
        self.engines = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a shape, a path or a hub name")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    serve_cases.add_arguments(parser)
    parser.add_argument("--eager", action="store_true", help="nothing compiled, no CUDA graphs")
    parser.add_argument(
        "--memory", type=float, default=0.3, help="gpu_memory_utilization of each engine (0.3)"
    )
    parser.add_argument("--block-size", type=int, default=32, help="of the KV cache; 0 for vLLM's own (32)")


def shown(results: record.Results) -> list[Table]:
    found = []
    for one in serve_report.tables(results):
        table = Table(title=one.title, title_justify="left")
        for heading in one.headings:
            table.add_column(heading, no_wrap=True)
        for number, row in enumerate(one.rows):
            if row[0] and number:
                table.add_section()
            table.add_row(*row)
        found.append(table)
    return found


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def run(args: argparse.Namespace, console: Console) -> int:
    if not has_vllm():
        raise ResultError("vLLM is not installed here; make test-serving makes an environment that has it")
    cases = cases_of(args)
    chosen = [BARE, CONTROL]
    for name in args.systems.split(",") if args.systems else SYSTEMS:
        matching = [one for one in SYSTEMS if one.startswith(name.strip())]
        if not matching:
            raise ResultError(f"--systems: unknown {name!r}; allowed are {', '.join(SYSTEMS)}")
        chosen += [one for one in matching if one not in chosen]
    device = prepare_torch(args)
    kept = ("model", "rounds", "lora_rounds", "seed", "eager", "memory", "block_size")
    settings = {name: getattr(args, name) for name in kept} | {"systems": chosen}
    session = Session("serve", settings, device, args, console)
    most = max((case.adapters for case in cases), default=0)
    with tempfile.TemporaryDirectory(prefix="reft-bench-serve-") as folder, contextlib.ExitStack() as stack:
        bench = Bench(args, session, Path(folder), chosen, most)
        stack.callback(bench.close)
        finished = session.run(cases, bench.measure, args.rounds)
    for table in shown(session.results):
        console.print(table)
    for sentence in serve_costs.sentences(session.results):
        console.print(f"• {sentence}", highlight=False)
    return 0 if finished else INTERRUPTED
