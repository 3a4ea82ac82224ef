"""The README's result tables, made from the recorded files: `python -m reft_bench.readme README.md`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from . import record
from .record import CaseResult, ResultError, Results
from .stats import Interval
from .tables import interval_text

RECORDS = Path(__file__).resolve().parent / "results"
_BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _where(results: Results) -> str:
    return f"{results.machine['cpu']['model']}, {results.machine['threads']} threads"


def _kernel_row(case: CaseResult) -> tuple[str, ...] | None:
    ours = case.systems.get("native")
    if ours is None or ours.ratio is None or case.params["width"] < 1024:
        return None
    gathered = Interval.from_json(ours.extra["ratio_over_gather"])
    return (
        case.params["direction"],
        case.params["dtype"],
        str(case.params["rows"]),
        interval_text(ours.ratio, digits=2),
        f"1/{1 / gathered.median:.0f}",
        f"{100 * ours.extra['floor_fraction']:.0f}%",
    )


def kernels(results: Results) -> str:
    """The native op against torch's own ways."""
    rows = [row for case in results.cases if (row := _kernel_row(case))]
    params = results.cases[0].params
    text = (
        f"The op alone, d = {params['width']}, rank {params['rank']}, {params['adapters']} distinct adapters "
        f"({_where(results)}): time over torch's `h + (h @ D.T + c) @ U` with a *single* adapter, and over "
        "gather-and-bmm with the same adapters. The floor is the time to copy the bytes that must move, or "
        "to do the operations at the rate of a large matrix product, measured in the same run. "
        "`reft-bench kernels`, [all of it](bench/results/kernels/report.md):"
    )
    headings = ("", "dtype", "rows", "over torch, one adapter [95%]", "over gather+bmm", "of the floor")
    return f"{text}\n\n{_table(headings, rows)}"


def models(results: Results, command: str) -> str:
    """Whole forwards or training steps: every system's ratio, and what was attributed to ours."""
    rows = []
    for case in results.cases:
        p = case.params
        label = f"{p.get('phase', 'step')}, {p['positions']}, batch {p['batch']}"
        for name, system in case.systems.items():
            if system.ratio is None:
                continue
            share = system.extra.get("attributed_share")
            spent = "" if share is None else interval_text(Interval.from_json(share), 100) + " %"
            rows.append((label, name, interval_text(system.ratio), spent))
            label = ""
    base = results.cases[0].baseline
    state = "" if results.finished else " (interrupted: the cases that were complete)"
    text = (
        f"Models, over {base} ({results.settings['model']}, {_where(results)}), and the time spent in the "
        "edits themselves as a share of the bare forward, with 8 distinct adapters of rank 8 on all layers "
        f"(pyreft and unmerged LoRA serve one for the whole batch). `reft-bench {command}`, "
        f"[all of it](bench/results/{command}/report.md){state}:"
    )
    return f"{text}\n\n{_table(('case', 'system', 'ratio [95%]', 'attributed'), rows)}"


def block() -> str:
    """What stands between the README's markers."""
    parts = []
    for name, make in (
        ("kernels", kernels),
        ("overhead", lambda r: models(r, "overhead")),
        ("train", lambda r: models(r, "train")),
    ):
        if (RECORDS / name / "results.json").exists():
            parts.append(make(record.load(RECORDS / name)))
    return "\n\n".join(parts) + "\n"


def update(text: str) -> str:
    """The README with its tables as the records have them. Raises ResultError where it has no markers."""
    if not _BLOCK.search(text):
        raise ResultError("the README has no <!-- results --> … <!-- /results -->")
    return _BLOCK.sub(lambda match: match[1] + block() + match[2], text)


def main(path: str) -> None:
    file = Path(path)
    file.write_text(update(file.read_text()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "README.md")
