"""The command `reft-kernels`: `doctor` says what runs here, `build` compiles what is missing, and `convert`
imports a folder that pyreft saved."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path


def _positions(text: str) -> str | list[int]:
    """A position spec as `Positions.parse` takes it; "0,4,7" is a list of indices."""
    return [int(part) for part in text.split(",")] if re.fullmatch(r"-?\d+(,-?\d+)*", text) else text


_CONVERT_NOTES = """\
pyreft stores neither positions nor act_fn, dropout and the way it counted: give
what was trained with.

What an l position counts from depends on the data set that the adapter was
trained with, by its name in pyreft 0.1:
  length    ReftRawDataset, ReftPreferenceDataset,
            make_last_position_supervised_data_module,
            make_last_position_supervised_chat_data_module,
            make_multiple_position_supervised_data_module
  length-1  ReftSupervisedDataset, ReftGenerationDataset,
            ReftClassificationDataset, ReftRewardDataset

Exit status: 0, or 2 with one line on stderr if nothing was written.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reft-kernels", description="Fused representation finetuning: tools around the library."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor",
        help="say which backends run on this machine, why the others do not, and what that costs",
        epilog="Exit status: 0 if a fused backend runs on some device, 1 if only the reference backend does.",
    )
    doctor.add_argument("--json", action="store_true", help="print the facts as JSON")
    doctor.set_defaults(run=_doctor)

    build = commands.add_parser(
        "build",
        help="compile the native libraries of the installed package with the torch that is installed",
        epilog="Takes a C++ compiler and ninja; where nvcc and a torch with CUDA are, the CUDA library is "
        "built too (REFT_KERNELS_BUILD_CUDA=0 leaves it). Exit status: 0, or 1 if a library could not be "
        "built.",
    )
    build.set_defaults(run=_build)

    convert = commands.add_parser(
        "convert",
        help="turn a folder that pyreft saved into a native adapter folder",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_CONVERT_NOTES,
    )
    convert.add_argument("source", type=Path, metavar="PYREFT_DIR", help="folder with pyreft's config.json")
    convert.add_argument("target", type=Path, metavar="OUT_DIR", help="folder to write")
    convert.add_argument(
        "--positions",
        type=_positions,
        required=True,
        help="f3+l3, f5, l1, all, prompt, generated, or indices into the prompt such as 0,4,7",
    )
    convert.add_argument("--act-fn", help="activation of the learned source, for example relu")
    convert.add_argument("--dropout", type=float, default=0.0, help="dropout in training (default: 0)")
    convert.add_argument(
        "--last-position",
        choices=("length", "length-1"),
        default="length",
        help="where l positions count from: the prompt's length, or one less (default: length); see below",
    )
    convert.add_argument(
        "--force", action="store_true", help="replace an adapter that OUT_DIR holds, without asking"
    )
    convert.set_defaults(run=_convert)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    facts = doctor.diagnose()
    print(json.dumps(facts, indent=2) if arguments.json else doctor.report(facts))
    return 0 if facts["fast"] else 1


def _build(arguments: argparse.Namespace) -> int:
    import tempfile

    from . import build

    with tempfile.TemporaryDirectory(prefix="reft_kernels-") as folder:
        return build.build_all(Path(folder))


def _may_replace(target: Path) -> bool:
    """Asks whether the adapter in a folder may be replaced. Raises ValueError where nobody can answer."""
    if not sys.stdin.isatty():
        raise ValueError(f"{target} holds an adapter already; give --force to replace it")
    answer = input(f"{target} holds an adapter already. Replace it? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _convert(arguments: argparse.Namespace) -> int:
    from . import adapter
    from .checkpoint import native

    try:
        holds_one = (arguments.target / native.CONFIG).exists()
        if holds_one and not arguments.force and not _may_replace(arguments.target):
            raise ValueError(f"{arguments.target} was left as it is")
        adapter.convert(
            arguments.source,
            arguments.target,
            positions=arguments.positions,
            act_fn=arguments.act_fn,
            dropout=arguments.dropout,
            last_position=arguments.last_position,
        )
    except (ValueError, OSError) as error:
        print(f"reft-kernels convert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.target}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = _parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
