"""What `reft-bench host` puts side by side: this package idle, with one adapter and mixed; and its peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from reft_kernels import ops

from . import models
from .base import Point, Runner, Setup, System, Unable
from .correctness import ROUNDINGS, TOLERANCE, References, check, outputs
from .eager_hooks import EagerHooks
from .lora import MixedLora, UnmergedLora
from .ours import OursRunner
from .pyreft import Pyreft

BASELINE, CONTROL = "bare", "bare (A/A)"

#: All rows take one adapter, every row has its own, or one that edits nothing after the prompt.
ONE, MIXED, PROMPT = "one", "mixed", "prompt"
PROMPT_POSITIONS = "f3+l3"

#: For transformers' CompileConfig: what a decode step is compiled with, and an error where a graph breaks.
COMPILE = {"fullgraph": True, "mode": "default"}


class Setups:
    """The setups of a case, all on one model, and what their systems should give."""

    def __init__(self, model: torch.nn.Module, point: Point, seed: int, compiled: bool) -> None:
        """point: of the mixed setup; positions: "all"."""
        points = {
            ONE: dataclasses.replace(point, adapters=1),
            MIXED: point,
            PROMPT: dataclasses.replace(point, adapters=1, positions=PROMPT_POSITIONS),
        }
        self.setups = {kind: Setup(model, one, seed, compiled) for kind, one in points.items()}
        self.references: dict[str, References] = {}
        for kind, setup in self.setups.items():
            setup.compile_options = dict(COMPILE)
            self.references[kind] = References(setup)


class Idle(Runner):
    """Adapters are loaded, and the calls name none."""

    def __init__(self, setup: Setup, backend: str, fuse_norm: bool) -> None:
        loaded = OursRunner(setup, backend, fuse_norm=fuse_norm)
        loaded.model.reft.set_adapter(None)
        super().__init__(setup, loaded.model)
        self.context = loaded.context  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True)
class HostSystem:
    """A system of the suite in one of the setups. idle: it must give what the bare model gives."""

    name: str
    kind: str
    system: System
    idle: bool = False

    def build(self, setups: Setups, tokens: int) -> tuple[Runner, float | None]:
        """A runner that is known to be right, and its error (None for the bare model).

        tokens: length of the generation that it is compared in. Raises Unable.
        """
        setup, references = setups.setups[self.kind], setups.references[self.kind]
        reason = self.system.why_not(setup)
        if reason is not None:
            raise Unable(reason)
        runner = self.system.build(setup)
        if self.name == BASELINE:
            return runner, None
        if self.idle:
            return runner, _error_of_idle(references, runner)
        return runner, check(references, self.system, runner, tokens)["error"]


def _error_of_idle(references: References, runner: Runner) -> float:
    """Distance of the logits to the bare model's, relative to their size. Raises Unable beyond rounding."""
    worst = 0.0
    for mine, bare in zip(outputs(runner), references.bare("reft")):
        worst = max(worst, ((mine - bare).norm() / bare.norm()).item())
    dtype = runner.setup.dtype
    allowed = max(ROUNDINGS * torch.finfo(dtype).eps, TOLERANCE[dtype] * 1e-3)
    if not worst <= allowed:
        raise Unable(f"wrong: idle, it differs from the bare model by {worst:.2g}, allowed {allowed:.2g}")
    return worst


class _Bare(System):
    name = BASELINE

    def build(self, setup: Setup) -> Runner:
        return Runner(setup, models.twin(setup.original))


class _OneOp(System):
    """The cheapest edit that torch can make behind a block: one operation, and the Python call around it.

    What it costs is a floor for whatever calls torch once a layer. The vector is 0, so nothing changes.
    """

    def build(self, setup: Setup) -> Runner:
        runner = Runner(setup, models.twin(setup.original))
        vector = torch.zeros(models.width(runner.model), device=setup.device, dtype=setup.dtype)
        for block in models.blocks(runner.model):
            block.forward = _adding(block.forward, vector)
        return runner


def _adding(original: Callable[..., Any], vector: torch.Tensor) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        (output[0] if isinstance(output, tuple) else output).add_(vector)
        return output

    return forward


class _Ours(System):
    def __init__(self, backend: str, fuse_norm: bool, idle: bool = False) -> None:
        self.backend, self.fuse_norm, self.idle = backend, fuse_norm, idle

    def build(self, setup: Setup) -> Runner:
        if self.idle:
            return Idle(setup, self.backend, self.fuse_norm)
        return OursRunner(setup, self.backend, fuse_norm=self.fuse_norm)


def all_systems() -> dict[str, HostSystem]:
    """Name → system, the baseline first. This package runs on the backend that a CPU gets by itself."""
    backend = ops.current_backend(torch.device("cpu"))
    found = [HostSystem(BASELINE, MIXED, _Bare())]
    for fuse_norm in (False, True):
        head = "reft_kernels fused" if fuse_norm else "reft_kernels"
        found.append(HostSystem(f"{head} idle", MIXED, _Ours(backend, fuse_norm, idle=True), idle=True))
        if not fuse_norm:
            found.append(HostSystem(f"{head} prompt only", PROMPT, _Ours(backend, fuse_norm)))
        found.append(HostSystem(f"{head} one adapter", ONE, _Ours(backend, fuse_norm)))
        found.append(HostSystem(f"{head} mixed", MIXED, _Ours(backend, fuse_norm)))
    found += [
        HostSystem("one torch op", MIXED, _OneOp(), idle=True),
        HostSystem("eager hooks", ONE, EagerHooks()),
        HostSystem("eager hooks mixed", MIXED, EagerHooks()),
        HostSystem("PEFT LoRA", ONE, UnmergedLora()),
        HostSystem("PEFT LoRA mixed", MIXED, MixedLora()),
        HostSystem("pyreft", ONE, Pyreft()),
    ]
    return {system.name: system for system in found}


def one_for_all(runner: Runner) -> dict[str, Any] | None:
    """Arguments by which all rows of a mixed batch take the first adapter; None where nothing is mixed."""
    names = runner.arguments().get("adapter_names")
    if names is None or len(set(names)) < 2:
        return None
    return {"adapter_names": [names[0]] * len(names)}
