"""Stand-ins for what the GPU kit starts, for a rehearsal without a GPU: python -m bench.gpu.kit --dry

A step's command is handed to this module, which takes the tool's place. It reads the command line as the tool
would, and leaves what the tool would leave:

    setup.py             setuptools parses the options; nothing is built
    pytest               collects the tests, of which each "passes" in the JUnit file
    compute-sanitizer    its options are parsed; under memcheck the program runs, with the kernels for CPUs
    bench                bench.commands.rehearse: reads the arguments, measures a tiny case on this CPU
    bench.gpu.occupancy  says that there is no library
    machine              describes this machine, with a GPU that it does not have
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from typing import Any

from .checks import says
from .plan import CASES
from .step import Step

MODULE = "bench.gpu.dry"

#: By name, since commands build on this folder: the stand-in for `reft-bench`.
REHEARSAL = "bench.commands.rehearse"

GPU = {"name": "a stand-in", "capability": "9.0"}
BUILT = "nothing was built"

#: Seconds of a step, and of all.
LIMIT, WHOLE = 600, 1800


def rehearsed(step: Step) -> Step:
    """The same step with a stand-in for its tool, and time for a machine with few cores."""
    check = says(BUILT) if "setup.py" in step.command else step.check
    command = [sys.executable, "-m", MODULE, *step.command]
    return dataclasses.replace(step, command=command, check=check, limit=LIMIT)


def machine() -> int:
    from ..measure.machine import describe

    print(json.dumps(describe("cpu") | {"gpu": GPU}))
    return 0


def build(argv: list[str]) -> int:
    done = subprocess.run([*argv, "--help"], stdout=subprocess.DEVNULL)
    print(BUILT)
    return done.returncode


class _Collected:
    """A plugin of pytest that notes what was collected."""

    names: Sequence[str] = ()

    def pytest_collection_finish(self, session: Any) -> None:
        self.names = [item.nodeid for item in session.items]


def tests(words: list[str]) -> int:
    import pytest

    found, report = _Collected(), words[words.index("--junitxml") + 1]
    status = int(pytest.main([*words, "--collect-only", "-q"], plugins=[found]))
    suite = ElementTree.Element("testsuite", tests=str(len(found.names)))
    for name in found.names:
        ElementTree.SubElement(suite, "testcase", name=name)
    ElementTree.ElementTree(suite).write(report)
    return status


def sanitizer(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="compute-sanitizer", allow_abbrev=False)
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "initcheck", "synccheck"), required=True)
    parser.add_argument("--target-processes", choices=("application-only", "all"))
    parser.add_argument("--report-api-errors", choices=("no", "explicit", "all"))
    for name in ("--error-exitcode", "--launch-timeout", "--print-limit", "--port"):
        parser.add_argument(name, type=int)
    parser.add_argument("--kernel-name")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    args = parser.parse_args(words)
    if args.tool != "memcheck":  # its program runs once
        print(f"{CASES} of {CASES} cases, 0 wrong results: as under memcheck")
        return 0
    return subprocess.run([*args.program, "--device", "cpu"]).returncode


def benchmark(words: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", REHEARSAL, *words]).returncode


def occupancy(words: list[str]) -> int:
    print("no library: occupancy unknown")
    return 0


MODULES: dict[str, Callable[[list[str]], int]] = {
    "pytest": tests,
    "bench": benchmark,
    "bench.gpu.occupancy": occupancy,
}


def main(argv: list[str]) -> int:
    if argv == ["machine"]:
        return machine()
    if argv[0].endswith("compute-sanitizer"):
        return sanitizer(argv[1:])
    if argv[:2] == [sys.executable, "setup.py"]:
        return build(argv)
    if argv[:2] == [sys.executable, "-m"] and argv[2] in MODULES:
        return MODULES[argv[2]](argv[3:])
    print(f"no stand-in for {argv}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
