"""What adapters cost a server, from the results of `reft-bench serve`: throughput, and waiting where cold."""

from __future__ import annotations

from collections.abc import Sequence

from .record import CaseResult, Results, SystemResult
from .stats import SAME, Interval

BARE, CONTROL = "vLLM", "vLLM (A/A)"
REFT, PROMPT_ONLY, LORA = "reft_kernels, every position", "reft_kernels, prompt only", "vLLM's LoRA"
IDLE = "reft_kernels, no adapter used"

#: What each is, for who meets its name in a table.
EXPLAINED = {
    BARE: ("bare vLLM", "vLLM without the plugin. The baseline."),
    IDLE: ("ReFT, none used", "vLLM with the plugin and its adapters, and requests that ask for none."),
    REFT: ("ReFT, every position", "LoReFT at every position, prompt and answer, of all layers."),
    PROMPT_ONLY: ("ReFT, prompt only", "LoReFT at the first three and last three tokens of a prompt."),
    LORA: ("vLLM's LoRA", "vLLM's own LoRA of the same rank on all linear layers of a block."),
}

THROUGH = {"engine": "requests from the engine's own process", "http": "requests of HTTP clients"}


def share(system: SystemResult) -> Interval:
    """A system's throughput over the baseline's."""
    ratio = system.ratio
    return Interval(1, 1, 1) if ratio is None else Interval(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def by_way(results: Results) -> dict[str, list[CaseResult]]:
    """The cases of each way that requests took, with fewer adapters first."""
    found: dict[str, list[CaseResult]] = {}
    for case in sorted(results.cases, key=lambda case: case.params["adapters"]):
        found.setdefault(case.params["through"], []).append(case)
    return {way: found[way] for way in THROUGH if way in found}


def setting(case: CaseResult) -> str:
    """ "64 requests of 32 + 32 tokens, rank 8"."""
    p = case.params
    return f"{p['requests']} requests of {p['prompt']} + {p['new_tokens']} tokens, rank {p['rank']}"


def interval(found: Interval) -> str:
    return f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"


def cold(results: Results) -> list[str]:
    """What adapters cost that were never used before, a sentence for each system of each way."""
    found = []
    for way, cases in by_way(results).items():
        for name, extra in ((n, s.extra) for case in cases for n, s in case.systems.items()):
            if "cold_first_s" in extra:
                first, warm = (1e3 * extra[f"{kind}_first_s"] for kind in ("cold", "warm"))
                longer = extra["cold_s"] / extra["warm_s"] - 1
                found.append(
                    f"{THROUGH[way]}: {name}, {extra['cold_adapters']} adapters that nobody had used: the "
                    f"first token after {first:.0f} ms, {warm:.0f} the next time; "
                    f"the batch {100 * longer:+.0f} %."
                )
    return found


def flatness(cases: Sequence[CaseResult], name: str) -> str:
    """What a system keeps of its throughput from the fewest adapters to the most."""
    having = [case for case in cases if name in case.systems]
    if len(having) < 2:
        return ""
    few, many = having[0], having[-1]
    kept = share(many.systems[name]).median / share(few.systems[name]).median
    return (
        f"; from {few.params['adapters']} to {many.params['adapters']} adapters it keeps "
        f"{100 * kept:.1f} % of that"
    )


def sentences(results: Results) -> list[str]:
    """A sentence for each system of each way, of the most adapters."""
    found = []
    for way, cases in by_way(results).items():
        for name in (REFT, PROMPT_ONLY, LORA, IDLE):
            having = [case for case in cases if name in case.systems]
            if not having:
                continue
            system, count = having[-1].systems[name], having[-1].params["adapters"]
            same = ", which noise explains" if system.verdict == SAME else ""
            noise = interval(share(having[-1].systems[CONTROL]))
            adapters = f", {count} adapter{'s' * (count != 1)}" if count else ""
            found.append(
                f"{THROUGH[way]}: {name}{adapters}: {interval(share(system))} of bare vLLM's throughput"
                f"{same} (A/A {noise}){flatness(cases, name)}."
            )
    return [*found, *cold(results)]
