"""What `reft-bench serve` measures: its cases, and presets of them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..records.record import ResultError
from .sweep import axis_values

#: Where requests come from: the process of the engine itself, or clients of an HTTP server.
ENGINE, HTTP = "engine", "http"


@dataclasses.dataclass(frozen=True)
class ServeCase:
    """A batch of requests with so many different adapters; 0 for the plugin without any."""

    through: str
    adapters: int
    params: dict[str, Any] = dataclasses.field(hash=False)

    @property
    def id(self) -> str:
        p = self.params
        return (
            f"{p['model']} {p['dtype']} requests={p['requests']} prompt={p['prompt']} new={p['new_tokens']} "
            f"rank={p['rank']} through={self.through} adapters={self.adapters}"
        )

    @property
    def result_ids(self) -> list[str]:
        return [self.id]

    @property
    def all_params(self) -> dict[str, Any]:
        return {"phase": "serve", "through": self.through, **self.params, "adapters": self.adapters}


#: What the arguments are where they are not given. http: counts of adapters through a server; "" for none.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"model": "llama-1024x8", "requests": 16, "prompt": 32, "new_tokens": 16}
    | {"adapters": "0,1,8", "http": "", "rounds": 3, "lora_rounds": 2},
    "cpu": {"model": "llama-2048x4", "requests": 64, "prompt": 32, "new_tokens": 16}
    | {"adapters": "0,1,8,64", "http": "1,64", "rounds": 5, "lora_rounds": 2},
    "full": {"model": "llama-2048x4", "requests": 64, "prompt": 128, "new_tokens": 128}
    | {"adapters": "0,1,8,32,64", "http": "0,1,8,64", "rounds": 15, "lora_rounds": 5},
}

_TEXTS = {
    "quick": "a batch of 16, in process",
    "cpu": "twelve minutes on two cores",
    "full": "more rounds, longer answers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = "; ".join(f"{name}: {text}" for name, text in _TEXTS.items())
    parser.add_argument("--preset", choices=PRESETS, default="quick", help=presets)
    parser.add_argument(
        "--adapters", help="how many different ones, with commas; 0 for a batch that asks for none"
    )
    parser.add_argument("--http", help='the same through HTTP servers and their clients; "" for none')
    parser.add_argument("--requests", type=int, help="that run together")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--lora-rounds", type=int, help="rounds of vLLM's LoRA, which takes many times as long on CPUs"
    )


def fill_in(args: argparse.Namespace) -> None:
    """What the preset says where no argument does."""
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def _counts(option: str, text: str, requests: int) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    rest = ",".join(word for word in words if word != "0")
    counts = [0] * ("0" in words) + sorted(set(axis_values("adapters", rest) if rest else []))
    if counts and counts[-1] > requests:
        raise ResultError(f"--{option}: {counts[-1]} different ones need as many --requests, were {requests}")
    return counts


def cases_of(args: argparse.Namespace) -> list[ServeCase]:
    """Raises ResultError."""
    fill_in(args)
    for name in ("requests", "prompt", "new_tokens", "rank"):
        if getattr(args, name) < 1:
            raise ResultError(f"--{name.replace('_', '-')}: must be at least 1, was {getattr(args, name)}")
    for name in ("rounds", "lora_rounds"):
        if getattr(args, name) < 2:
            raise ResultError(f"--{name.replace('_', '-')}: must be at least 2, was {getattr(args, name)}")
    params = {
        name: getattr(args, name) for name in ("model", "dtype", "requests", "prompt", "new_tokens", "rank")
    }
    counted = {ENGINE: ("adapters", args.adapters), HTTP: ("http", args.http)}
    return [
        ServeCase(through, count, params)
        for through, (option, text) in counted.items()
        for count in _counts(option, text, args.requests)
    ]
