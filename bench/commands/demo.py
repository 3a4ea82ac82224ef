"""The main job, shown: four ReFT adapters and the bare model in one batch of a patched Hugging Face model.

Run as `make demo`, or `python -m reft_bench.commands.demo [--model PATH_OR_HUB_NAME]`. It writes adapters in
two file formats, loads them, generates for a mixed batch, checks every row against the same row run alone
through the reference backend, and times the patched model beside the bare one and beside plain eager hooks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import reft_kernels as rk
from reft_kernels.ops.reference import activate

from ..records import stats
from ..records.record import ResultError
from ..records.tables import interval_text, time_text
from ..systems import models

#: About 101 million parameters.
SHAPE = "llama-640x12"
PROMPTS = (16, 9, 20, 13, 5, 18, 7, 11)
NEW_TOKENS = 10
ROUNDS = 5


class Planned(NamedTuple):
    """An adapter of the demo: how it is written and what it is loaded with."""

    name: str
    config: rk.ReftConfig
    pyreft: bool


def planned(depth: int) -> list[Planned]:
    """Four adapters that differ in rank, layers, positions, method and file format."""
    few = models.spread(min(4, depth), depth)
    half = list(range(depth // 2, depth))
    return [
        Planned("style", rk.ReftConfig(r=4, layers=few, positions="f3+l3"), True),
        Planned("tone", rk.ReftConfig(r=8, layers=half, positions="f5", act_fn="relu"), True),
        Planned("facts", rk.ReftConfig(r=16, positions="all"), False),
        Planned("format", rk.ReftConfig(method="direft", r=2, layers=few, positions="generated"), False),
    ]


def fresh(config: rk.ReftConfig, depth: int, width: int, seed: int) -> rk.Adapter:
    """An adapter as if trained: random, and strong enough that every row's text changes."""
    generator = torch.Generator().manual_seed(seed)
    adapter = rk.Adapter.from_config(config, depth, width, generator=generator)
    adapter.trainable = False
    for intervention in adapter.interventions:
        intervention.W.data = torch.randn(intervention.W.shape, generator=generator) / width**0.5
        intervention.b.data = torch.randn(intervention.b.shape, generator=generator)
    return adapter


def write_as_pyreft(adapter: rk.Adapter, folder: Path) -> None:
    """Saves a LoReFT adapter in the layout of pyreft 0.1: config.json and a pickle for each intervention."""
    folder.mkdir(parents=True)
    seen: dict[int, int] = {}
    keys, representations = [], []
    for one in adapter.interventions:
        number = seen.get(one.layer, 0)
        seen[one.layer] = number + 1
        key = f"layer_{one.layer}_comp_block_output_unit_pos_nunit_1#{number}"
        keys.append(key)
        representations.append([one.layer, "block_output", "pos", 1, one.rank, *[None] * 9])
        state = {"weight": one.W.data, "bias": one.b.data, "rotate_layer": one.R.data.T.contiguous()}
        torch.save(state, folder / f"intkey_{key}.bin")
    config = {
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"] * len(keys),
        "intervention_dimensions": [adapter.width] * len(keys),
        "intervention_constant_sources": [True] * len(keys),
        "mode": "parallel",
        "representations": representations,
        "sorted_keys": keys,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


class EagerHooks:
    """The same edits as plain eager hooks, one adapter after the other: what people write today."""

    def __init__(
        self, model: nn.Module, names: Sequence[str | None], adapters: dict[str, rk.Adapter], mask: Tensor
    ) -> None:
        self.model, self.width = model, mask.shape[1]
        self.prompt: dict[Any, Tensor] = {}
        self.step: dict[Any, Tensor] = {}
        per_layer: dict[int, list[tuple[Any, Any]]] = {}
        for name in dict.fromkeys(name for name in names if name is not None):
            rows = [row for row, other in enumerate(names) if other == name]
            for one in adapters[name].interventions:
                found = []
                for row in rows:
                    columns = torch.nonzero(mask[row]).flatten()
                    found.append(
                        row * self.width + columns[torch.from_numpy(one.positions.resolve(len(columns)))]
                    )
                self.prompt[one] = torch.cat(found)
                self.step[one] = (
                    torch.tensor(rows) if one.positions.generated else torch.zeros(0, dtype=torch.long)
                )
                per_layer.setdefault(one.layer, []).append((one, one.fold()))
        self.handles = [
            models.blocks(model)[layer].register_forward_hook(self._hook(parts))
            for layer, parts in per_layer.items()
        ]

    def _hook(self, parts: list[tuple[Any, Any]]):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            h = output[0] if isinstance(output, tuple) else output
            flat = h.view(-1, h.shape[-1])
            for one, fold in parts:
                rows = self.step[one] if h.shape[1] == 1 else self.prompt[one]
                if len(rows):
                    x = flat[rows]
                    v = activate(x @ fold.down.to(x.dtype).T + fold.bias.to(x.dtype), fold.kind)
                    flat[rows] = x + v @ fold.up.to(x.dtype)

        return hook


def prompts(model: nn.Module, name: str | None) -> tuple[dict[str, Tensor], Any]:
    """A left-padded batch of eight prompts: text where the model has a tokenizer, else random tokens."""
    if name is not None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        except (OSError, ValueError):
            pass
        else:
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            subjects = ("tea", "rain", "a long walk", "chess", "bread", "the sea", "old maps", "winter")
            batch = tokenizer(
                [f"A few words about {s}:" for s in subjects], return_tensors="pt", padding=True
            )
            if (
                int(batch["attention_mask"].sum(1).min()) > 3
            ):  # a folder without a tokenizer gives an empty one
                return {key: batch[key] for key in ("input_ids", "attention_mask")}, tokenizer
    generator = torch.Generator().manual_seed(1)
    size = model.config.get_text_config().vocab_size
    width = max(PROMPTS)
    ids, mask = (
        torch.zeros(len(PROMPTS), width, dtype=torch.long),
        torch.zeros(len(PROMPTS), width, dtype=torch.long),
    )
    for row, length in enumerate(PROMPTS):
        ids[row, width - length :] = torch.randint(3, size, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}, None


def generate(model: nn.Module, batch: dict[str, Tensor], tokens: int, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(  # type: ignore[operator]
            **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **kwargs
        )


def check_rows(
    model: nn.Module, batch: dict[str, Tensor], names: list[str], progress, task
) -> list[dict[str, Any]]:
    """Generates for all rows at once, then each row alone through the reference backend; compares the two."""
    kept = {"return_dict_in_generate": True, "output_logits": True}
    together = generate(model, batch, NEW_TOKENS, adapter_names=names, **kept)
    bare = generate(model, batch, NEW_TOKENS, adapter_names=["__base__"] * len(names))
    progress.advance(task)
    width = batch["input_ids"].shape[1]
    found = []
    for row, name in enumerate(names):
        seen = batch["attention_mask"][row].bool()
        alone = {key: value[row][seen][None] for key, value in batch.items()}
        with rk.backend("reference"):
            one = generate(model, alone, NEW_TOKENS, adapter_names=[name], **kept)
        start = alone["input_ids"].shape[1]
        mine = together.sequences[row, width:]
        pairs = zip(together.logits, one.logits)
        found.append(
            {
                "row": row,
                "adapter": name,
                "prompt": start,
                "tokens": mine,
                "equal": torch.equal(mine, one.sequences[0, start:]),
                "difference": max(float((a[row] - b[0]).abs().max()) for a, b in pairs),
                "changed": not torch.equal(mine, bare[row, width:]),
            }
        )
        progress.advance(task)
    return found


class Stopwatch:
    """A streamer that only notes when tokens come: the prompt's, then one step after the other."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure(
    systems: dict[str, Any], batch: dict[str, Tensor], progress, task
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a prefill and of a decode step by system: whole generations in turns, one to warm up."""
    found: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode step": {}}
    for number in range(1 + ROUNDS):
        names = list(systems)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            watch = Stopwatch()
            systems[name](streamer=watch)
            prompt, first, *rest = watch.times
            if number:
                found["prefill"].setdefault(name, []).append(first - prompt)
                found["decode step"].setdefault(name, []).append((rest[-1] - first) / len(rest))
        progress.advance(task)
    return found


def timing_table(found: dict[str, dict[str, list[float]]]) -> Table:
    table = Table(
        title="Latency beside the bare model (interleaved; median and 95% interval of the paired ratio)"
    )
    for column in ("phase", "system", "time", "over the bare model"):
        table.add_column(column, justify="left" if column in ("phase", "system") else "right")
    for phase, systems in found.items():
        for name in ("bare", "patched", "eager hooks"):
            samples = systems[name]
            ratio = "" if name == "bare" else interval_text(stats.paired_ratio(samples, systems["bare"]))
            table.add_row(phase, name, time_text(stats.median_interval(samples).median), ratio)
        table.add_section()
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reft_bench.commands.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or hub name; by default a random Llama of 101M parameters")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        return run(arguments.model, console)
    except ResultError as error:
        console.print(f"[red]{error}[/red]")
        return 2


def run(name: str | None, console: Console) -> int:
    with Progress(
        TextColumn("{task.description:<46}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("building the model", total=1)
        model = models.build(name or SHAPE, torch.float32, "cpu", seed=0)
        bare, hooked = models.twin(model), models.twin(model)
        depth, width = models.depth(model), models.width(model)
        progress.advance(task)

        reft = rk.patch(model)
        task = progress.add_task("writing four adapters and loading them", total=8)
        with tempfile.TemporaryDirectory() as temporary:
            plan = planned(depth)
            for number, one in enumerate(plan):
                adapter, folder = fresh(one.config, depth, width, number), Path(temporary) / one.name
                if one.pyreft:
                    write_as_pyreft(adapter, folder)
                else:
                    adapter.save_pretrained(folder)
                progress.advance(task)
            for one in plan:
                # pyreft's files hold neither positions nor act_fn, so they are said here.
                more = {"positions": one.config.positions, "act_fn": one.config.act_fn} if one.pyreft else {}
                reft.load_adapter(Path(temporary) / one.name, one.name, **more)
                progress.advance(task)

        batch, tokenizer = prompts(model, name)
        names = ["style", "tone", "facts", "format", "__base__", "facts", "style", "__base__"]
        task = progress.add_task("generating, and each row alone for comparison", total=1 + len(names))
        rows = check_rows(model, batch, names, progress, task)

        eager = [None if n == "__base__" else n for n in names]
        EagerHooks(hooked, eager, dict(reft.adapters), batch["attention_mask"])
        systems = {
            "bare": partial(generate, bare, batch, NEW_TOKENS),
            "patched": partial(generate, model, batch, NEW_TOKENS, adapter_names=names),
            "eager hooks": partial(generate, hooked, batch, NEW_TOKENS),
        }
        reached = generate(hooked, batch, NEW_TOKENS)[:, batch["input_ids"].shape[1] :]
        hooks_agree = all(torch.equal(reached[r["row"]], r["tokens"]) for r in rows)
        task = progress.add_task("timing, in turns", total=1 + ROUNDS)
        found = measure(systems, batch, progress, task)

    size = sum(p.numel() for p in bare.parameters()) / 1e6
    title = name or f"Llama with random weights, {size:.0f}M parameters, {depth} layers of width {width}"
    console.print(
        f"\n[bold]{title}[/bold], backend {rk.current_backend('cpu')}, {torch.get_num_threads()} threads"
    )
    described = Table(title="Adapters")
    for column in ("name", "method", "rank", "layers", "positions", "act_fn", "file", "parameters"):
        described.add_column(column)
    for one in plan:
        adapter = reft.adapters[one.name]
        layers = sorted({i.layer for i in adapter.interventions})
        described.add_row(
            one.name,
            one.config.method,
            str(one.config.r),
            f"{len(layers)} of {depth}",
            str(one.config.positions),
            one.config.act_fn or "",
            "pyreft's" if one.pyreft else "native",
            f"{sum(p.numel() for p in adapter.parameters()):,}",
        )
    console.print(described)
    table = Table(
        title="One batch of eight rows, each against itself run alone through the reference backend"
    )
    for column in (
        "row",
        "adapter",
        "prompt",
        "generated",
        "same tokens alone",
        "largest logit difference",
        "edited",
    ):
        table.add_column(column)
    for r in rows:
        text = (
            tokenizer.decode(r["tokens"])
            if tokenizer
            else " ".join(map(str, r["tokens"][:6].tolist())) + " …"
        )
        edited = "yes" if r["changed"] else "no"
        same = "[green]yes[/green]" if r["equal"] else "[red]NO[/red]"
        cells = (
            str(r["row"]),
            r["adapter"],
            f"{r['prompt']} tokens",
            text,
            same,
            f"{r['difference']:.1e}",
            edited,
        )
        table.add_row(*cells)
    console.print(table)
    console.print(timing_table(found))
    bare_rows = [r for r in rows if r["adapter"] == "__base__"]
    edited_rows = [r for r in rows if r["adapter"] != "__base__"]
    right = hooks_agree and all(r["equal"] for r in rows)
    right = right and not any(r["changed"] for r in bare_rows) and any(r["changed"] for r in edited_rows)
    if not right:
        console.print("[red]A row differs from the same row run alone: please report this.[/red]")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
