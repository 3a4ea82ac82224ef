"""`ReftCollator`: rows of a data set become a batch, with the lengths of their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.names import LENGTHS, NAMES
from ..batch.prompts import IGNORED_LABEL


class ReftCollator:
    """Pads rows to one length and tells how long their prompts are.

    >>> first = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    >>> second = {"input_ids": [5, 8], "labels": [-100, 8]}
    >>> batch = ReftCollator(pad_token_id=0)([first, second])
    >>> batch["input_ids"].tolist(), batch["prompt_lengths"].tolist()
    ([[5, 6, 7], [5, 8, 0]], [2, 1])

    A row is a mapping with `input_ids`, and where wanted `attention_mask`, `labels` (one a token, −100 where
    none is asked for, or one number a row), `token_type_ids`, `prompt_lengths` (an integer) and
    `adapter_names` (a name); other columns hold numbers, of one shape, and are stacked.

    Args:
        tokenizer: gives the pad token and the side; Trainer saves it with each checkpoint.
        pad_token_id: in place of a tokenizer's. Where there is neither, rows must have one length.
        padding_side: "right" or "left"; None takes the tokenizer's, or "right".
        prompt_from_labels: whether rows without prompt_lengths have as prompt the tokens before their first
            label that is not −100. False leaves prompts to the patch, which then reads the labels itself.

    A batch holds int64 tensors input_ids, attention_mask, token_type_ids [B, T], labels [B, T] or [B],
    prompt_lengths [B], and lists of adapter names.

    Raises (when called):
        ValueError: a row without a prompt or longer than itself, columns that only some rows have or that
            are no numbers, rows of several lengths and no pad token.
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
        if pad_token_id is not None and (isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int)):
            raise ValueError(f"pad_token_id: must be an integer or None, was {pad_token_id!r}")
        self.tokenizer = tokenizer
        self.pad_token_id = getattr(tokenizer, "pad_token_id", None) if pad_token_id is None else pad_token_id
        self.padding_side = padding_side or getattr(tokenizer, "padding_side", None) or "right"
        self.prompt_from_labels = prompt_from_labels

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        columns = _columns(features)
        if "input_ids" not in columns:
            raise ValueError(f"features: rows need input_ids, have {', '.join(columns)}")
        ids = _token_rows("input_ids", features)
        lengths = [len(one) for one in ids]
        batch: dict[str, Any] = {"input_ids": self._pad(ids, self._pad_id(lengths))}
        masks = [torch.ones(n, dtype=torch.long) for n in lengths]
        if "attention_mask" in columns:
            masks = _token_rows("attention_mask", features, lengths)
        batch["attention_mask"] = self._pad(masks, 0)
        for column in columns:
            if column in ("input_ids", "attention_mask", "labels"):
                continue
            if column == "token_type_ids":
                batch[column] = self._pad(_token_rows(column, features, lengths), 0)
            elif column in NAMES:
                batch[column] = [row[column] for row in features]
            else:
                batch[column] = _stacked(column, features)
        if "labels" in columns:
            self._add_labels(batch, features, masks)
        if LENGTHS in batch:
            _check_lengths(batch[LENGTHS], masks)
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

    def _add_labels(
        self, batch: dict[str, Any], rows: Sequence[Mapping[str, Any]], masks: list[Tensor]
    ) -> None:
        single = [torch.as_tensor(row["labels"]).dim() == 0 for row in rows]
        if all(single):
            batch["labels"] = _stacked("labels", rows)
            return
        if any(single):
            row = single.index(not single[0])
            raise ValueError(f"labels: rows 0 and {row} differ: one has a label a token, one a single label")
        labels = _token_rows("labels", rows, [len(mask) for mask in masks])
        batch["labels"] = self._pad(labels, IGNORED_LABEL)
        if LENGTHS in batch or not self.prompt_from_labels:
            return
        batch[LENGTHS] = torch.tensor(
            [_prompt_length(row, label, mask) for row, (label, mask) in enumerate(zip(labels, masks))]
        )


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        raise ValueError("features: the batch is empty")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"features: row {index} must be a mapping with input_ids, was {row!r}")
        if set(row) != set(rows[0]):
            odd = ", ".join(sorted(set(row) ^ set(rows[0])))
            raise ValueError(f"features: rows 0 and {index} differ in their columns: {odd}")
    return list(rows[0])


def _token_rows(
    column: str, rows: Sequence[Mapping[str, Any]], lengths: list[int] | None = None
) -> list[Tensor]:
    """A column with one integer a token: int64 [T], row by row."""
    found: list[Tensor] = []
    for index, row in enumerate(rows):
        try:
            one = torch.as_tensor(row[column])
        except (TypeError, ValueError, RuntimeError):
            one = None
        if (
            one is None
            or one.dim() != 1
            or not len(one)
            or (one.is_floating_point() and bool((one % 1).any()))
        ):
            raise ValueError(f"{column}: row {index} must be a list of integers, was {row[column]!r}")
        if lengths is not None and len(one) != lengths[index]:
            raise ValueError(f"{column}: row {index} has {len(one)} entries for {lengths[index]} tokens")
        found.append(one.long())
    return found


def _stacked(column: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    try:
        return torch.stack([torch.as_tensor(row[column]) for row in rows])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{column}: must be numbers, of one shape in all rows: {error}") from None


def _check_lengths(lengths: Tensor, masks: list[Tensor]) -> None:
    if lengths.dim() != 1 or lengths.is_floating_point():
        raise ValueError(f"{LENGTHS}: must be an integer a row, was {lengths.tolist()}")
    for row, (length, mask) in enumerate(zip(lengths.tolist(), masks)):
        tokens = int(mask.sum())
        if not 0 <= length <= tokens:
            raise ValueError(f"{LENGTHS}: row {row} has {tokens} tokens, but its prompt length was {length}")


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
