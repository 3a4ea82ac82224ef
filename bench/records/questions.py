"""The README's short table: a question a row, answered from the recorded files, with the peers beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import serve_costs
from .answers import percent_over, plus_minus
from .record import CaseResult, Results

HEADINGS = (
    "what it costs more, in %",
    "reft_kernels",
    "LoRA, an adapter a row",
    "pyreft, one adapter",
    "noise (A/A)",
)


class Question(NamedTuple):
    """A row of the table.

    record: the folder of the results. params: what the case must have; among several the last counts, which
    has the most layers or the largest model. systems: of this package and of the two peers; None where a
    peer can't do it.
    """

    text: str
    record: str
    params: Mapping[str, Any]
    systems: tuple[str | None, str | None, str | None]


_MODEL = ("reft_kernels native", "PEFT LoRA mixed", "pyreft")
_HOST = ("PEFT LoRA mixed", "pyreft")

QUESTIONS = (
    Question(
        "a generation, every position edited, over merged LoRA",
        "overhead",
        {"phase": "generate", "positions": "all", "batch": 8},
        _MODEL,
    ),
    Question(
        "a decode step, every position edited, 64 adapters in a batch of 64, over merged LoRA",
        "overhead",
        {"phase": "decode", "positions": "all", "batch": 64},
        _MODEL,
    ),
    Question(
        "a decode step where only prompts are edited (f3+l3), over merged LoRA",
        "overhead",
        {"phase": "decode", "positions": "f3+l3"},
        _MODEL,
    ),
    Question(
        "a training step, over one that trains a single vector",
        "train",
        {"positions": "all"},
        ("reft_kernels native", "PEFT LoRA", "pyreft"),
    ),
    Question(
        "the host's own time: a decode step of 32 layers that cost nothing, over the bare model",
        "host",
        {"mode": "generate"},
        ("reft_kernels mixed", *_HOST),
    ),
    Question(
        "the same with `fuse_norm=True`",
        "host",
        {"mode": "generate"},
        ("reft_kernels fused mixed", *_HOST),
    ),
    Question(
        "64 requests to vLLM, each with its own adapter at every position, over bare vLLM",
        "serve",
        {"through": "engine", "adapters": 64},
        (serve_costs.REFT, serve_costs.LORA, None),
    ),
    Question(
        "the same with adapters of the prompt alone (f3+l3)",
        "serve",
        {"through": "engine", "adapters": 64},
        (serve_costs.PROMPT_ONLY, serve_costs.LORA, None),
    ),
)


def _cell(case: CaseResult, name: str | None) -> str:
    system = case.systems.get(name) if name is not None else None
    if system is None or system.ratio is None:
        return "–"
    return plus_minus(percent_over(system.ratio))


def answer(question: Question, results: Results) -> tuple[str, ...] | None:
    """The row of a question; None where the record has no such case."""
    fits = [
        case
        for case in results.cases
        if all(case.params.get(key) == value for key, value in question.params.items())
    ]
    if not fits:
        return None
    case = fits[-1]
    return (question.text, *(_cell(case, name) for name in (*question.systems, case.control)))


def rows(records: Mapping[str, Results]) -> list[tuple[str, ...]]:
    """The table's rows. records: by folder; questions of a folder that is not there are left out."""
    found = []
    for question in QUESTIONS:
        results = records.get(question.record)
        row = None if results is None else answer(question, results)
        if row is not None:
            found.append(row)
    return found
