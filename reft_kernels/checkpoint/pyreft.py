"""Folders that pyreft 0.1 saved: config.json beside one intkey_<key>.bin per intervention.

The files are pickles and are read with torch's weights-only unpickler, which runs no code from them.
They hold neither positions nor act_fn nor dropout, so the caller must say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..positions import LastPosition, Positions
from ..sites import REGISTRY
from .errors import CheckpointError, read_json, read_state, take
from .hub import adapters_below
from .records import AdapterRecord, InterventionRecord

#: pyvene's components that are sites here. (The head sites have another unit there than "pos".)
_SITES = tuple(site for site, kind in REGISTRY.items() if kind.layered and not kind.heads)

#: A component given as a path: anything, the layer's number, a module inside the layer, and the side.
_PATH = re.compile(r"[A-Za-z_][\w.]*\[(?P<layer>\d+)\](?P<inner>(?:\.[A-Za-z_]\w*)*)\.(?P<side>input|output)")
_INNER = {
    ("", "output"): "block_output",
    ("", "input"): "block_input",
    (".mlp", "output"): "mlp_output",
    (".self_attn", "output"): "attention_output",
    (".attn", "output"): "attention_output",
    (".attention", "output"): "attention_output",
}

_ROTATION = "rotate_layer.parametrizations.weight"
#: Buffers of pyvene's that say nothing about the edit.
_IGNORED = {"embed_dim", "interchange_dim"}


def _transposed(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    def take_out(state: dict[str, Tensor]) -> Tensor:
        tensor = state.pop(name)
        return tensor.T if tensor.dim() == 2 else tensor

    return take_out


def _plain(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda state: state.pop(name)


def _rotation(state: dict[str, Tensor]) -> Tensor:
    """R [r, d] from torch.nn.utils.parametrizations.orthogonal's state, as its forward computes it.

    original [d, r] holds Householder reflectors below its diagonal and signs on it (for d = r the exponent
    of a matrix exponential instead); base [d, d] is what the product is applied to.
    """
    original = state.pop(f"{_ROTATION}.original")
    base = state.pop(f"{_ROTATION}.0.base")
    if original.dim() != 2 or base.shape != original.shape[:1] * 2 or original.shape[0] < original.shape[1]:
        raise ValueError(
            f"{_ROTATION}: original must be [d, r] and base [d, d], were {list(original.shape)} "
            f"and {list(base.shape)}"
        )
    wide = torch.promote_types(original.dtype, torch.float32)
    x, base = original.to(wide), base.to(wide)
    if x.shape[0] == x.shape[1]:
        lower = x.tril()
        return (base @ torch.matrix_exp(lower - lower.mT)).T
    reflectors = x.tril(diagonal=-1)
    tau = 2.0 / (1.0 + (reflectors * reflectors).sum(dim=-2))
    product = torch.linalg.householder_product(reflectors, tau)
    # torch truncates the signs to integers, so a sign that weight decay shrank counts as 0 there, and here.
    return (base @ (product * x.diagonal().int())).T


class _Class(NamedTuple):
    """How a class of pyreft's is stored: our parameter → how to take it out of the state dict.

    The first of the parameters is [r, d]. takes_act_fn: whether the class's forward uses its act_fn.
    """

    method: str
    parameters: dict[str, Callable[[dict[str, Tensor]], Tensor]]
    optional: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {}
    unused: frozenset[str] = frozenset()
    takes_act_fn: bool = False


_W1 = {"W1": _plain("learned_source.weight"), "b1": _plain("learned_source.bias")}
_CLASSES = {
    "LoreftIntervention": _Class(
        "loreft",
        {"R": _transposed("rotate_layer"), "W": _plain("weight"), "b": _plain("bias")},
        takes_act_fn=True,
    ),
    "NoreftIntervention": _Class(
        "noreft",
        {**_W1, "W2": _plain("proj_layer.weight")},
        {"b2": _plain("proj_layer.bias")},
        takes_act_fn=True,
    ),
    "ConsreftIntervention": _Class("consreft", {"R": _rotation, "b": _plain("learned_source")}),
    "LobireftIntervention": _Class("lobireft", {"R": _rotation, "b": _plain("learned_source")}),
    "DireftIntervention": _Class(
        "direft",
        {"R": _rotation, "W": _plain("learned_source.weight"), "b": _plain("learned_source.bias")},
        takes_act_fn=True,
    ),
    # Its projection has a bias where add_bias was set, which its forward never uses.
    "NodireftIntervention": _Class(
        "nodireft",
        {**_W1, "W2": _plain("proj_layer.weight")},
        unused=frozenset({"proj_layer.bias"}),
        takes_act_fn=True,
    ),
}


class _Place(NamedTuple):
    """One representation of config.json."""

    key: str
    layer: int
    site: str
    kind: _Class


def read(
    folder: Path,
    *,
    positions: str | Sequence[int] | Positions | None,
    act_fn: str | None = None,
    dropout: float | None = None,
    last_position: LastPosition | None = None,
) -> AdapterRecord:
    """Reads a folder of pyreft's.

    Args:
        folder: holds config.json and intkey_*.bin.
        positions: what the adapter was trained with, for example "f3+l3". Where the folder has two
            interventions at a layer (pyreft's share_weights=False), the first takes the f, the second the
            l positions.
        act_fn, dropout: as given to the interventions in training.
        last_position: "length" or "length-1": what pyreft's data set counted l positions from.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    places = _places(folder)
    if positions is None:
        raise CheckpointError(
            f"positions: needed for {folder}, as pyreft does not store them; give those of the training, "
            'for example positions="f3+l3"'
        )
    parsed = Positions.parse(positions, last_position)
    parts = _parts(folder, places, parsed)
    if act_fn not in (None, "linear") and not any(place.kind.takes_act_fn for place in places):
        raise CheckpointError(f"act_fn: {places[0].kind.method} takes none, was {act_fn!r}")
    seen: Counter[tuple[str, int]] = Counter()
    found = []
    for place in places:
        file = folder / f"intkey_{place.key}.bin"
        tensors = _tensors(file, place.kind)
        part = parts[seen[place.site, place.layer]]
        seen[place.site, place.layer] += 1
        found.append(
            InterventionRecord(
                method=place.kind.method,
                layer=place.layer,
                site=place.site,
                positions=part,
                rank=next(iter(tensors.values())).shape[0],
                tensors=tensors,
                act_fn=act_fn if place.kind.takes_act_fn else None,
                dropout=dropout or 0.0,
                where=str(file),
            )
        )
    return AdapterRecord(
        interventions=tuple(found),
        width=next(iter(found[0].tensors.values())).shape[1],
        config=_config(found, parsed, tied=len(parts) == 1),
        where=str(folder),
    )


def _config(found: list[InterventionRecord], positions: Positions, tied: bool) -> dict[str, Any] | None:
    """The fields of the ReftConfig that describes all interventions, where one does."""
    if len({(one.method, one.rank, one.site) for one in found}) > 1:
        return None
    one = found[0]
    return {
        "method": one.method,
        "r": one.rank,
        "layers": list(dict.fromkeys(one.layer for one in found)),
        "site": one.site,
        "positions": positions.to_json(),
        "last_position": positions.last_position,
        "share_weights": tied and len(positions.untied()) > 1,
        "act_fn": one.act_fn,
        "dropout": one.dropout,
    }


def _places(folder: Path) -> list[_Place]:
    file = folder / "config.json"
    if not file.exists():
        if any(folder.glob("intkey_*.bin")):
            raise CheckpointError(
                f"{folder}: has pyreft's intkey_*.bin but no config.json, as a checkpoint of its trainer; "
                "copy the config.json of a folder that reft_model.save wrote with the same layers beside them"
            )
        inner = folder / "intervenable_model"
        hint = f"; {inner} may hold one" if inner.is_dir() else adapters_below(folder)
        raise CheckpointError(
            f"{folder}: holds no adapter (neither reft_config.json nor pyreft's config.json){hint}"
        )
    found = read_json(file)
    if "representations" not in found or "intervention_types" not in found:
        raise CheckpointError(
            f"{file}: is no config of pyreft's, which has the keys 'representations' and 'intervention_types'"
        )
    representations = take(str(file), found, "representations", list)
    types = take(str(file), found, "intervention_types", list)
    if not representations or len(types) != len(representations):
        raise CheckpointError(
            f"{file}: 'representations' ({len(representations)}) and 'intervention_types' ({len(types)}) "
            "must have one entry for each intervention, at least one"
        )
    collisions: Counter[str] = Counter()
    return [
        _place(f"{file}: representations[{i}]", one, str(kind), collisions)
        for i, (one, kind) in enumerate(zip(representations, types))
    ]


def _place(where: str, listed: Any, kind: str, collisions: Counter[str]) -> _Place:
    if not isinstance(listed, list) or len(listed) < 4:
        raise CheckpointError(f"{where}: must be a list of at least layer, component, unit, number of units")
    named = dict(zip(("layer", "component", "unit", "max_number_of_units"), listed))
    component, unit = take(where, named, "component", str), take(where, named, "unit", str)
    count = take(where, named, "max_number_of_units", int)
    name = re.split(r"[.']", kind.strip("<>'"))[-1]
    if name not in _CLASSES:
        raise CheckpointError(f"{where}: the class {kind!r} is not supported; {', '.join(_CLASSES)} are")
    if unit != "pos" or count != 1:
        raise CheckpointError(
            f"{where}: unit {unit!r} with {count} units at a time is not supported; 'pos' with 1 is"
        )
    layer, site = _site(where, component, named)
    # pyvene's own rule for the names of the files.
    stem = (
        f"comp_{component.replace('.', '_')}_unit_pos_nunit_1"
        if "." in component
        else f"layer_{layer}_comp_{component}_unit_pos_nunit_1"
    )
    key = f"{stem}#{collisions[stem]}"
    collisions[stem] += 1
    return _Place(key, layer, site, _CLASSES[name])


def _site(where: str, component: str, named: dict[str, Any]) -> tuple[int, str]:
    """Layer and site of a component, which is a name of pyvene's or a path of modules."""
    if component in _SITES:
        return take(where, named, "layer", int), component
    match = _PATH.fullmatch(re.sub(r"\.(\d+)(?=\.)", r"[\1]", component))
    if match:
        inner, side = match["inner"], match["side"]
        return int(match["layer"]), _INNER.get((inner, side), f"*{inner}.{side}")
    raise CheckpointError(
        f"{where}: the component {component!r} is not supported; {', '.join(_SITES)} are, and paths of the "
        "form …[layer].input, …[layer].module.output and the like"
    )


def _parts(folder: Path, places: list[_Place], positions: Positions) -> tuple[Positions, ...]:
    """The position specs of the first, second, … intervention of a layer."""
    counts = Counter((place.site, place.layer) for place in places)
    most, least = max(counts.values()), min(counts.values())
    if most == 1:
        return (positions,)
    if most != 2 or least != 2:
        raise CheckpointError(
            f"{folder}: has between {least} and {most} interventions at a layer; one each is supported, and "
            "two each (pyreft's share_weights=False)"
        )
    parts = positions.untied()
    if len(parts) != 2:
        raise CheckpointError(
            f"positions: {folder} has two interventions at each layer, the first for f and the second for l "
            f'positions, so give both, for example "f3+l3"; was {str(positions)!r}'
        )
    return parts


def _tensors(file: Path, kind: _Class) -> dict[str, Tensor]:
    if not file.exists():
        raise CheckpointError(f"{file}: is missing, though config.json names its intervention")
    state = read_state(file)
    try:
        tensors = {name: take_out(state) for name, take_out in kind.parameters.items()}
        for name, take_out in kind.optional.items():
            try:
                tensors[name] = take_out(state)
            except KeyError:
                pass
    except KeyError as error:
        raise CheckpointError(f"{file}: the key {error} is missing, which {kind.method} needs") from None
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    extra = sorted(set(state) - _IGNORED - kind.unused)
    if extra:
        raise CheckpointError(f"{file}: has keys that {kind.method} does not know: {', '.join(extra)}")
    first = next(iter(kind.parameters))
    if tensors[first].dim() != 2:
        raise CheckpointError(f"{file}: {first}: must be [r, d], was {list(tensors[first].shape)}")
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
