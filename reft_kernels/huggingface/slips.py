"""Calls that run without a word and do something else than their writer meant: told once, or refused."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..batch.names import LENGTHS, NAMES, POSITIONS, SCALES

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..batch import BatchPlan

#: Keyword arguments of ours that forward and generate take.
OURS = (*NAMES, LENGTHS, POSITIONS, *SCALES)

#: How alike two names are (difflib's ratio) for one to be taken for a slip in the other.
_ALIKE = 0.8
#: What is written for our keywords and is less alike than that.
_SHORT = {
    **dict.fromkeys(("adapter", "adapters", "adapter_id", "adapter_ids"), NAMES[1]),
    "unit_locations": POSITIONS,
}


@functools.lru_cache(maxsize=256)
def meant_by(keyword: str) -> str | None:
    """Which keyword of ours was probably meant; None where none looks like it."""
    lower = keyword.lower()
    if lower in _SHORT:
        return _SHORT[lower]
    found = difflib.get_close_matches(lower, OURS, n=1, cutoff=_ALIKE)
    return found[0] if found else None


class Keywords:
    """The keyword arguments of a method whose model may swallow unknown ones: refuses slips in ours.

    own: the parameters that the method has itself, which are never slips.
    """

    def __init__(self, method: str, own: Iterable[str]) -> None:
        self.method = method
        self._fine = {*own, *OURS}

    def check(self, given: Mapping[str, Any]) -> None:
        """Raises ValueError for a keyword that is nearly one of ours."""
        if self._fine.issuperset(given):
            return
        for keyword in given:
            if keyword in self._fine:
                continue
            meant = meant_by(keyword)
            if meant is not None:
                raise ValueError(f"{keyword}: is no argument of {self.method}; {meant} is (one for each row)")
            self._fine.add(keyword)


class Told:
    """What a patched model has warned of: each once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        #: Whether somebody asked `Reft` for its parameters, as one does for an optimizer.
        self.parameters_taken = False
        #: Whether somebody said which adapter is active (it is the first one otherwise).
        self.active_chosen = False

    def training_step(
        self,
        model: nn.Module,
        plan: BatchPlan,
        call: Mapping[str, Any],
        adapters: Mapping[str, Adapter] | None,
    ) -> None:
        """Looks at a forward with gradients, of a model in training mode, that edits something.

        adapters: all there are, where the call named none.
        """
        if not plan.folds:
            self._frozen(model, plan, call)
        elif adapters is not None and not self.active_chosen:
            self._unnamed(adapters)

    def _unnamed(self, adapters: Mapping[str, Adapter]) -> None:
        """Warns where several adapters train, no row names its own, and nobody chose the one they all get.

        Collators that know tensors only drop a column of names without a word.
        """
        trainable = [name for name, adapter in adapters.items() if adapter.trainable]
        if "unnamed" not in self._said and len(trainable) > 1:
            self._say(
                "unnamed",
                "adapter_names: the batch has none, so every row trains the active adapter, though "
                f"{', '.join(map(repr, trainable))} are trainable. Name one a row (rk.ReftCollator keeps "
                "that column of a data set, most others drop it), or choose with reft.set_adapter",
            )

    def _frozen(self, model: nn.Module, plan: BatchPlan, call: Mapping[str, Any]) -> None:
        """Warns of a training step in which no adapter of the batch trains, though one seems to be meant to.

        That is so where somebody took the adapters' parameters, where others froze a trainable adapter (as
        get_peft_model does), and where a loss is computed that has no gradient at all. Who trains the base or
        a LoRA under frozen adapters does none of these.
        """
        if "frozen" in self._said:
            return
        if not (self.parameters_taken or plan.table.trainable or _trains_nothing(model, call)):
            return
        names = list(plan.table.adapters)
        listed = list(dict.fromkeys(names))
        self._say(
            "frozen",
            f"a training step in which no adapter of the batch trains: {', '.join(map(repr, listed))} "
            f"{'is' if len(listed) == 1 else 'are'} frozen. Load with is_trainable=True, or set "
            f"reft.adapters[{listed[0]!r}].trainable = True",
        )

    def carried(self, adapters: Mapping[str, Adapter]) -> None:
        """Warns of a cache of an earlier turn under adapters whose edits in it are not this prompt's."""
        if "carried" in self._said:
            return
        for name, adapter in adapters.items():
            for positions in adapter.groups:
                if positions.moves_with_prompt:
                    text = (
                        "past_key_values: holds tokens that were edited as another prompt's, and adapter "
                        f"{name!r} has positions {str(positions)!r}, so the result is not that of this "
                        "prompt without a cache. With the first turn's prompt_lengths in every turn the two "
                        "agree"
                    )
                    self._say("carried", text)
                    return

    def _say(self, what: str, text: str) -> None:
        self._said.add(what)
        warnings.warn(text, stacklevel=4)


def _trains_nothing(model: nn.Module, call: Mapping[str, Any]) -> bool:
    """Whether a loss is computed through which nothing gets a gradient."""
    embeds = call.get("inputs_embeds")
    if call.get("labels") is None or call.get("past_key_values") is not None:
        return False  # (prefix tuning trains a cache)
    if embeds is not None and embeds.requires_grad:
        return False  # prompt tuning
    return not any(parameter.requires_grad for parameter in model.parameters())


def warn_of_bad_values(name: str, adapter: Adapter) -> None:
    for key, tensor in adapter.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            warnings.warn(f"adapter {name!r}: {key} holds NaN or Inf", stacklevel=4)
