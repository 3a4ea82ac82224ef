"""A steering vector computed from two sets of prompts, and what it does at several strengths.

1. A byte-level Llama learns the standard library's documentation strings, half of them in capitals.
2. Two sets of prompts: the same texts in capitals, and in small letters. The vector of a layer is the mean of
   the last token's state over the first set, less that over the second (contrastive activation addition,
   arXiv 2312.06681). Nothing is trained.
3. It is added to every token from the prompt's last one on. Prompts in small letters are then continued in
   one batch: a row for each strength, for a random direction of the same length, and for the bare model.
4. The share of capitals among the letters that come says what each did. The vector is saved and loaded.

Run `python examples/steering.py` (minutes on two cores), or with --quick (seconds: a model that has learned
little, for a test).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from life_cycle import BASE, PROMPT, Text, console, documentation, ids_of, pretrain
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM

import reft_kernels as rk

ANSWER = 32
STRENGTHS = (-1.0, 0.5, 1.0, 1.5, 2.0)
FROM_THE_LAST = "prompt[-1:]+generated"


def in_two_cases(text: bytes) -> bytes:
    """Every other documentation string in capitals, the others in small letters."""
    strings = text.split(b"\n\n")
    return b"\n\n".join(s.upper() if index % 2 else s.lower() for index, s in enumerate(strings))


@torch.no_grad()
def last_states(model: LlamaForCausalLM, prompts: list[bytes]) -> Tensor:
    """The state of each prompt's last token behind every layer, [layers, prompts, d]."""
    states = model(input_ids=ids_of(prompts), output_hidden_states=True).hidden_states
    return torch.stack([state[:, -1] for state in states[1:]])  # the first are the embeddings


def steering_vector(model: LlamaForCausalLM, prompts: list[bytes], layer: int) -> Tensor:
    """What capitals are at a layer: a difference of means, [d]."""
    capital, small = (
        last_states(model, [change(p) for p in prompts]) for change in (bytes.upper, bytes.lower)
    )
    return capital[layer].mean(0) - small[layer].mean(0)


def capitals(row: bytes) -> float:
    """Their share among the letters."""
    letters = [c for c in row.decode("ascii", "replace") if c.isalpha()]
    return sum(c.isupper() for c in letters) / max(1, len(letters))


@torch.no_grad()
def continued(model: LlamaForCausalLM, prompts: list[bytes]) -> dict[str, dict[str, list[bytes]]]:
    """Who → strength → what each prompt is continued with. All of it is one batch."""
    rows = [(BASE, 0.0)] + [(who, strength) for who in ("vector", "random") for strength in STRENGTHS]
    ids = ids_of([prompt.lower() for _ in rows for prompt in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=[who for who, _ in rows for _ in prompts],
        scale=[strength for _, strength in rows for _ in prompts],
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=None,
    )
    answers = [bytes(row) for row in out[:, ids.shape[1] :].tolist()]
    found: dict[str, dict[str, list[bytes]]] = {}
    for number, (who, strength) in enumerate(rows):
        mine = answers[number * len(prompts) : (number + 1) * len(prompts)]
        found.setdefault(who, {})[f"{strength:g}"] = mine
    return found


def report(found: dict[str, dict[str, list[bytes]]]) -> dict[str, dict[str, float]]:
    """Prints the share of capitals, and a line of text for each strength."""
    shares = {
        who: {strength: sum(map(capitals, texts)) / len(texts) for strength, texts in by_strength.items()}
        for who, by_strength in found.items()
    }
    table = Table(title="Capitals among the letters that follow a prompt in small letters")
    for column in ("strength", "vector", "random direction"):
        table.add_column(column, justify="right")
    for strength in sorted(shares["vector"] | shares[BASE], key=float):
        none = shares[BASE].get(strength)  # what both are at strength 0
        cells = [shares[who][strength] if none is None else none for who in ("vector", "random")]
        table.add_row(strength, *(f"{share:.0%}" for share in cells))
    console.print(table)
    for strength, texts in (found[BASE] | found["vector"]).items():
        console.print(f"{strength:>5}: {texts[0]!r}", markup=False, highlight=False)
    return shares


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: seconds")
    parser.add_argument("--steps", type=int, help="steps of the model (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the vector and steering.json here")
    args = parser.parse_args()
    args.width, args.layers, args.heads, args.batch = (64, 2, 4, 12) if args.quick else (256, 4, 4, 15)
    args.steps = args.steps or (160 if args.quick else 300)
    args.layer, args.prompts = args.layers // 2, 8 if args.quick else 32
    return args


def main() -> int:
    args = parsed()
    transformers.utils.logging.disable_progress_bar()
    with console.status("Reading the standard library's documentation …"):
        text = Text(in_two_cases(documentation(200_000 if args.quick else 3_000_000)), args.seed)
    model = pretrain(text, args).eval()
    reft = rk.patch(model)
    v = steering_vector(model, text.windows(128, PROMPT), args.layer - 1)
    noise = torch.randn(v.shape, generator=torch.Generator().manual_seed(args.seed))
    with tempfile.TemporaryDirectory() as made:
        folder = args.out or Path(made)
        for name, direction in (("vector", v), ("random", noise * v.norm() / noise.norm())):
            adapter = rk.Adapter.from_tensors("vector", {args.layer - 1: direction}, positions=FROM_THE_LAST)
            adapter.save_pretrained(folder / name)
            reft.load_adapter(folder / name, name)
        found = continued(model, text.windows(args.prompts, PROMPT, held_out=True))
        shares = report(found)
        (folder / "steering.json").write_text(json.dumps({"capitals": shares}, indent=2) + "\n")
    moved = shares["vector"]["2"] - max(shares[BASE]["0"], *shares["random"].values())
    console.print(f"the vector, and no random direction, brings capitals: {'yes' if moved > 0.2 else 'NO'}")
    return 0 if moved > 0.2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
