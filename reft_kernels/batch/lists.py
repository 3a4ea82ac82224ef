"""Positions in the call: for each row the tokens that its adapter edits, in place of its own spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .names import POSITIONS
from .prompts import Prompts

if TYPE_CHECKING:
    from ..adapter import Adapter

#: For a row, and each position group of its adapter, the columns that are edited: int64, distinct.
Lists = dict[int, tuple[np.ndarray, ...]]


def read_lists(
    given: Any,
    names: Sequence[str | None],
    prompts: Prompts,
    adapter_of: Callable[[str], Adapter],
) -> Lists:
    """The lists of a call's `reft_positions`.

    Args:
        given: a list with one entry a row: None for what the adapter itself says, or indices of the row's
            tokens (padding doesn't count; negative ones count from the prompt's end). Or pyreft's
            `unit_locations`, as a dict or the list in it: [interventions][rows][columns of the padded
            batch], the interventions in the adapter's order, or one for all; None for what it says itself.
        names: one a row, None for the bare model.
        prompts: of the batch.
        adapter_of: the adapter of a name.

    Raises ValueError that names the row and what is allowed.
    """
    listed = _of_pyreft(given) if isinstance(given, Mapping) else _plain(given)
    if listed is None:
        return {}
    if not isinstance(listed, list):
        _refuse(f"must be a list with one entry a row, or pyreft's unit_locations; was {given!r}")
    if any(isinstance(one, list) and any(isinstance(row, list) for row in one) for one in listed):
        return _by_intervention(listed, names, prompts, adapter_of)
    if len(listed) != len(names):
        _refuse(f"has {len(listed)} entries for a batch of {len(names)} rows")
    found: Lists = {}
    for row, entry in enumerate(listed):
        if entry is None:
            continue
        indices = _integers(entry, f"row {row}")
        adapter = _adapter(row, names, adapter_of, bool(indices))
        if adapter is None:
            continue
        if len(adapter.groups) > 1:
            _refuse(
                f"row {row}: adapter {names[row]!r} has parameters of their own for "
                f"{', '.join(map(str, adapter.groups))}; say which edits what, by a list for each of its "
                f"{len(adapter.interventions)} interventions ([interventions][rows][columns], as in pyreft)"
            )
        index = np.array(indices, dtype=np.int64)
        index = np.unique(np.where(index < 0, index + prompts.lengths[row], index))
        wrong = (index < 0) | (index >= prompts.tokens[row])
        if wrong.any():
            _refuse(f"row {row} has {prompts.tokens[row]} tokens, and {indices} has an index outside them")
        found[row] = (prompts.column(np.full(len(index), row), index),)
    return found


def _refuse(why: str) -> Any:
    raise ValueError(f"{POSITIONS}: {why}")


def _plain(value: Any) -> Any:
    """Tensors, arrays and tuples as lists."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _of_pyreft(given: Mapping[str, Any]) -> Any:
    """What stands for the base in a dict of unit_locations."""
    if list(given) == ["base"]:
        return _plain(given["base"])
    value: Any = given.get("sources->base")
    if len(given) != 1 or not isinstance(value, list | tuple) or len(value) != 2 or value[0] is not None:
        _refuse(
            "of pyreft's unit_locations only {'sources->base': (None, locations)} and {'base': locations} "
            f"are known, was {given!r}"
        )
    return _plain(value[1])


def _integers(entry: Any, where: str) -> list[int]:
    if not isinstance(entry, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in entry):
        _refuse(f"{where}: must be None or a list of integers, was {entry!r}")
    return entry


def _adapter(
    row: int, names: Sequence[str | None], adapter_of: Callable[[str], Adapter], wanted: bool
) -> Adapter | None:
    name = names[row]
    if name is None and wanted:
        _refuse(f"row {row} runs the bare model, and takes no positions")
    return None if name is None else adapter_of(name)


def _by_intervention(
    listed: list, names: Sequence[str | None], prompts: Prompts, adapter_of: Callable[[str], Adapter]
) -> Lists:
    """pyreft's form. Columns of padding are dropped, as an edit there is seen by nobody."""
    for number, one in enumerate(listed):
        if not isinstance(one, list) or len(one) != len(names):
            _refuse(f"intervention {number}: must have one list a row, {len(names)}; was {one!r}")
    found: Lists = {}
    for row in range(len(names)):
        mine = [_integers(one[row], f"intervention {i}, row {row}") for i, one in enumerate(listed)]
        adapter = _adapter(row, names, adapter_of, any(mine))
        if adapter is None:
            continue
        count = len(adapter.interventions)
        if len(mine) not in (1, count):
            _refuse(
                f"has lists for {len(mine)} interventions; adapter {names[row]!r} of row {row} has {count}"
            )
        by_group: list[list[int] | None] = [None] * len(adapter.groups)
        for one, columns in zip(adapter.interventions, mine * (count if len(mine) == 1 else 1)):
            kept = sorted(set(columns))
            before = by_group[one.group]
            if before is not None and before != kept:
                _refuse(
                    f"row {row}: the interventions of adapter {names[row]!r} for {adapter.groups[one.group]} "
                    f"must be given the same tokens, were given {before} and {kept}"
                )
            by_group[one.group] = kept
        taken = [column for columns in by_group for column in columns or ()]
        if len(set(taken)) < len(taken):
            _refuse(f"row {row}: two interventions of adapter {names[row]!r} would edit the same token")
        own = prompts.column(np.full(prompts.tokens[row], row), np.arange(prompts.tokens[row]))
        low, high = min(taken, default=0), max(taken, default=0)
        if low < 0 or high >= max(prompts.width, len(own)):
            _refuse(f"row {row} has no column {low if low < 0 else high}")
        arrays = [np.array(columns or [], dtype=np.int64) for columns in by_group]
        found[row] = tuple(columns[np.isin(columns, own)] for columns in arrays)
    return found
