"""The whole life of three adapters on a small language model, on text that every machine has.

1. A byte-level Llama learns the standard library's documentation strings, and is frozen.
2. Three LoReFT adapters train in one mixed batch, a row each: one wrItEs vOwEls In cApItAls, one does so with
   CoNSoNaNTS, its opposite, and one_joins_words.
3. Model and adapters are saved; another process loads them and serves all three and the bare model in one
   batch.
4. Numbers say whether each does its job: the loss of every adapter on every behaviour, and what stands in the
   text that it writes.

Run `python examples/life_cycle.py` (minutes on two cores), or with --quick (seconds: a model that has learned
little, for a test).
"""

from __future__ import annotations

import argparse
import ast
import json
import string
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import reft_kernels as rk

VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"


def capitals(letters: str) -> Callable[[bytes], bytes]:
    """What writes these letters as capitals and all others small."""
    cased = "".join(c.upper() if c in letters else c for c in string.ascii_lowercase)
    table = bytes.maketrans(string.ascii_letters.encode(), (cased * 2).encode())
    return lambda text: text.translate(table)


#: What each adapter makes of the text that follows a prompt. All keep its length.
BEHAVIOURS: dict[str, Callable[[bytes], bytes]] = {
    "vowels": capitals(VOWELS),
    "consonants": capitals(CONSONANTS),
    "joined": lambda text: text.translate(bytes.maketrans(b" \n", b"__")),
}
#: What is counted in a text: of these characters, how many are one of those.
COUNTED = {
    "capital vowels": (VOWELS + VOWELS.upper(), VOWELS.upper()),
    "capital consonants": (CONSONANTS + CONSONANTS.upper(), CONSONANTS.upper()),
    "_ of separators": ("_ \n", "_"),
}
BASE = "__base__"
PROMPT, ANSWER = 48, 48
console = Console()


def docstrings(file: Path) -> Iterator[str]:
    """The documentation strings in a Python file; none where it can't be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def documentation(limit: int) -> bytes:
    """Up to `limit` bytes of the standard library's documentation strings."""
    found: list[bytes] = []
    size = 0
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if size >= limit or file.parent.name in ("test", "site-packages", "idlelib"):
            continue
        for text in docstrings(file):
            kept = text.encode("ascii", "ignore")
            if len(kept) > PROMPT:
                found.append(kept)
                size += len(kept)
    return b"\n\n".join(found)[:limit]


class Text:
    """Bytes to draw windows from; the last part of them is held out."""

    def __init__(self, text: bytes, seed: int, held_out: float = 0.1) -> None:
        cut = round(len(text) * (1 - held_out))
        self.train, self.held_out = text[:cut], text[cut:]
        self.generator = torch.Generator().manual_seed(seed)

    def windows(self, count: int, length: int, held_out: bool = False) -> list[bytes]:
        text = self.held_out if held_out else self.train
        starts = torch.randint(len(text) - length, (count,), generator=self.generator).tolist()
        return [text[start : start + length] for start in starts]


def ids_of(rows: list[bytes]) -> Tensor:
    return torch.tensor([list(row) for row in rows])


def task(rows: list[bytes], names: list[str]) -> tuple[Tensor, Tensor]:
    """(input_ids, labels): after each row's prompt the text as the named behaviour would have it."""
    ids = ids_of([row[:PROMPT] + BEHAVIOURS[name](row[PROMPT:]) for row, name in zip(rows, names)])
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return ids, labels


def steps(label: str, count: int) -> Iterator[tuple[int, Callable[[float], None]]]:
    """Step numbers under a progress bar, with a function that shows the loss."""
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        bar = progress.add_task(label, total=count, loss="")
        for step in range(count):
            yield step, lambda loss: progress.update(bar, loss=f"loss {loss:.3f}")
            progress.advance(bar)


def descend(
    parameters: list[Tensor], label: str, count: int, rate: float, loss_of: Callable[[], Tensor]
) -> None:
    """`count` steps of AdamW, the rate rising over the first tenth and falling to nothing."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, count, pct_start=0.1)
    for step, show in steps(label, count):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            show(loss.item())


def pretrain(text: Text, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=args.width * 5 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config).train()
    millions = sum(p.numel() for p in model.parameters()) / 1e6

    def loss() -> Tensor:
        ids = ids_of(text.windows(args.batch, PROMPT + ANSWER))
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    descend(list(model.parameters()), f"the model ({millions:.1f}M)", args.steps, 2e-3, loss)
    return model


def train_adapters(model: LlamaForCausalLM, text: Text, args: argparse.Namespace) -> rk.Reft:
    reft = rk.patch(model)
    for name in BEHAVIOURS:
        reft.add_adapter(name, rk.ReftConfig(r=args.rank, layers="all", positions="all"))
    reft.print_trainable_parameters()
    names = [name for name in BEHAVIOURS for _ in range(-(-args.batch // len(BEHAVIOURS)))]

    def loss() -> Tensor:
        ids, labels = task(text.windows(len(names), PROMPT + ANSWER), names)
        return model(input_ids=ids, labels=labels, adapter_names=names, use_cache=False).loss

    descend(list(reft.parameters()), "three adapters in one batch", args.adapter_steps, 4e-3, loss)
    return reft


@torch.no_grad()
def losses(model: LlamaForCausalLM, text: Text, rows: int) -> dict[str, dict[str, float]]:
    """Loss in nats a byte on held-out text: adapter → behaviour → loss."""
    windows = text.windows(rows, PROMPT + ANSWER, held_out=True)
    found: dict[str, dict[str, float]] = {}
    for name in (*BEHAVIOURS, BASE):
        found[name] = {}
        for behaviour in BEHAVIOURS:
            ids, labels = task(windows, [behaviour] * rows)
            found[name][behaviour] = model(
                input_ids=ids, labels=labels, adapter_names=[name] * rows, use_cache=False
            ).loss.item()
    return found


def share(text: str, among: str, wanted: str) -> str:
    counted = [c for c in text if c in among]
    return f"{sum(c in wanted for c in counted) / len(counted):.0%}" if counted else "–"


def serve(folder: Path) -> None:
    """In a process of its own: loads everything, serves one batch, and says what it got as JSON."""
    model = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    reft = rk.patch(model)
    for name in BEHAVIOURS:
        reft.load_adapter(folder / name, name)
    request = torch.load(folder / "request.pt", weights_only=True)
    names, ids = request["names"], request["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, adapter_names=names).logits
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=names,
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=None,
    )
    texts = [bytes(row).decode("ascii", "replace") for row in out[:, ids.shape[1] :].tolist()]
    print(json.dumps({"texts": texts, "same": torch.equal(logits, request["logits"])}))


def serve_elsewhere(model: LlamaForCausalLM, text: Text, folder: Path, each: int) -> dict[str, list[str]]:
    """Saves the model and its adapters, and has another process serve them all in one batch."""
    reft: rk.Reft = model.reft
    model.save_pretrained(folder / "base")
    for name in BEHAVIOURS:
        reft.save_pretrained(folder / name, name)
        rotation = reft.adapters[name].interventions[0].materialized()["R"].detach().double()
        error = (rotation @ rotation.T - torch.eye(len(rotation))).abs().max().item()
        size = sum(file.stat().st_size for file in (folder / name).iterdir())
        console.print(f"{name}: {size / 1024:.0f} KiB on disk, |R Rᵀ − I| at most {error:.1e}")
    names = [name for name in (*BEHAVIOURS, BASE) for _ in range(each)]
    ids = ids_of(text.windows(each, PROMPT, held_out=True) * (len(BEHAVIOURS) + 1))
    with torch.no_grad():
        logits = model(input_ids=ids, adapter_names=names).logits
    torch.save({"names": names, "input_ids": ids, "logits": logits}, folder / "request.pt")
    command = [sys.executable, __file__, "--serve", str(folder)]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    console.print(
        f"logits of the reloaded model and adapters: {'identical' if answer['same'] else 'DIFFERENT'}"
    )
    if not answer["same"]:
        raise SystemExit(1)
    written: dict[str, list[str]] = {}
    for name, piece in zip(names, answer["texts"]):
        written.setdefault(name, []).append(piece)
    return written


def report(found: dict[str, dict[str, float]], written: dict[str, list[str]]) -> bool:
    """Prints the numbers; whether every adapter beats the others and the bare model at its own behaviour."""
    table = Table(title="Held-out loss (nats a byte) on each behaviour, and what stands in the text written")
    for column in ("adapter", *BEHAVIOURS, *COUNTED):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for name, by_behaviour in found.items():
        text = "".join(written[name])
        cells = [f"{loss:.3f}{' *' if name == b else ''}" for b, loss in by_behaviour.items()]
        table.add_row(name, *cells, *(share(text, *characters) for characters in COUNTED.values()))
    console.print(table)
    for name, pieces in written.items():
        console.print(f"{name:>10}: {pieces[0]!r}", markup=False, highlight=False)
    good = all(min(found, key=lambda name: found[name][b]) == b for b in BEHAVIOURS)
    console.print(f"each adapter is the best at its own behaviour: {'yes' if good else 'NO'}")
    return good


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: seconds")
    parser.add_argument("--steps", type=int, help="steps of the model (default 300)")
    parser.add_argument("--adapter-steps", type=int, help="steps of the adapters (default 200)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the model and the adapters here")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.width, args.layers, args.heads, args.batch = (64, 2, 4, 12) if args.quick else (256, 4, 4, 15)
    args.steps = args.steps or (120 if args.quick else 300)
    args.adapter_steps = args.adapter_steps or (80 if args.quick else 200)
    return args


def main() -> int:
    args = parsed()
    transformers.utils.logging.disable_progress_bar()
    if args.serve is not None:
        serve(args.serve)
        return 0
    with console.status("Reading the standard library's documentation …"):
        text = Text(documentation(200_000 if args.quick else 3_000_000), args.seed)
    console.print(f"{(len(text.train) + len(text.held_out)) / 1e6:.1f} MB of documentation strings")
    model = pretrain(text, args)
    train_adapters(model, text, args)
    model.eval()
    with tempfile.TemporaryDirectory() as made:
        written = serve_elsewhere(model, text, args.out or Path(made), each=2)
    return 0 if report(losses(model, text, rows=32), written) else 1


if __name__ == "__main__":
    raise SystemExit(main())
