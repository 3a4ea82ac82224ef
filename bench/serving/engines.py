"""The engines that are compared, and the adapters that they serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import reft_kernels as rk

from ..records.record import ResultError
from ..records.serve_costs import BARE, CONTROL, IDLE, LORA, PROMPT_ONLY, REFT

#: Positions of the adapters of a system.
POSITIONS = {REFT: "all", PROMPT_ONLY: "f3+l3"}

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Engine:
    """A child process with an engine, which waits while others are measured."""

    def __init__(self, name: str, folder: Path, spec: dict[str, Any]) -> None:
        self.name = name
        file = folder / f"{name.replace(' ', '_').replace('/', '')}.json"
        file.write_text(json.dumps(spec))
        self.log = file.with_suffix(".log")
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **_ENVIRONMENT}
        environment.setdefault("VLLM_CACHE_ROOT", str(folder / "cache"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "reft_bench.serving.child", str(file)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = [text for text in self.log.read_text().splitlines() if text.strip()]
            raise RuntimeError(last[-1] if last else f"ended with status {self._process.returncode}")
        return json.loads(line)

    def run(self, requests: Sequence[Any]) -> dict[str, Any]:
        """See `child`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"requests": list(requests)}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def arguments(model: Path, args: Any) -> dict[str, Any]:
    """Of vllm.LLM, for all engines."""
    return {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        "max_model_len": _rounded(args.prompt + args.new_tokens),
        "enforce_eager": args.eager,
        "gpu_memory_utilization": args.memory,
        "max_num_seqs": args.requests,
        "max_num_batched_tokens": max(2048, _rounded(args.prompt + args.new_tokens)),
        "enable_prefix_caching": False,  # the same prompts come again and again
        "disable_log_stats": True,
        **({"block_size": args.block_size} if args.block_size else {}),
    }


def _rounded(tokens: int) -> int:
    return -(-tokens // 64) * 64


def save_adapters(
    folder: Path, name: str, count: int, positions: str, shape: tuple[int, int], rank: int
) -> None:
    """Random LoReFT adapters NAME-0 to NAME-(count − 1), one folder each."""
    width, depth = shape
    config = rk.ReftConfig(r=rank, layers="all", positions=positions, share_weights=True)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        adapter = rk.Adapter.from_config(config, depth, width, torch.bfloat16, generator)
        adapter.trainable = False
        adapter.save_pretrained(folder / f"{name}-{number}")


#: The linear layers of a block that a LoRA of ours goes to, and where they lie.
_LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def save_loras(folder: Path, count: int, model: torch.nn.Module, rank: int) -> None:
    """Random LoRAs of every linear layer in PEFT's format."""
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    names = [f"{part}.{name}" for part, several in _LINEARS.items() for name in several]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.split(".")[1] for name in names],
        "bias": "none",
    }
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(model.config.num_hidden_layers):
            for name in names:
                out, into = shapes[f"model.layers.{layer}.{name}.weight"]
                begin = f"base_model.model.model.layers.{layer}.{name}"
                for half, shape in (("A", (rank, into)), ("B", (out, rank))):
                    drawn = torch.randn(*shape, generator=generator) * 0.02
                    tensors[f"{begin}.lora_{half}.weight"] = drawn.to(torch.bfloat16)
        (folder / str(number)).mkdir(parents=True)
        save_file(tensors, folder / str(number) / "adapter_model.safetensors")
        (folder / str(number) / "adapter_config.json").write_text(json.dumps(settings))


def requests_of(system: str, folder: Path, count: int, requests: int) -> list[Any]:
    """What each request asks for: adapter i of `count`, one after another. Raises ResultError."""
    if system in (BARE, CONTROL, IDLE) or count == 0:
        return [None] * requests
    numbers = [place % count for place in range(requests)]
    if system == LORA:
        return [{"lora": [str(n), n + 1, str(folder / LORA_FOLDER / str(n))]} for n in numbers]
    if system in POSITIONS:
        return [f"{FOLDERS[system]}-{n}" for n in numbers]
    raise ResultError(f"--systems: unknown {system!r}")


FOLDERS = {REFT: "every", PROMPT_ONLY: "prompt"}
LORA_FOLDER = "lora"
