"""What a run says in a sentence: what ReFT costs, how sure that is, and what to do where noise hides it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from . import names, serve_costs
from .host_costs import TITLES, depths, split
from .record import CaseResult, Results, SystemResult
from .stats import SAME, Interval

#: Percent. Where a run can tell as little as this, it was not too noisy, whatever it found.
RESOLUTION = 1.0

#: What the baselines are called in a sentence, where their name alone says too little.
BASELINES = {"one vector": "a step that trains one vector only", "bare": "the bare model"}

#: More than so many times the rounds of a run is no advice; the machine should be quieter.
MOST_TIMES_THE_ROUNDS = 10


def percent_over(ratio: Interval) -> Interval:
    """A ratio as the overhead in percent."""
    return Interval(*(100 * (value - 1) for value in (ratio.median, ratio.low, ratio.high)))


def half_width(interval: Interval) -> float:
    """From the median to the farther end."""
    return max(interval.high - interval.median, interval.median - interval.low)


def plus_minus(interval: Interval, digits: int = 1) -> str:
    """ "2.9 ± 1.0": the median, and the way to the farther end of its interval."""
    return f"{interval.median:.{digits}f} ± {half_width(interval):.{digits}f}".replace("-", "−")


def control_noise(case: CaseResult) -> float:
    """How far the baseline stood from itself, as a share: the farther end of the control's interval."""
    control = case.systems[case.control].ratio
    return 0.0 if control is None else max(abs(control.low - 1), abs(control.high - 1))


def rounds_for(rounds: int, noise: float, size: float) -> int:
    """How many rounds bring `noise`, which falls with the root of their number, down to `size`; odd."""
    return max(rounds, math.ceil(rounds * (noise / size) ** 2)) // 2 * 2 + 1


def advice(rounds: int, noise: float, size: float) -> str:
    """What to try where noise hides an effect of this size (both in one unit)."""
    wanted = rounds_for(rounds, noise, size)
    if wanted > MOST_TIMES_THE_ROUNDS * rounds:
        return f"try a quieter machine (at this noise it would take about {wanted} rounds)"
    return f"try --rounds {wanted}"


def ours(results: Results, systems: Iterable[str]) -> str | None:
    """The system of ours that the sentences are about: what runs by default on that machine."""
    found = [name for name in systems if names.is_ours(results.command, name)]
    if results.command == "host":
        kinds = list(names.HOST_BATCHES)
        found.sort(key=lambda name: ("fused" in name, [name.endswith(kind) for kind in kinds].index(True)))
        return found[0] if found else None
    first = "triton" if results.machine["gpu"] else "native"
    found.sort(key=lambda name: (name.endswith(" fused"), not name.endswith(first)))
    return found[0] if found else None


def shows(system: SystemResult) -> bool:
    """Whether a system differs from the baseline by more than noise."""
    return system.verdict not in (None, SAME)


def baseline_text(case: CaseResult) -> str:
    """The baseline, as it stands in a sentence."""
    return BASELINES.get(case.baseline, case.baseline)


def cost(case: CaseResult, name: str) -> str:
    """What a system of ours takes over the baseline, in words."""
    system, again = case.systems[name], case.baseline
    assert system.ratio is not None
    over, base = percent_over(system.ratio), baseline_text(case)
    if shows(system):
        if over.median < 0:
            saved = Interval(-over.median, -over.high, -over.low)
            return f"ReFT saves {plus_minus(saved)} % of the time of {base}"
        return f"ReFT costs {plus_minus(over)} % over {base}"
    control = 100 * control_noise(case)
    noise = max(half_width(over), control)
    if noise <= RESOLUTION:
        most = max(over.high, control)
        return f"ReFT costs at most {most:.1f} % over {base}; nothing beyond the noise shows"
    wanted = advice(len(system.samples), noise, max(abs(over.median), RESOLUTION))
    return (
        f"ReFT costs {plus_minus(over)} % over {base}; too noisy to tell ({again} beside itself: up to "
        f"{control:.1f} %), {wanted}"
    )


def _attributed(system: SystemResult) -> str:
    share = system.extra.get("attributed_share")
    if share is None:
        return ""
    part = plus_minus(Interval.from_json(share).scaled(100), digits=2)
    return f"; timed apart, the package's own code adds {part} %"


def _overhead(results: Results) -> list[str]:
    found = []
    varied = names.differing(case.params for case in results.cases)
    for case in results.cases:
        name = ours(results, case.systems)
        if name is None:
            continue
        what = f"{names.phase_text(case.params)}, {names.case_text(case.params, varied)}"
        found.append(f"{what}: {cost(case, name)}{_attributed(case.systems[name])}.")
    return found


def mebibytes_beyond(case: CaseResult, name: str) -> float:
    """Peak memory of a training step beyond the baseline's, in MiB."""
    own, base = (case.systems[one].extra["peak_bytes"] for one in (name, case.baseline))
    return (own - base) / 2**20


def _train(results: Results) -> list[str]:
    found = []
    varied = {"model", *names.differing(case.params for case in results.cases)}
    for case in results.cases:
        name = ours(results, case.systems)
        if name is None:
            continue
        others = [
            f"{names.label('train', other)}: {percent_over(system.ratio).median:+.0f} %, "
            f"{mebibytes_beyond(case, other):+.1f} MiB"
            for other, system in case.systems.items()
            if system.ratio and other != case.control and not names.is_ours("train", other)
        ]
        beside = f" ({'; '.join(others)})" if others else ""
        what = f"{names.phase_text(case.params)}, {names.case_text(case.params, varied)}"
        memory = f"{mebibytes_beyond(case, name):+.1f} MiB at the peak of memory"
        found.append(f"{what}: {cost(case, name)}; {memory}{beside}.")
    return found


def span(values: Sequence[float], form: str) -> str:
    """ "3 to 5", or "3" where both ends read alike; at least one value."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _kernels(results: Results) -> list[str]:
    """One sentence for all numbers of rows."""
    groups: dict[tuple[str, ...], list[CaseResult]] = {}
    for case in results.cases:
        p = case.params
        what = (p["direction"], p["dtype"], f"d = {p['width']}", f"rank {p['rank']}")
        groups.setdefault(what, []).append(case)
    found = []
    for what, cases in groups.items():
        chosen = [(case, case.systems[name]) for case in cases if (name := ours(results, case.systems))]
        if not chosen:
            continue
        ratios = [system.ratio.median for _, system in chosen if system.ratio]
        floors = [100 * s.extra["floor_fraction"] for _, s in chosen if "floor_fraction" in s.extra]
        rows = span([case.params["rows"] for case in cases], "{}")
        text = (
            f"{', '.join(what)}, {rows} row{'s' * (rows != '1')}: the op takes {span(ratios, '{:.2f}')} "
            f"times as long as torch's own sequence with one adapter for all rows"
        )
        if floors:
            text += f", and runs at {span(floors, '{:.0f}')} % of the speed that its floor allows"
        unsure = sum(not shows(system) for _, system in chosen)
        found.append(text + (f" ({unsure} of {len(chosen)} within the noise)." if unsure else "."))
    return found


def _host(results: Results) -> list[str]:
    """A sentence for each mode: its deepest model, and what a layer and a step take."""
    found = []
    for cases in depths(results):
        deepest, p = cases[-1], cases[-1].params
        name = ours(results, deepest.systems)
        if name is None:
            continue
        fitted = split(cases, name)
        parts = ""
        if fitted is not None:
            step, layer = (plus_minus(one.scaled(1e6)) for one in fitted)
            parts = f"; that is {layer} µs a layer and {step} µs a step"
        batch = names.HOST_BATCHES[name.split(maxsplit=1)[1].removeprefix("fused ")]
        found.append(
            f"{TITLES[p['mode']].removeprefix('A ')}, {_layers(p['layers'])}, {batch}: "
            f"{cost(deepest, name)}{parts}."
        )
    return found


def _layers(number: int) -> str:
    return f"{number} layer{'s' * (number != 1)}"


_KINDS = {
    "kernels": _kernels,
    "overhead": _overhead,
    "host": _host,
    "train": _train,
    "serve": serve_costs.sentences,
}


def sentences(results: Results) -> list[str]:
    """What a run says, a sentence for each phase of each case; none where ours was not measured."""
    return _KINDS[results.command](results)


def headline(phase: str, cases: Sequence[tuple[CaseResult, str]]) -> str:
    """One line for all cases of a phase, each with the name of our system."""
    told = [
        percent_over(case.systems[name].ratio).median for case, name in cases if shows(case.systems[name])
    ]
    over = f"over {baseline_text(cases[0][0])}"
    if not told:
        return f"{phase}: what ReFT costs {over} doesn't show in the noise"
    most = f"costs up to {max(told):.1f} %" if max(told) > 0 else f"saves up to {-min(told):.1f} %"
    hidden = len(cases) - len(told)
    rest = f"; in {hidden} of {len(cases)} cases too little to show in the noise" if hidden else ""
    return f"{phase}: ReFT {most} {over}{rest}"


def memory_headline(results: Results) -> str:
    """One line for the peak memory of all training cases."""
    beyond = [mebibytes_beyond(case, name) for case in results.cases if (name := ours(results, case.systems))]
    text = "Peak memory of a training step"
    if not beyond:
        return text
    return f"{text}: ReFT takes {span(beyond, '{:+.1f}')} MiB over {baseline_text(results.cases[0])}"


def kernels_headline(cases: Sequence[CaseResult], results: Results, fractions: bool) -> str:
    """One line for the plot of times, or of the fractions of the floor."""
    chosen = [case.systems[name] for case in cases if (name := ours(results, case.systems))]
    if fractions:
        reached = [100 * s.extra["floor_fraction"] for s in chosen if "floor_fraction" in s.extra]
        text = "The op and its floor, the least time for its bytes and operations"
        return f"{text}: ours runs at {span(reached, '{:.0f}')} % of the floor's speed" if reached else text
    ratios = [system.ratio.median for system in chosen if system.ratio]
    text = "Time of the op by rows"
    return f"{text}: ours takes {span(ratios, '{:.2f}')} of torch's with one adapter" if ratios else text
