"""The stand-in for `reft-bench` where the GPU kit is rehearsed (gpu/dry.py).

It reads the arguments as the command would, says what it would measure, and measures a tiny case on this CPU
in its place.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
from typing import Any

from rich.console import Console

from ..kernels import systems
from ..measure import session
from ..records import record
from ..systems import all_systems
from ..systems.models import SHAPES
from ..systems.training import all_systems as all_trainees
from . import kernels, overhead, train

COMMANDS = {"kernels": kernels, "overhead": overhead, "train": train}


def arguments(words: list[str]) -> argparse.Namespace:
    """What the command line makes of these words, the command first."""
    parser = argparse.ArgumentParser(prog=f"reft-bench {words[0]}")
    session.add_arguments(parser)
    COMMANDS[words[0]].add_arguments(parser)
    return parser.parse_args(words[1:])


def cases(words: list[str]) -> list[Any]:
    """The cases of a command line of `reft-bench`, all of whose systems there are. Raises ResultError."""
    args = arguments(words)
    if words[0] == "kernels":
        overhead.choose(args.systems, systems.all_systems(), systems.BASELINE, ())
        return kernels.cases_of(args)
    if words[0] == "train":
        for name, value in train.PRESETS[args.preset].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        overhead.choose(args.systems, all_trainees(), train.BASELINE, ())
        return train.cases_of(args, args.model, "bfloat16", SHAPES[args.model][1])
    overhead.choose(args.systems, all_systems(), overhead.BASELINE, ())
    model = args.model or overhead.PRESETS[args.preset].model
    return overhead.cases_of(args, model, "bfloat16", SHAPES[model][1])


_TINY = "--device cpu --rounds 2 --threads 1 --rank 2"
_MODEL = f"{_TINY} --model tiny --batch 2 --prompt 8 --layers 1 --positions f1"

#: What is measured in place of a command's cases: arguments, and systems.
TINY = {
    "kernels": (f"{_TINY} --rows 2 --width 64 --adapters 2 --dtype float32 --no-call-cost", "native"),
    "overhead": (f"{_MODEL} --adapters 1 --phases decode --new-tokens 2", "reft_kernels native"),
    "train": (f"{_MODEL} --completion 2", "reft_kernels native"),
}


def main(words: list[str]) -> int:
    for case in cases(words):
        print(f"would measure {case.id}")
    tiny, names = TINY[words[0]]
    out = words[words.index("--out") + 1]
    for earlier in pathlib.Path(out).parent.glob(f"*/{record.FILE}"):
        if record.load(earlier).command == words[0]:  # once is enough of each
            shutil.copytree(earlier.parent, out)
            return 0
    chosen = arguments([words[0], *tiny.split(), "--systems", names, "--out", out])
    return COMMANDS[words[0]].run(chosen, Console())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
