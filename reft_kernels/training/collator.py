"""`ReftCollator`: rows of a data set become a batch, with the lengths of their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..patch.prompts import IGNORED_LABEL

#: Columns with one adapter name a row.
NAMES = ("adapter_names", "reft_adapter_names")
LENGTHS = "prompt_lengths"


class ReftCollator:
    """Pads rows to one length and tells how long their prompts are.

    A row is a mapping with `input_ids`, and where wanted `attention_mask`, `labels` (one a token, −100 where
    none is asked for, or one number a row), `prompt_lengths` (an integer) and `adapter_names` (a name); other
    columns are stacked.

    Args:
        tokenizer: gives the pad token and the side; Trainer saves it with each checkpoint.
        pad_token_id: in place of a tokenizer's. Where there is neither, rows must have one length.
        padding_side: "right" or "left"; None takes the tokenizer's, or "right".
        prompt_from_labels: whether rows without prompt_lengths have as prompt the tokens before their first
            label that is not −100. False leaves prompts to the patch, which then reads the labels itself.

    A batch holds int64 tensors input_ids, attention_mask [B, T], labels [B, T] or [B], prompt_lengths [B],
    and lists of adapter names.

    Raises (when called):
        ValueError: a row without a prompt, columns that only some rows have, rows of several lengths and
            no pad token.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        pad_token_id: int | None = None,
        padding_side: str | None = None,
        prompt_from_labels: bool = True,
    ) -> None:
        if padding_side not in (None, "left", "right"):
            raise ValueError(f'padding_side: must be "left" or "right", was {padding_side!r}')
        self.tokenizer = tokenizer
        self.pad_token_id = getattr(tokenizer, "pad_token_id", None) if pad_token_id is None else pad_token_id
        self.padding_side = padding_side or getattr(tokenizer, "padding_side", None) or "right"
        self.prompt_from_labels = prompt_from_labels

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [dict(row) for row in features]
        columns = _columns(rows)
        if "input_ids" not in columns:
            raise ValueError(f"features: rows need input_ids, have {', '.join(columns)}")
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        lengths = [len(one) for one in ids]
        batch: dict[str, Any] = {"input_ids": self._pad(ids, self._pad_id(lengths))}
        masks = [
            torch.as_tensor(row.get("attention_mask", torch.ones(n))).long() for row, n in zip(rows, lengths)
        ]
        for row, (mask, n) in enumerate(zip(masks, lengths)):
            if len(mask) != n:
                raise ValueError(f"attention_mask: row {row} has {len(mask)} entries for {n} tokens")
        batch["attention_mask"] = self._pad(masks, 0)
        for column in columns:
            if column in ("input_ids", "attention_mask", "labels"):
                continue
            values = [row[column] for row in rows]
            batch[column] = values if column in NAMES else torch.as_tensor(values)
        if "labels" in columns:
            self._add_labels(batch, rows, masks)
        return batch

    def _pad_id(self, lengths: list[int]) -> int:
        if self.pad_token_id is not None:
            return self.pad_token_id
        if len(set(lengths)) > 1:
            raise ValueError(f"pad_token_id: is needed for rows of several lengths ({sorted(set(lengths))})")
        return 0

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side=self.padding_side
        )

    def _add_labels(self, batch: dict[str, Any], rows: list[dict[str, Any]], masks: list[Tensor]) -> None:
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        if labels[0].dim() == 0:
            batch["labels"] = torch.stack(labels)
            return
        for row, (label, mask) in enumerate(zip(labels, masks)):
            if len(label) != len(mask):
                raise ValueError(f"labels: row {row} has {len(label)} labels for {len(mask)} tokens")
        batch["labels"] = self._pad([label.long() for label in labels], IGNORED_LABEL)
        if LENGTHS in batch or not self.prompt_from_labels:
            return
        batch[LENGTHS] = torch.tensor(
            [_prompt_length(row, label, mask) for row, (label, mask) in enumerate(zip(labels, masks))]
        )


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        raise ValueError("features: the batch is empty")
    columns = list(rows[0])
    for index, row in enumerate(rows):
        if set(row) != set(columns):
            odd = ", ".join(sorted(set(row) ^ set(columns)))
            raise ValueError(f"features: rows 0 and {index} differ in their columns: {odd}")
    return columns


def _prompt_length(row: int, labels: Tensor, mask: Tensor) -> int:
    """Tokens before the first label that is not −100; all of them where there is none."""
    seen = labels[mask.bool()] != IGNORED_LABEL
    length = int(seen.int().argmax()) if bool(seen.any()) else len(seen)
    if length == 0:
        raise ValueError(
            f"labels: row {row} has a label on its first token, so it has no prompt; set the prompt's labels "
            f"to {IGNORED_LABEL}, or give prompt_lengths"
        )
    return length
