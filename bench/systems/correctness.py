"""Correctness first: each system's logits against the reference's, before anything is timed.

The error is ‖logits − reference‖ / ‖reference − bare‖: the distance to what the output should be, over
what the adapters change at all. A system that edits nothing stands at 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import models
from .base import Runner, Setup, System, Unable
from .lora import lora, peft_missing
from .ours import OursRunner

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}

#: Least share of greedy tokens that must be the reference's in float32. (One near tie turns the rest of its
#: row, and in half precision of most rows, so there the share is recorded and nothing is asked of it.)
AGREEMENT = 0.75

#: An error of so many roundings of the logits is none, whatever the adapters change.
ROUNDINGS = 16

Outputs = tuple[Tensor, ...]


@torch.no_grad()
def outputs(runner: Runner, decode: bool = True) -> Outputs:
    """fp32 logits after the prompt and, if asked for, after one more token."""
    with runner.context():
        first = runner.prefill().float()
        if not decode:
            return (first,)
        second = runner.decode().float()
    runner.cache = None  # gigabytes on a large model, and every system has one
    return first, second


class References:
    """What the systems of a setup should give; made when first asked for."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._bare: dict[str, Outputs] = {}
        self._wanted: dict[tuple[str, bool], Outputs] = {}
        self._tokens: dict[tuple[bool, int], Tensor] = {}

    def bare(self, family: str) -> Outputs:
        """Without any adapter, on the weights that this family of systems runs on."""
        if family not in self._bare:
            model = self.setup.merged if family == "reft" else self.setup.original
            self._bare[family] = outputs(Runner(self.setup, model))
        return self._bare[family]

    def wanted(self, family: str, single: bool) -> Outputs:
        """ReFT: the reference backend. LoRA: PEFT with one adapter active at a time, row by row."""
        key = (family, single)
        if key not in self._wanted:
            if family == "reft":
                self._wanted[key] = outputs(OursRunner(self.setup, "reference", single))
            else:
                self._wanted[key] = self._one_by_one(single)
        return self._wanted[key]

    def _one_by_one(self, single: bool) -> Outputs:
        count = 1 if single else self.setup.point.adapters
        model = lora(self.setup, models.twin(self.setup.original), count)
        runner = Runner(self.setup, model)
        rows = torch.tensor([0 if single else number for number in self.setup.adapter_of])
        results: list[Tensor] = []
        for number in range(count):
            model.set_adapter(f"l{number}")
            got = outputs(runner)
            results = results or [logits.clone() for logits in got]
            mine = (rows == number).to(self.setup.device)
            for kept, logits in zip(results, got):
                kept[mine] = logits[mine]
        return tuple(results)

    def error(self, runner: Runner, family: str, decode: bool) -> float:
        """The worse of the errors after the prompt and, if asked for, after one more token.

        Relative to what the adapters change; where that is next to nothing (the last token, say, by an edit
        of others at the last layer), to a size at which rounding is let pass.
        """
        dtype = self.setup.dtype
        least = ROUNDINGS * torch.finfo(dtype).eps / TOLERANCE[dtype]
        got = outputs(runner, decode)
        wanted, bare = self.wanted(family, runner.single), self.bare(family)
        worst = 0.0
        for mine, theirs, origin in zip(got, wanted, bare):
            if not torch.isfinite(mine).all():
                return float("inf")
            size = (theirs - origin).norm().item()
            size = max(size, least * theirs.norm().item())
            worst = max(worst, (mine - theirs).norm().item() / max(size, 1e-30))
        return worst

    @torch.no_grad()
    def agreement(self, runner: Runner, tokens: int) -> float:
        """Share of the generated tokens that are the reference backend's; for ReFT systems."""
        key = (runner.single, tokens)
        if key not in self._tokens:
            # Not compiled: this backend reads the plan back, which no graph can hold.
            reference = OursRunner(self.setup.eager(), "reference", runner.single)
            with reference.context():
                self._tokens[key] = reference.generate(tokens)
        with runner.context():
            got = runner.generate(tokens)
        wanted = self._tokens[key]
        if got.shape != wanted.shape:
            return 0.0
        return (got == wanted)[:, self.setup.point.prompt :].float().mean().item()


def check(references: References, system: System, runner: Runner, tokens: int) -> dict[str, float]:
    """What is known of a system that is right: its error and, for ReFT, its share of right tokens.

    The bare model, which without PEFT the baseline is too, there is nothing to hold against.

    Raises: Unable for one that is wrong.
    """
    if system.family == "bare" or (system.family == "lora" and peft_missing() is not None):
        return {}
    try:
        error = references.error(runner, system.family, decode=True)
    except Unable:
        error = references.error(runner, system.family, decode=False)
    setup = references.setup
    allowed = TOLERANCE[setup.dtype]
    if not error <= allowed:
        raise Unable(f"wrong: error {error:.2g} of what the adapters change, allowed {allowed:g}")
    found = {"error": error}
    if system.family == "reft":
        found["token_agreement"] = references.agreement(runner, tokens)
        if setup.dtype is torch.float32 and found["token_agreement"] < AGREEMENT:
            share = found["token_agreement"]
            raise Unable(f"wrong: {share:.0%} of its tokens are the reference's, {AGREEMENT:.0%} asked for")
    return found
