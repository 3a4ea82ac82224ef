"""Which way of the CUDA kernels was the fastest: each beside the usual one, of the same run.

A way changes no bit (csrc/cuda/intervene.h). What wins here may become the usual one.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..kernels.ways import WAYS
from ..records.record import Results
from ..records.stats import paired_ratio
from ..records.tables import interval_text

USUAL = "native"
HEADINGS = ("case", "way", "time over the usual way's [95%]", "the faster is")


def rows(results: Sequence[Results]) -> list[tuple[str, ...]]:
    """(case, way, ratio, the faster) of every case in which another way was timed or left out."""
    found = []
    for run in results:
        for case in run.cases if run.command == "kernels" else ():
            for way in WAYS:
                name = f"{USUAL} {way}"
                if name in case.left_out and case.params["direction"] in WAYS[way][1]:
                    found.append((case.id, way, "–", f"not timed: {case.left_out[name]}"))
                if not {name, USUAL} <= case.systems.keys():
                    continue
                ratio = paired_ratio(case.systems[name].samples, case.systems[USUAL].samples)
                faster = way if ratio.high < 1 else "the usual" if ratio.low > 1 else "not distinguishable"
                found.append((case.id, way, interval_text(ratio), faster))
    return found
