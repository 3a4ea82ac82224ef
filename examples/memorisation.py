"""How much text a rank-1 edit of one token at one layer can hold.

The experiment of appendix F of the ReFT paper (arXiv 2404.03592), on a model that a CPU can train. The model
is frozen; a LoReFT edit of the last prompt token, of rank 1 at a single layer, trains until the model goes on
from a fixed prompt with a given text. Greedy generation then shows how many bytes it gives back before the
first error, of texts of three kinds:

- known: beginnings of documentation strings that the model was trained on,
- unseen: of such strings that it was not trained on,
- shuffled: the bytes of the unseen ones in random order, which no knowledge of language helps with.

All edits of one length train side by side, a row each of one batch. Beside them stand the bare model, and a
control: every trained edit with its direction replaced by a random one of the same length.

Run `python examples/memorisation.py` (minutes on two cores); it writes memorisation.json and memorisation.png
to --out. --base keeps the model in a folder, and takes it from there the next time. --quick is for a test.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from life_cycle import BASE, Text, console, descend, documentation, ids_of, pretrain
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM

import reft_kernels as rk

KINDS = ("known", "unseen", "shuffled")
PROMPT = b"\n\n"  # what stands before each of the strings that the model reads

WHO = ("trained edit", "random direction", "bare model")

#: Length → kind → who → bytes before the first error, one number a text.
Found = dict[int, dict[str, dict[str, list[int]]]]


def pick_texts(corpus: bytes, args: argparse.Namespace) -> dict[str, list[bytes]]:
    """Kind → texts of the greatest length; the model learned the first args.corpus bytes of `corpus`."""
    generator = torch.Generator().manual_seed(args.seed)
    known, rest = corpus[: args.corpus], corpus[args.corpus :]

    def some(strings: list[bytes]) -> list[bytes]:
        cut = list(dict.fromkeys(s[: args.lengths[-1]] for s in strings if len(s) >= args.lengths[-1]))
        order = torch.randperm(len(cut), generator=generator).tolist()
        return [cut[index] for index in order[: args.texts]]

    # The string at the border counts for neither.
    unseen = some([s for s in rest.split(PROMPT)[1:] if s[: args.lengths[-1]] not in known])
    shuffled = [bytes(text[i] for i in torch.randperm(len(text), generator=generator)) for text in unseen]
    return dict(zip(KINDS, (some(known.split(PROMPT)[:-1]), unseen, shuffled)))


def learn(model: LlamaForCausalLM, texts: list[bytes], args: argparse.Namespace) -> list[str]:
    """Trains an edit for each text, all in one batch. Returns the adapters' names."""
    reft: rk.Reft = model.reft
    torch.manual_seed(args.seed)
    names = [f"text {index}" for index in range(len(texts))]
    for name in names:
        reft.add_adapter(name, rk.ReftConfig(r=args.rank, layers=[args.layer], positions="l1"))
    ids = ids_of([PROMPT + text for text in texts])
    labels = ids.clone()
    labels[:, : len(PROMPT)] = -100

    def loss() -> Tensor:
        return model(input_ids=ids, labels=labels, adapter_names=names, use_cache=False).loss

    label = f"{len(texts)} edits, {len(texts[0])} bytes"
    descend(list(reft.parameters()), label, args.edit_steps, args.rate, loss)
    return names


@torch.no_grad()
def turn(reft: rk.Reft, names: list[str]) -> list[str]:
    """A control for each adapter: h + R₀ᵀ(Wh + b − Rh), the same edit in a random direction R₀."""
    controls = [f"{name}, turned" for name in names]
    for name, control in zip(names, controls):
        (trained,) = reft.adapters[name].interventions
        (fresh,) = reft.add_adapter(control, reft.adapters[name].config).interventions
        own, random = trained.materialized(), fresh.materialized()
        fresh.W.copy_(own["W"] - own["R"] + random["R"])
        fresh.b.copy_(own["b"])
    return controls


def given_back(model: LlamaForCausalLM, texts: list[bytes], names: list[str]) -> list[int]:
    """Bytes that greedy generation gets right before its first error."""
    prompt = ids_of([PROMPT] * len(texts))
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        adapter_names=names,
        max_new_tokens=len(texts[0]),
        do_sample=False,
        eos_token_id=None,
    )
    right = out[:, len(PROMPT) :] == ids_of(texts)
    return right.long().cumprod(1).sum(1).tolist()


def measure(model: LlamaForCausalLM, texts: dict[str, list[bytes]], args: argparse.Namespace) -> Found:
    found: Found = {}
    for length in args.lengths:
        cut = {kind: [text[:length] for text in some] for kind, some in texts.items()}
        rows = [text for some in cut.values() for text in some]
        names = learn(model, rows, args)
        controls = turn(model.reft, names)
        by_who = [given_back(model, rows, who) for who in (names, controls, [BASE] * len(rows))]
        found[length] = {}
        start = 0
        for kind, some in cut.items():
            part = slice(start, start + len(some))
            found[length][kind] = {who: counts[part] for who, counts in zip(WHO, by_who)}
            start += len(some)
        for name in (*names, *controls):
            model.reft.delete_adapter(name)
    return found


def mean(counts: list[int]) -> float:
    return sum(counts) / len(counts)


def report(found: Found, args: argparse.Namespace) -> None:
    table = Table(title=f"Bytes given back before the first error, mean of {args.texts} texts (whole texts)")
    for column in ("text", "bytes", *WHO):
        table.add_column(column, justify="left" if column == "text" else "right")
    for kind in KINDS:
        for length, kinds in found.items():
            cells = [f"{mean(c):.1f} ({sum(n == length for n in c)}/{len(c)})" for c in kinds[kind].values()]
            table.add_row(kind, str(length), *cells)
        table.add_section()
    console.print(table)


def plot(found: Found, args: argparse.Namespace, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lengths = list(found)
    axes.plot(lengths, lengths, color="0.6", linewidth=1, label="the whole text")
    for kind, colour, marker in zip(KINDS, ("C0", "C1", "C2"), "os^"):
        counts = [found[length][kind][WHO[0]] for length in lengths]
        label = f"trained edit, {kind} text"
        axes.plot(lengths, [mean(c) for c in counts], color=colour, marker=marker, label=label)
        for length, each in zip(lengths, counts):
            axes.scatter([length] * len(each), each, color=colour, marker=marker, s=12, alpha=0.35, zorder=1)
    for who, style in zip(WHO[1:], ("--", ":")):
        pooled = [mean(sum((found[length][kind][who] for kind in KINDS), [])) for length in lengths]
        axes.plot(lengths, pooled, color="k", linestyle=style, label=f"{who}, all texts")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_yscale("symlog", base=2, linthresh=1)
    ticks = [0, *lengths]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="length of the text (bytes)", ylabel="given back before the first error (bytes)")
    axes.set_ylim(bottom=-0.1)
    axes.set_title(f"A rank-{args.rank} LoReFT edit of one token at layer {args.layer}: mean, and each text")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")
    figure.savefig(file, dpi=150)


def base_model(corpus: bytes, args: argparse.Namespace) -> LlamaForCausalLM:
    """The model in --base where there is one; otherwise it is trained, and kept there."""
    if args.base is not None and (args.base / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(args.base)
    model = pretrain(Text(corpus[: args.corpus], args.seed, held_out=0.0), args)
    if args.base is not None:
        model.save_pretrained(args.base)
    return model


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, two lengths: seconds")
    parser.add_argument("--base", type=Path, help="folder for the model; one that is there is not trained")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--layer", type=int, default=0, help="the layer edited (default 0)")
    parser.add_argument("--lengths", type=int, nargs="+", help="bytes (default 4 8 16 32 64)")
    parser.add_argument("--texts", type=int, help="texts of each kind (default 6)")
    parser.add_argument("--edit-steps", type=int, help="steps of the edits (default 300)")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of the edits (default 0.1)")
    parser.add_argument("--steps", type=int, help="steps of the model (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("memorisation"), help="folder for what it writes")
    args = parser.parse_args()
    args.width, args.layers, args.heads, args.batch = (64, 2, 4, 12) if args.quick else (256, 4, 8, 16)
    args.corpus = 3_000 if args.quick else 30_000
    args.steps = args.steps or (150 if args.quick else 600)
    args.lengths = sorted(args.lengths or ([4, 16] if args.quick else [4, 8, 16, 32, 64]))
    args.texts = args.texts or (2 if args.quick else 6)
    args.edit_steps = args.edit_steps or (60 if args.quick else 300)
    return args


def main() -> int:
    args = parsed()
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = documentation(4 * args.corpus)
    model = base_model(corpus, args).eval()
    rk.patch(model)
    texts = pick_texts(corpus, args)
    found = measure(model, texts, args)
    report(found, args)
    plot(found, args, args.out / "memorisation.png")
    settings = {name: getattr(args, name) for name in ("rank", "layer", "edit_steps", "rate", "seed")}
    written = {kind: [text.decode() for text in some] for kind, some in texts.items()}
    content = json.dumps({"settings": settings, "texts": written, "bytes before the first error": found})
    (args.out / "memorisation.json").write_text(content)
    console.print(f"wrote memorisation.json and memorisation.png to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
