"""Whether a step of the GPU kit that ended with 0 did its work: each function makes a `Step.check`."""

from __future__ import annotations

import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

from ..records import record
from .step import Step

Check = Callable[[Step], str]

#: A skip whose reason is that a backend which is to be tested can't run (tests/conftest.py, tests/gpu).
_MISSING = re.compile(r"\b(native|triton)(?: on cuda)?: ")

#: A system of ours, in any benchmark.
_OURS = re.compile(r"(reft_kernels )?(native|triton)( fused)?")


def says(text: str) -> Check:
    """It must have said this."""
    return lambda step: "" if text in step.output else f"it did not say {text!r}"


def built(library: pathlib.Path) -> Check:
    return lambda step: "" if library.is_file() else f"{library} is not there"


def tests_ran(report: pathlib.Path) -> Check:
    """Some tests ran, and none was skipped because its backend can't run here."""

    def check(step: Step) -> str:
        ran = 0
        for case in ElementTree.parse(report).iter("testcase"):
            skipped = case.find("skipped")
            reason = "" if skipped is None else skipped.get("message", "")
            if _MISSING.search(reason):
                return f"a test was skipped: {reason}"
            ran += skipped is None
        return "" if ran else "nothing ran: every test was skipped"

    return check


def measured(folder: pathlib.Path) -> Check:
    """There are results, and none of our own systems was left out."""

    def check(step: Step) -> str:
        results = record.load(folder)
        if not results.cases:
            return f"nothing was measured: {'; '.join(results.notes) or 'no case'}"
        for case in results.cases:
            for name, reason in case.left_out.items():
                if _OURS.fullmatch(name):
                    return f"{case.id}: {name}: {reason}"
        return ""

    return check
