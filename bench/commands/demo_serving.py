"""Serving, shown: a vLLM server, four ReFT adapters and the bare model in one batch over HTTP.

Run as `make demo-serving`, or `python -m reft_bench.commands.demo_serving` where vLLM is installed. It writes
a small model and adapters, starts the server, sends all requests at once, compares every token with what
Hugging Face generates with the same adapter, asks for an adapter that isn't there, and stops the server.
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import reft_kernels as rk

from ..serving.http import ServerError, complete, server
from ..systems import models

SHAPE = (128, 4, 256, 2, 2, 512)
PROMPTS = (16, 9, 20, 40, 5, 33, 7, 11)
NEW_TOKENS = 12

CONFIGS = {
    "style": rk.ReftConfig(r=4, layers=[0, 2], positions="f3+l3"),
    "tone": rk.ReftConfig(r=8, layers=[2, 3], positions="f5", act_fn="relu"),
    "facts": rk.ReftConfig(r=16, positions="all"),
    "format": rk.ReftConfig(method="direft", r=2, layers="all", positions="generated"),
}


def _adapters(folder: Path, width: int, depth: int) -> dict[str, str]:
    """As if trained: random, and strong enough to be seen."""
    found = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        generator = torch.Generator().manual_seed(seed)
        adapter = rk.Adapter.from_config(config, depth, width, generator=generator)
        adapter.trainable = False
        for one in adapter.interventions:
            one.W.data = torch.randn(one.W.shape, generator=generator) / width**0.5
            one.b.data = 3 * torch.randn(one.b.shape, generator=generator)
        found[name] = str(folder / name)
        adapter.save_pretrained(found[name])
    return found


@torch.no_grad()
def _expected(model: Any, prompts: list[list[int]], names: list[str | None]) -> list[list[int]]:
    """What Hugging Face generates, each request alone."""
    found = []
    for prompt, name in zip(prompts, names):
        row = torch.tensor([prompt])
        out = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            adapter_names=[name or "__base__"],
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def main() -> int:
    console = Console()
    with tempfile.TemporaryDirectory(prefix="reft-demo-serving-") as place:
        folder = Path(place)
        model: Any = models.random_llama(SHAPE, torch.float32, "cpu", 0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)  # so that its tokens are no ties
        model.save_pretrained(folder / "model")
        paths = _adapters(folder / "adapters", SHAPE[0], SHAPE[1])
        generator = torch.Generator().manual_seed(1)
        prompts = [torch.randint(3, SHAPE[-1], (n,), generator=generator).tolist() for n in PROMPTS]
        names: list[str | None] = [*paths, None, "facts", "style", None]
        reft = rk.patch(model)
        for name, path in paths.items():
            reft.load_adapter(path, name)
        wanted, bare = _expected(model, prompts, names), _expected(model, prompts, [None] * len(prompts))
        options = {
            "served_model_name": "base",
            "additional_config": {"reft": {"adapters": paths}},
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 8,
            "gpu_memory_utilization": 0.3,
            "block_size": 32,
            "enforce_eager": True,
        }
        console.print("Starting a vLLM server with four adapters …")
        try:
            with server(folder / "model", folder / "server.log", options) as port:
                console.print(f"… it listens on port {port}.")

                def ask(place: int) -> list[int]:
                    body: dict[str, Any] = {"model": "base", "prompt": prompts[place], "temperature": 0}
                    body |= {"max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
                    if names[place]:
                        body["vllm_xargs"] = {"reft_adapter": names[place]}
                    return complete(port, body)["choices"][0]["token_ids"]

                with ThreadPoolExecutor(len(prompts)) as pool:
                    answers = list(pool.map(ask, range(len(prompts))))
                try:
                    body = {"model": "base", "prompt": prompts[0], "vllm_xargs": {"reft_adapter": "fact"}}
                    complete(port, body)
                    refused = ""
                except ServerError as error:
                    refused = str(error)
        except ServerError as error:
            console.print(f"[red]{error}[/red]", highlight=False)
            return 1
    table = Table(title="One batch of eight requests, against Hugging Face with the same adapter")
    for column in ("request", "adapter", "prompt", "tokens", "same as Hugging Face", "edited"):
        table.add_column(column)
    for place, (name, answer) in enumerate(zip(names, answers)):
        same = "[green]yes[/green]" if answer == wanted[place] else "[red]NO[/red]"
        text = " ".join(map(str, answer[:8])) + " …"
        edited = "yes" if answer != bare[place] else "no"
        table.add_row(str(place), name or "none", f"{PROMPTS[place]} tokens", text, same, edited)
    console.print(table)
    console.print(f"An adapter that is not there: {refused or 'was not refused'}", highlight=False)
    console.print("The server is down again.")
    right = answers == wanted and "HTTP 400" in refused
    right = right and all((answer != bare[n]) == bool(names[n]) for n, answer in enumerate(answers))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
