"""What the names in results mean: a short label for plots, and a sentence for who meets one in a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from . import serve_costs

#: What marks the control: the baseline, measured once more beside itself.
AGAIN = " (A/A)"

_BACKENDS = {
    "native": "the native backend",
    "triton": "the Triton backend",
    "reference": "the reference backend, plain torch in float64, there to check the others",
}

_MODELS = {
    "merged LoRA": (
        "merged LoRA",
        "PEFT's LoRA, merged into the weights: it costs what the bare model does. The baseline.",
    ),
    "bare model": ("bare model", "the model as it was loaded, without PEFT ever on it."),
    "eager hooks": ("ReFT in plain hooks", "the same edit in plain PyTorch hooks, adapter by adapter."),
    "pyreft": (
        "pyreft, one adapter",
        "the reference library of ReFT; one adapter for the whole batch, as it can't mix.",
    ),
    "PEFT LoRA unmerged": (
        "LoRA unmerged, one adapter",
        "PEFT's LoRA beside the weights; one adapter for the whole batch.",
    ),
    "PEFT LoRA mixed": (
        "LoRA mixed, an adapter a row",
        "PEFT's LoRA beside the weights, every row of the batch with its own adapter (`adapter_names`).",
    ),
}

_TRAINING = {
    "one vector": (
        "one vector",
        "the frozen model with a single trained vector, added at the first edited layer: the least that a "
        "training step can cost. The baseline.",
    ),
    "PEFT LoRA": ("LoRA", "PEFT's LoRA on the modules of its own choice, in the same layers."),
    "pyreft": ("pyreft", "the reference library of ReFT, with the same interventions."),
}

_HOST = {
    "bare": ("bare model", "the model as it was loaded. The baseline."),
    "one torch op": (
        "one torch op a layer",
        "the least that torch can do behind a block: `h.add_(v)`, one vector for all rows, without a hook.",
    ),
    "eager hooks": ("plain hooks, one adapter", "the same edit in plain PyTorch hooks; one adapter."),
    "eager hooks mixed": ("plain hooks, mixed", "the same, every row of the batch with its own adapter."),
    "PEFT LoRA": ("LoRA, one adapter", "PEFT's LoRA on the modules of its own choice, one adapter."),
    "PEFT LoRA mixed": ("LoRA, mixed", "the same, every row of the batch with its own (`adapter_names`)."),
    "pyreft": ("pyreft, one adapter", "the reference library of ReFT; one adapter for the whole batch."),
}

#: What a batch asks of this package in `reft-bench host`; sentences are about the first that was measured.
HOST_BATCHES = {
    "mixed": "every row of the batch with its own adapter, at every position",
    "one adapter": "all rows with one adapter, at every position",
    "prompt only": "an adapter that edits the prompt only, and thus nothing in a decode step",
    "idle": "adapters loaded, none named",
}

_KERNELS = {
    "eager": (
        "torch, one adapter",
        "torch's own `h + (h @ D.T + c) @ U` with one adapter for all rows. The baseline.",
    ),
    "native push": (
        "ours, native, sums pushed",
        "the native backend with the sums of a cluster's blocks pushed into one another's shared memory.",
    ),
    "native ring": (
        "ours, native, ring of copies",
        "the native backend with the adapters of a block's next columns copied into shared memory ahead.",
    ),
    "rk.functional": (
        "ours through rk.functional",
        "the best backend through `rk.functional.intervene_`: the op, and the Python of a public call.",
    ),
    "compiled": ("torch.compile, one adapter", "the sequence of eager under `torch.compile`."),
    "gather+bmm": (
        "gather and bmm",
        "every row fetches its own adapter's D, U and c, then two batched products.",
    ),
    "shrink+expand": (
        "shrink and expand",
        "D h and Uᵀ v as two Triton kernels, as multi-LoRA serving does it.",
    ),
    "vllm": ("vLLM", "vLLM's own LoRA kernels."),
}

_KNOWN = {
    "overhead": _MODELS,
    "host": _HOST,
    "train": _TRAINING,
    "kernels": _KERNELS,
    "serve": serve_costs.EXPLAINED,
}


def _ours(command: str, name: str) -> tuple[str, str] | None:
    """Label and sentence of one of this package's systems, or None."""
    if command == "host":
        match = re.fullmatch(rf"reft_kernels( fused)? ({'|'.join(HOST_BATCHES)})", name)
        if match is None:
            return None
        fused = " The norms are fused (`fuse_norm=True`)." if match[1] else ""
        return (
            f"ReFT, {match[2]}{', norms fused' * bool(match[1])}",
            f"this package, {HOST_BATCHES[match[2]]}.{fused}",
        )
    if command == "serve":
        return serve_costs.EXPLAINED[name] if name.startswith("reft_kernels") else None
    match = re.fullmatch(r"(reft_kernels )?(\w+)( fused)?", name)
    if match is None or match[2] not in _BACKENDS or bool(match[1]) == (command == "kernels"):
        return None
    backend = _BACKENDS[match[2]]
    if command == "kernels":
        return f"ours, {match[2]}", f"this package's op, {backend}; every row with its own adapter."
    if command == "train":
        return f"ReFT, {match[2]}", f"this package, {backend}."
    label, text = f"ReFT, {match[2]}", f"this package, {backend}; every row of the batch with its own adapter"
    if match[3]:
        return (
            f"{label}, norms fused",
            f"{text}; the edit and the norm after it in one pass (`fuse_norm=True`).",
        )
    return label, f"{text}."


def is_ours(command: str, name: str) -> bool:
    """Whether a system is this package's, the reference backend aside."""
    return _ours(command, name) is not None and "reference" not in name


def _described(command: str, name: str) -> tuple[str, str]:
    if name.endswith(AGAIN):
        again = name.removesuffix(AGAIN)
        return (
            f"{_described(command, again)[0]} again (A/A)",
            f"{again}, measured once more beside itself. It differs from 1 by noise alone, and a system that "
            "differs by no more than that is not distinguishable.",
        )
    return _ours(command, name) or _KNOWN[command].get(name, (name, "no description."))


def label(command: str, name: str) -> str:
    """A system's name as plots write it."""
    return _described(command, name)[0]


def explained(command: str, systems: Iterable[str]) -> list[str]:
    """A line of Markdown for each system."""
    return [f"**{name}**: {_described(command, name)[1]}" for name in dict.fromkeys(systems)]


# Cases ---------------------------------------------------------------------------------------------------

_WHOLE = {
    "all": "every position",
    "prompt": "every position of the prompt",
    "generated": "every generated position",
}

#: Parameters of a case that are named where they differ between the cases of a run.
_VARYING = ("model", "dtype", "batch", "prompt", "completion", "rank", "layers")

#: What the edit is: named where it is not the usual one. Records of before the choice don't say it.
_USUAL = {"method": "loreft", "site": "block_output", "heads": None}


def positions_text(positions: str) -> str:
    """ "f3+l3" → "first 3 and last 3 prompt tokens"."""
    if positions in _WHOLE:
        return _WHOLE[positions]
    parts = [re.fullmatch(r"([fl])(\d+)", part) for part in positions.split("+")]
    if not all(parts):
        return f"positions {positions}"
    ends = {"f": "first", "l": "last"}
    words = [ends[part[1]] + (f" {part[2]}" if part[2] != "1" else "") for part in parts if part]
    return f"{' and '.join(words)} prompt token" + ("" if positions in ("f1", "l1") else "s")


def phase_text(params: dict[str, Any]) -> str:
    """The phase of a case in words."""
    phase = params["phase"]
    text = {
        "generate": f"generation of {params.get('new_tokens')} tokens",
        "step": "decode step by the GPU's own clock",
        "host": "host's own time of a decode step",
        "train": "training step",
    }.get(phase, phase)
    return f"compiled {text}" if params.get("compiled") else text


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def case_text(params: dict[str, Any], differing: Iterable[str] = _VARYING) -> str:
    """Positions and adapters of a case, and of the other parameters those that are `differing`."""
    parts = [positions_text(params["positions"])]
    if params["phase"] != "train":
        parts.append(_count(params["adapters"], "adapter"))
    for name in _VARYING:
        if name in differing and name in params:
            if name == "layers":
                parts.append(_count(params[name], "layer"))
            elif name == "completion":
                parts.append(f"{_count(params[name], 'token')} with a loss")
            else:
                parts.append(f"{params[name]}" if name in ("model", "dtype") else f"{name} {params[name]}")
    return ", ".join([*parts, *unusual(params, differing)])


def unusual(params: dict[str, Any], differing: Iterable[str] = ()) -> list[str]:
    """Method, site and heads of a case, where they are not the usual ones or are `differing`."""
    parts = []
    for name, usual in _USUAL.items():
        value = params.get(name, usual)
        if value is not None and (value != usual or name in differing):
            parts.append({"method": f"{value}", "site": f"at {value}"}.get(name) or _count(value, "head"))
    return parts


def differing(many: Iterable[dict[str, Any]]) -> list[str]:
    """Which parameters have more than one value among these."""
    values: dict[str, set[Any]] = {}
    for params in many:
        for name in (*_VARYING, *_USUAL):
            values.setdefault(name, set()).add(params.get(name, _USUAL.get(name)))
    return [name for name, found in values.items() if len(found) > 1]
