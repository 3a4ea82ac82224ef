"""`ReftTrainer`: Hugging Face's Trainer for a patched model; the same on transformers 4.57 and 5."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..batch.names import LENGTHS, NAMES
from ..huggingface.freezing import peft_parameters
from . import checkpoints
from .collator import ReftCollator


class ReftTrainer(Trainer):
    """A Trainer whose checkpoints hold the adapters, and not the base model.

    What differs from Trainer:

    - a checkpoint holds every trainable adapter with its raw parameters (one adapter: in the checkpoint's
      folder, which `reft.load_adapter` reads; several: a folder each below it), so a resumed run is the run
      that was interrupted, to the bit; a LoRA of PEFT's on the same model is saved as PEFT does;
    - the columns prompt_lengths, adapter_names and reft_adapter_names reach the model;
    - the default collator is `ReftCollator`;
    - the loss that is trained on has the penalties (`Adapter.penalty`) of the adapters that a batch's rows
      name; evaluation's has not;
    - what would train nothing, or train and not be saved, is an error.

    Raises ValueError: the model is not patched, no adapter trains, or parameters train that no adapter holds.
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        if model is None:
            raise ValueError("model: must be a patched model, was None")
        self.reft = checkpoints.reft_of(model)
        super().__init__(model, *args, **kwargs)
        given = args[1] if len(args) > 1 else kwargs.get("data_collator")
        if given is None:
            self.data_collator = ReftCollator(self.processing_class)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("args: FSDP and DeepSpeed don't work here yet; use DDP, or a loop of your own")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._check_trainable()
        return super().train(*args, **kwargs)

    def _check_trainable(self) -> None:
        if not checkpoints.trainable_adapters(self.reft):
            known = ", ".join(map(repr, self.reft.adapters)) or "none"
            raise ValueError(
                f"model: none of its adapters ({known}) trains; add one with reft.add_adapter(name, "
                "ReftConfig(...)), or load one with is_trainable=True"
            )
        for name, adapter in checkpoints.trainable_adapters(self.reft).items():
            if not all(p.requires_grad for p in adapter.parameters()):
                raise ValueError(
                    f"model: adapter {name!r} is to train, but somebody froze parameters of it (as "
                    "get_peft_model does); set model.reft.adapters[name].trainable = True once more"
                )
        adapters = self.reft.adapters.values()
        kept = {id(p) for one in adapters for p in one.parameters()} | peft_parameters(self.model)
        lost = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in kept]
        if lost:
            raise ValueError(
                f"model: {lost[0]} requires a gradient ({len(lost)} such parameters), but checkpoints hold "
                "adapters only; freeze it, or name its module in ReftConfig(modules_to_save=[...])"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Trainer's loss; in training also the penalties of the adapters that train and that rows name."""
        named = self._named_in(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (model.training and torch.is_grad_enabled()):
            return result
        loss = result[0] if isinstance(result, tuple) else result
        if not loss.requires_grad:
            raise RuntimeError(
                "the loss has no gradient: no row of the batch was edited by an adapter that trains. The "
                f"active adapter is {self.reft.active_adapter!r} (reft.set_adapter); adapter_names in the "
                "batch name one for each row"
            )
        penalties = [
            adapter.penalty()
            for name, adapter in checkpoints.trainable_adapters(self.reft).items()
            if name in named and any(one.has_penalty for one in adapter.interventions)
        ]
        if penalties:
            share = self._share_of_step(num_items_in_batch)
            loss = loss + share * torch.stack([one.to(loss.device) for one in penalties]).sum()
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    def _named_in(self, inputs: dict[str, Any]) -> set[str]:
        """The adapters of a batch's rows."""
        given = next((inputs[key] for key in NAMES if inputs.get(key) is not None), None)
        if given is None:
            return {self.reft.active_adapter} - {None}  # type: ignore[return-value]
        rows = ([row] if isinstance(row, str | None) else row for row in given)
        return {name for row in rows for name in row if name is not None}

    def _share_of_step(self, num_items_in_batch: Any) -> float:
        """What one batch's penalty counts, so that over the batches of a step (gradient accumulation) it is
        once: 1 where Trainer divides the loss by their number, else its share."""
        divided = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5 lets a trainer say it
        if divided is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            divided = by_items or self.compute_loss_func is not None
        return 1 / getattr(self, "current_gradient_accumulation_steps", 1) if divided else 1.0

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        columns += [name for name in (*NAMES, LENGTHS) if name not in columns]

    # Checkpoints -----------------------------------------------------------------------------------------

    def _has_peft(self) -> bool:
        return hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        if self._has_peft():
            super()._save(folder, state_dict)
        else:
            os.makedirs(folder, exist_ok=True)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))
        checkpoints.save(self.reft, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._has_peft():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoints.restore(self.reft, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self._has_peft():
            super()._load_best_model()
        checkpoints.restore(self.reft, self.state.best_model_checkpoint)
