"""From a call's arguments to its plan: names checked, prompts read, selection resolved, rows packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..adapter import Adapter
from .blocks import Blocks
from .describe import unknown
from .heads import share_heads
from .prompts import Prompts, Selection, read_prompts, select
from .state import GenerateScope, State, read_cache_length
from .tables import BatchPlan, Place, Registry, SiteKey, SiteTable

#: The name of the bare model in a list of adapter names, as in PEFT.
BASE = "__base__"


def _nothing() -> None:
    pass


class Planner:
    """Makes the plans of one patched model."""

    def __init__(
        self, blocks: Blocks, registry: Registry, adapters: dict[str, Adapter], state: State
    ) -> None:
        self.blocks, self.registry, self.adapters, self.state = blocks, registry, adapters, state
        self.active: str | None = None
        #: Called for every new plan: sees to it that the sites are attached.
        self.hold: Callable[[], None] = _nothing
        #: Devices of the norms that are fused with edits. Where there are any, no forward is idle.
        self.norm_devices: list[torch.device] = []

    # Names -----------------------------------------------------------------------------------------------

    def names(self, given: Any, batch: int) -> tuple[str | None, ...]:
        """One adapter a row, None for the bare model. given: None takes the active adapter for all rows."""
        if given is None:
            return (self.active,) * batch
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ValueError(f"adapter_names: must be a list with one name a row, was {given!r}")
        if len(given) != batch:
            raise ValueError(f"adapter_names: has {len(given)} names for a batch of {batch} rows")
        try:
            for name in given:
                if name != BASE and name not in self.adapters:
                    raise ValueError(f"adapter_names: {unknown(name, [*self.adapters, BASE], 'known are')}")
        except TypeError:  # a name that can't be looked up
            raise ValueError(f"adapter_names: must hold names, held {name!r}") from None
        return tuple(None if name == BASE else name for name in given)

    def _groups(self, name: str):
        return self.adapters[name].groups

    def _select(self, names: Sequence[str | None], prompts: Prompts) -> tuple[Selection, dict[str, Adapter]]:
        owners = {name: self.adapters[name] for name in names if name is not None}
        return select(names, prompts, self._groups), owners

    def _needs_prompt(self, names: Sequence[str | None]) -> bool:
        return any(
            group.needs_prompt
            for name in dict.fromkeys(names)
            if name is not None
            for group in self._groups(name)
        )

    def check_packed(self, name: str) -> None:
        """Refuses calls that pack requests into one row while the active adapter depends on the prompt."""
        if self.active is not None and self._needs_prompt([self.active]):
            raise ValueError(
                f"{name}: packs requests into one row, where prompts can't be told apart, and adapter "
                f"{self.active!r} depends on the prompt; use generate, or an adapter with positions 'all'"
            )

    # Plans -----------------------------------------------------------------------------------------------

    def _plan(
        self, selection: Selection, owners: dict[str, Adapter], start: int, length: int, batch: int
    ) -> BatchPlan | None:
        repeat, rest = divmod(batch, selection.batch)
        if rest:
            raise RuntimeError(
                f"a forward has {batch} rows, which is no multiple of the {selection.batch} prompts"
            )
        by_segment = selection.window(start, length, repeat)
        heads = share_heads(selection, owners, repeat)
        if by_segment is None:
            if not heads:
                return self.idle(batch * length)
            by_segment = [np.zeros(0, dtype=np.int64)] * len(selection.segments)
        for name, adapter in owners.items():
            if self.adapters.get(name) is not adapter:
                raise ValueError(f"adapter {name!r} was deleted while a generate call used it")
        table = self.registry.table(selection.segments, self.adapters)
        return self._prepared(BatchPlan(table, by_segment, batch * length, heads))

    def idle(self, tokens: int) -> BatchPlan | None:
        """The plan of a forward that edits nothing: none, or one that only norms."""
        if not self.norm_devices:
            return None
        table = self.registry.table((), self.adapters)
        return self._prepared(BatchPlan(table, [], tokens, {}))

    def _prepared(self, plan: BatchPlan) -> BatchPlan:
        """Makes what compiled code can't make when it runs, and says now if a backend can't run."""
        self.hold()
        for device in dict.fromkeys([*plan.table.devices, *self.norm_devices]):
            plan.backends[device] = ops.current_backend(device)
        for device in self.norm_devices:
            plan.covering(device, edited=False)
            if plan.sites:
                plan.covering(device, edited=True)
        return plan

    def moved(self, key: SiteKey, place: Place, plan: BatchPlan) -> SiteTable:
        """Hidden states of another device or dtype than expected: lays the site's adapters there."""
        self.registry.replace(key, place, self.adapters)
        plan.table = self.registry.table(plan.table.segments, self.adapters)
        plan.sites = plan.table.sites
        plan.add_devices()
        plan.backends[place.device] = ops.current_backend(place.device)
        return plan.sites[key]

    def forward(self, call: dict[str, Any], given: Any, prompt_lengths: Any) -> BatchPlan | None:
        """The plan of a forward outside generate (or of a second model call inside it, as in guidance)."""
        bare = given is None and self.active is None and self.state.scope is None
        if bare and not self.norm_devices:
            return None
        tokens = call.get("input_ids")
        if tokens is None:
            tokens = call.get("inputs_embeds")
        if tokens is None:
            tokens = call.get("hidden_states")
        if not isinstance(tokens, Tensor):
            if bare:
                return None
            raise ValueError("the call has neither input_ids nor inputs_embeds, so rows can't be told")
        batch, length = tokens.shape[:2]
        if bare:
            return self.idle(batch * length)
        scope = self.state.scope
        if given is None and scope is not None:
            copies, rest = divmod(batch, len(scope.names))
            if rest:
                raise RuntimeError(
                    f"a forward has {batch} rows, no multiple of generate's {len(scope.names)} prompts"
                )
            names = tuple(name for name in scope.names for _ in range(copies))
        else:
            names = self.names(given, batch)
        if not any(names):
            return self.idle(batch * length)
        start = read_cache_length(call.get("past_key_values"), call.get("cache_position"))
        needs_prompt = self._needs_prompt(names)
        mask = call.get("attention_mask")
        if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() != 2):
            if needs_prompt and start == 0:
                raise ValueError(
                    "attention_mask: must be 2-D for adapters whose positions depend on the prompt; "
                    "a 4-D mask doesn't tell where a row begins"
                )
            mask = None
        positions = call.get("position_ids")
        if needs_prompt and isinstance(positions, Tensor) and start == 0:
            _refuse_packed(positions, mask)
        labels = call.get("labels") if needs_prompt else None
        if scope is not None and given is None and call.get("past_key_values") is None:
            prompt_lengths = scope.lengths_aside(batch, length, prompt_lengths, mask)
        prompts = read_prompts(batch, start, length, mask, prompt_lengths, labels)
        return self._plan(*self._select(names, prompts), start, length, batch)

    # Generate --------------------------------------------------------------------------------------------

    def open_scope(
        self, model: Any, inputs: Tensor | None, call: dict[str, Any], given: Any, prompt_lengths: Any
    ) -> GenerateScope:
        """Reads a generate call: names, prompts and what is edited in them, once for all its forwards."""
        ids = inputs if inputs is not None else call.get("input_ids")
        embeds = call.get("inputs_embeds")
        tokens = embeds if embeds is not None else ids
        outer = self.state.scope
        batch = tokens.shape[0] if isinstance(tokens, Tensor) else 1
        seen = 0
        cache = call.get("past_key_values")
        if cache is not None and not isinstance(cache, tuple):
            seen = read_cache_length(cache, None)
        if outer is not None and given is None and outer.goes_on_in(ids):
            # A generate inside generate (assisted decoding by the model's own layers) goes on with the same.
            return GenerateScope(outer.names, outer.selection, outer.owners, seen, ids)
        names = self.names(given, batch)
        if not any(names):
            return GenerateScope(names, None, {}, seen, ids)
        width = tokens.shape[1] if isinstance(tokens, Tensor) else 1
        mask = call.get("attention_mask")
        if mask is None and isinstance(ids, Tensor) and embeds is None:
            mask = _inferred_mask(model, ids, call)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > width:
            width = mask.shape[1]  # only the new tokens were passed, the mask tells of the cached ones too
        elif isinstance(mask, Tensor) and mask.dim() != 2:
            raise ValueError(f"attention_mask: must be 2-D in generate, had shape {list(mask.shape)}")
        prompts: Prompts = read_prompts(batch, 0, width, mask, prompt_lengths)
        return GenerateScope(names, *self._select(names, prompts), seen, ids)

    def generate(self, scope: GenerateScope, start: int, length: int, batch: int) -> BatchPlan | None:
        """The plan of one of generate's own forwards, over columns [start, start + length)."""
        selection = scope.selection
        if selection is None:
            return self.idle(batch * length)
        if length == 1 and start >= selection.width:
            # Decode steps are all alike: made once, and again only if adapters or the backend change.
            key = (batch, self.registry.version, ops.chosen_backend())
            if scope.decode is None or scope.decode[0] != key:
                scope.decode = (key, self._plan(selection, scope.owners, start, 1, batch))
            return scope.decode[1]
        return self._plan(selection, scope.owners, start, length, batch)


def _inferred_mask(model: Any, ids: Tensor, call: dict[str, Any]) -> Tensor | None:
    """The mask that generate makes up when none is given: pad tokens, unless pad is also an end token."""
    given, default = call.get("generation_config"), getattr(model, "generation_config", None)

    def setting(name: str) -> Any:
        if name in call:
            return call[name]
        value = getattr(given, name, None)
        return getattr(default, name, None) if value is None else value

    pad, end = setting("pad_token_id"), setting("eos_token_id")
    ends = [] if end is None else ([end] if isinstance(end, int) else list(np.atleast_1d(np.asarray(end))))
    if pad is None or pad in ends:
        return None
    return (ids != pad).long()


def _refuse_packed(positions: Tensor, mask: Tensor | None) -> None:
    table = positions if positions.dim() == 2 else positions.view(1, -1)
    if table.shape[1] < 2:
        return
    falls = table[:, 1:] < table[:, :-1]
    if mask is not None and mask.shape == table.shape:
        falls = falls & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if bool(falls.any()):
        raise ValueError(
            "position_ids: restart inside a row (packed sequences), where prompts can't be told apart; "
            "use an adapter with positions 'all', or a row for each sequence"
        )
