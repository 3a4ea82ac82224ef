"""The command line: reft-bench kernels | overhead | host | serve | train | report | compare."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from rich.console import Console

#: Command → (module that has add_arguments and run, whether it measures, one line of help).
COMMANDS = {
    "kernels": (".commands.kernels", True, "the op alone, beside torch's own ways and the machine's floor"),
    "overhead": (".commands.overhead", True, "whole forwards of a model, beside one with a merged LoRA"),
    "host": (".commands.host", True, "the host's own time in decode steps of a model that costs nothing"),
    "serve": (".commands.serve", True, "batches of requests to a vLLM engine, beside bare vLLM and its LoRA"),
    "train": (".commands.train", True, "training steps: time and peak memory, beside PEFT's LoRA and pyreft"),
    "report": (".commands.report", False, "what a folder of results says: sentences, plots and tables"),
    "compare": (
        ".commands.compare",
        False,
        "what got slower between two runs (exit status 1), and where noise hides it (3)",
    ),
}

#: Columns where the output is no terminal (a file, a log).
NARROWEST = 200


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the chosen command gets its arguments, so that the others' modules aren't imported."""
    top = argparse.ArgumentParser(prog="reft-bench", description="What ReFT costs, measured on this machine.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, (module, measures, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name != chosen:
            continue
        if measures:
            importlib.import_module(".measure.session", __package__).add_arguments(sub)
        importlib.import_module(module, __package__).add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns 0, 1 (compare found something slower), 2 (bad input), 3 (compare found that noise hides a change
    of the size asked about), 130 (interrupted).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser(argv[0] if argv else None).parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=NARROWEST)
    from .records.record import ResultError

    module = importlib.import_module(COMMANDS[args.command][0], __package__)
    try:
        return module.run(args, console)
    except ResultError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
