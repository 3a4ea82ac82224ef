"""A run of many cases: progress with the time left, results kept after each case, Ctrl-C and --resume."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..records import record
from ..records.record import CaseResult, ResultError, Results
from . import machine

INTERRUPTED = 130


class LeftOut(Exception):
    """A case that can't be measured; the message says why, and the rest of the run goes on."""


class Case(Protocol):
    """What a session needs to know of a case."""

    @property
    def id(self) -> str: ...

    @property
    def result_ids(self) -> list[str]:
        """The ids of the results that it gives."""
        ...


Tick = Callable[[], None]
Measure = Callable[[Any, Tick], Sequence[CaseResult]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every measuring command has."""
    parser.add_argument(
        "--out", type=Path, help="folder for results.json and results.csv (default: results/<command>-<time>)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out that was interrupted"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that are in --out")
    parser.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1, … (default: cuda where there is one)"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--rounds", type=int, default=None, help="samples of each system, interleaved (at least 2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--systems", default=None, help="comma-separated names; the baseline is always there")


def prepare_torch(args: argparse.Namespace) -> str:
    """Sets threads and checks the device. Returns the device. Raises ResultError."""
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise ResultError(f"--threads: must be at least 1, was {args.threads}")
        torch.set_num_threads(args.threads)
    if args.rounds is not None and args.rounds < 2:
        raise ResultError(f"--rounds: must be at least 2, was {args.rounds}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ResultError(f"--device {device}: not a device: {error}") from error
    if kind not in ("cpu", "cuda"):
        raise ResultError(f"--device {device}: cpu and cuda can be measured")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResultError(
            f"--device {device}: torch {torch.__version__} finds no CUDA device here; use --device cpu"
        )
    if kind == "cuda":
        torch.cuda.set_device(torch.device(device))
    torch.manual_seed(args.seed)
    return device


class Session:
    """Runs cases and keeps what was measured.

    Args:
        command: as in the results.
        settings: all that a number depends on and the case's params don't say; JSON values.
        args: the parsed arguments of `add_arguments`.

    Raises: ResultError for a folder that can't be written to, that holds results already, or that can't
        be resumed.
    """

    def __init__(
        self, command: str, settings: dict[str, Any], device: str, args: argparse.Namespace, console: Console
    ) -> None:
        self.console = console
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.folder: Path = args.out or Path("results") / f"{command}-{stamp}"
        if args.resume and args.out is None:
            raise ResultError("--resume: needs the --out of the run that it goes on with")
        record.prepare_folder(self.folder)
        # Through JSON, so that what is compared on --resume is what a file gives back.
        as_read = json.loads(json.dumps({"settings": settings, "machine": machine.describe(device)}))
        self.results = Results(command, **as_read)
        file = self.folder / record.FILE
        if args.resume and file.exists():
            self.results = record.resumed(record.load(file), self.results, str(file))
            console.print(f"Going on with {file}: {len(self.results.cases)} cases are there already.")
        elif file.exists() and not args.overwrite:
            raise ResultError(
                f"--out {self.folder}: holds results already; --resume goes on, --overwrite replaces them"
            )

    def note(self, text: str) -> None:
        """Says once, on the screen and in the results, what is left out and why."""
        if text not in self.results.notes:
            self.console.print(f"[yellow]note:[/] {text}", highlight=False)
            self.results.note(text)

    def save(self) -> None:
        record.save(self.results, self.folder)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def run(self, cases: Sequence[Case], measure: Measure, rounds: int) -> bool:
        """Measures the cases that the results lack. Returns False after Ctrl-C; what was measured is kept.

        Args:
            measure: (case, tick) → its results; calls tick once a round; may raise LeftOut.
            rounds: how often `measure` calls tick.
        """
        done = {case.id for case in self.results.cases}
        todo = [case for case in cases if not done.issuperset(case.result_ids)]
        self.save()
        try:
            with self._progress() as progress:
                task = progress.add_task("", total=rounds * len(todo))
                for number, case in enumerate(todo):
                    progress.update(task, description=case.id, completed=rounds * number)
                    try:
                        self.results.cases += measure(case, lambda: progress.advance(task))
                    except LeftOut as reason:
                        self.note(f"{case.id}: {reason}")
                    self.save()
        except KeyboardInterrupt:
            self.save()
            self.console.print(
                f"\nInterrupted: {len(self.results.cases)} results are kept in {self.folder}; the same "
                f" command with --out {self.folder} --resume goes on."
            )
            return False
        self.results.finish()
        self.save()
        self.console.print(f"Written: {self.folder / record.FILE} and {record.TABLE}", highlight=False)
        return True
