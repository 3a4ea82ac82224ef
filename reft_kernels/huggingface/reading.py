"""From a call of a Hugging Face model to its plan: names, prompts, which columns a forward covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..batch import BatchPlan, DecodeWorkspaces, Prompts, Selection, read_prompts
from ..batch.stacks import RowNames, names_of
from ..batch.tables import keys_of
from .continuous import batching_of
from .runtime import Columns, GenerateScope, Runtime, nested, read_cache_length
from .saved_modules import share_modules
from .sites import Sites


class _Batch(NamedTuple):
    """What a forward is given, as far as plans care."""

    tokens: Tensor
    size: int
    length: int


class Ours(NamedTuple):
    """What a call says in our own arguments; None for what it does not say."""

    names: Any = None
    lengths: Any = None
    positions: Any = None
    scale: Any = None


class CallReader:
    """Reads the arguments of a patched model's calls, and makes their plans."""

    def __init__(self, runtime: Runtime, sites: Sites) -> None:
        self.runtime, self.sites, self.planner = runtime, sites, runtime.planner
        self.workspaces = DecodeWorkspaces(runtime.store)
        self._step: tuple[tuple, BatchPlan | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_step": None}

    # Names -----------------------------------------------------------------------------------------------

    def names(self, given: Any, batch: int, scale: Any = None) -> tuple[RowNames, ...]:
        """What each row takes, None for the bare model. given: None takes the active adapter for all rows."""
        if given is None:
            given = (self.runtime.active,) * batch
            if scale is None:
                return given
        return self.planner.check_names(given, batch, scale)

    def check_packed(self, name: str) -> None:
        """Refuses calls that pack requests into one row while the active adapter depends on the prompt."""
        active = self.runtime.active
        if active is not None and self.planner.needs_prompt([active]):
            raise ValueError(
                f"{name}: packs requests into one row, where prompts can't be told apart, and adapter "
                f"{active!r} depends on the prompt; use generate, or an adapter with positions 'all'"
            )

    def _check_embedded(self, names: Sequence[RowNames], call: dict[str, Any]) -> None:
        """Refuses embeddings in place of ids where an adapter edits what the ids are embedded to."""
        if call.get("inputs_embeds") is None:
            return
        for name in names_of(names):
            if any(key.site == "embedding_output" for key in keys_of(self.runtime.store.find(name))):
                raise ValueError(
                    f"inputs_embeds: pass the embeddings by that adapter {name!r} edits; give input_ids"
                )

    # Plans -----------------------------------------------------------------------------------------------

    def _plan(self, selection: Selection, columns: Columns) -> BatchPlan | None:
        start, length, batch, ids = columns
        repeat, rest = divmod(batch, selection.batch)
        if rest:
            raise RuntimeError(
                f"a forward has {batch} rows, which is no multiple of the {selection.batch} prompts"
            )
        plan = self.planner.plan(selection, start, length, batch, share_modules(selection, repeat), ids)
        return self.idle(batch * length) if plan is None else self._prepared(plan)

    def idle(self, tokens: int) -> BatchPlan | None:
        """The plan of a forward that edits nothing: none, or one that only norms."""
        return self._prepared(self.planner.idle(tokens)) if self.runtime.fused.devices else None

    def _prepared(self, plan: BatchPlan) -> BatchPlan:
        """Makes what compiled code can't make when it runs, and says now if a backend can't run."""
        self.sites.reattach()
        plan.prepare()
        for device in self.runtime.fused.devices:
            plan.backends[device] = ops.current_backend(device)
            plan.covering(device, edited=False)
            if plan.sites:
                plan.covering(device, edited=True)
        return plan

    # Forward ---------------------------------------------------------------------------------------------

    def forward(self, call: dict[str, Any], ours: Ours) -> BatchPlan | None:
        """The plan of a forward outside generate (or of a second model call inside it, as in guidance)."""
        scope, given = self.runtime.scope, ours.names
        bare = given is None and ours.positions is None and self.runtime.active is None and scope is None
        if bare and not self.runtime.fused.devices:
            return None
        batch = _batch_of(call)
        if batch is None:
            if bare:
                return None
            raise ValueError("the call has neither input_ids nor inputs_embeds, so rows can't be told")
        names = None if bare else self._forward_names(given, batch.size, ours.scale)
        if names is None or not (any(names) or ours.positions is not None):
            return self.idle(batch.size * batch.length)
        self._check_embedded(names, call)
        start = read_cache_length(call.get("past_key_values"), call.get("cache_position"))
        # In a decode loop of one's own all steps are alike, as their tokens are generated, not of a prompt.
        alike = start > 0 and scope is None and ours.lengths is None and ours.positions is None
        alike = alike and not torch.is_grad_enabled() and _is_step(call, batch)
        key = (names, self.runtime.store.version, ops.chosen_backend())
        if alike and self._step is not None and self._step[0] == key:
            return self._step[1]
        prompts = self._forward_prompts(call, names, batch, start, ours)
        selection = self.planner.select(names, prompts, ours.positions)
        ids = ids_of(call) if selection.needs_ids else None
        plan = self._plan(selection, Columns(start, batch.length, batch.size, ids))
        if alike and not selection.asked and (plan is None or not plan.table.trainable):
            self._step = (key, plan)
        return plan

    def _forward_names(self, given: Any, batch: int, scale: Any) -> tuple[RowNames, ...]:
        scope = self.runtime.scope
        if given is not None or scope is None:
            return self.names(given, batch, scale)
        copies, rest = divmod(batch, len(scope.names))
        if rest:
            raise RuntimeError(
                f"a forward has {batch} rows, no multiple of generate's {len(scope.names)} prompts"
            )
        return tuple(name for name in scope.names for _ in range(copies))

    def _forward_prompts(
        self,
        call: dict[str, Any],
        names: Sequence[RowNames],
        batch: _Batch,
        start: int,
        ours: Ours,
    ) -> Prompts:
        given, prompt_lengths = ours.names, ours.lengths
        needs_prompt = self.planner.needs_prompt(names) or ours.positions is not None
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
        scope = self.runtime.scope
        if scope is not None and given is None and call.get("past_key_values") is None:
            prompt_lengths = scope.lengths_aside(batch.size, batch.length, prompt_lengths, mask)
        return read_prompts(batch.size, start, batch.length, mask, prompt_lengths, labels)

    def packed(self, call: dict[str, Any], ours: Ours) -> BatchPlan | None:
        """The plan of a forward over a flat batch of requests, as continuous batching lays them out."""
        batching = batching_of(call)
        if batching is None:
            self.check_packed("forward")
            return self.forward(call, ours)
        selection, starts, counts = batching.step()
        tokens = call["input_ids"].shape[1]
        if counts.sum() != tokens:
            raise RuntimeError(f"a batch was laid out of {counts.sum()} tokens, and its forward has {tokens}")
        ids = ids_of(call)[0] if selection.needs_ids else None
        plan = self.planner.step(selection, starts, counts, ids, prepare=False)
        return self.idle(tokens) if plan is None else self._prepared(plan)

    # Generate --------------------------------------------------------------------------------------------

    def open_scope(
        self, model: Any, inputs: Tensor | None, call: dict[str, Any], ours: Ours
    ) -> GenerateScope:
        """Reads a generate call: names, prompts and what is edited in them, once for all its forwards."""
        ids = inputs if inputs is not None else call.get("input_ids")
        given, prompt_lengths, positions, scale = ours
        embeds = call.get("inputs_embeds")
        tokens = embeds if embeds is not None else ids
        outer = self.runtime.scope
        batch = tokens.shape[0] if isinstance(tokens, Tensor) else 1
        seen = 0
        cache = call.get("past_key_values")
        if cache is not None and not isinstance(cache, tuple):
            seen = read_cache_length(cache, None)
        if outer is not None and given is None and outer.goes_on_in(ids):
            # A generate inside generate (assisted decoding by the model's own layers) goes on with the same.
            return GenerateScope(outer.names, outer.selection, seen, ids)
        names = self.names(given, batch, scale)
        if not any(names) and positions is None:
            return GenerateScope(names, None, seen, ids)
        self._check_embedded(names, call)
        width = tokens.shape[1] if isinstance(tokens, Tensor) else 1
        mask = call.get("attention_mask")
        if mask is None and isinstance(ids, Tensor) and embeds is None:
            mask = _inferred_mask(model, ids, call)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > width:
            width = mask.shape[1]  # only the new tokens were passed, the mask tells of the cached ones too
        elif isinstance(mask, Tensor) and mask.dim() != 2:
            raise ValueError(f"attention_mask: must be 2-D in generate, had shape {list(mask.shape)}")
        prompts = read_prompts(batch, 0, width, mask, prompt_lengths)
        selection = self.planner.select(names, prompts, positions)
        if seen and prompt_lengths is None and not nested():
            self.runtime.told.carried(selection.owners)
        return GenerateScope(names, selection, seen, ids)

    def generate(self, scope: GenerateScope, columns: Columns, compiled: bool = False) -> BatchPlan | None:
        """The plan of one of generate's own forwards.

        compiled: whether a decode step may be compiled code, which reads a workspace in the plan's place.
        """
        selection, (start, length, batch, _) = scope.selection, columns
        if length != 1 or (selection is not None and start < selection.width):
            return self.idle(batch * length) if selection is None else self._plan(selection, columns)
        # Decode steps are all alike: made once, and again only if adapters, the backend or (where positions
        # count generated tokens or ask for ids) the edited rows change.
        key = (batch, self.runtime.store.version, ops.chosen_backend(), _asked(selection, columns))
        if scope.decode is None or scope.decode[0] != key:
            plan = self.idle(batch) if selection is None else self._plan(selection, columns)
            scope.decode = (key, plan)
        plan = scope.decode[1]
        if compiled and plan is not None and (plan.workspace is None or not plan.workspace.holds(plan)):
            plan.workspace = self.workspaces.of(plan)
            if plan.workspace is not None:
                self.sites.lay_out(plan.workspace)
        return plan


def _batch_of(call: dict[str, Any]) -> _Batch | None:
    """The tensor that says how many rows and columns a forward has; None where there is none."""
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        tokens = call.get(name)
        if tokens is not None:
            return _Batch(tokens, *tokens.shape[:2]) if isinstance(tokens, Tensor) else None
    return None


def _is_step(call: dict[str, Any], batch: _Batch) -> bool:
    """Whether a forward has one token of each row, none of them padding."""
    if batch.length != 1:
        return False
    mask = call.get("attention_mask")
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.shape[:-1] == (batch.size,) and bool(mask[:, -1].all())


def ids_of(call: dict[str, Any]) -> np.ndarray:
    """The token ids of a forward, [batch, length]: from a GPU they are waited for.

    Raises ValueError where it has embeddings instead.
    """
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor) or call.get("inputs_embeds") is not None:
        raise ValueError("input_ids: needed by adapters with positions by token id; the call has none")
    return ids.detach().cpu().numpy()


def _asked(selection: Selection | None, columns: Columns) -> tuple[bytes, bytes] | None:
    """What a decode step edits, where it is not what all of them do."""
    if selection is None or not selection.asked:
        return None
    start, length, batch, ids = columns
    found = selection.window(start, length, batch // selection.batch, ids)
    return None if found is None else (found.rows.tobytes(), found.counts.tobytes())


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
