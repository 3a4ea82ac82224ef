"""What RED's code saves (github.com/mlwu22/RED): delta_vector.pth, a dict of tensors by module path.

`<module path>.delta_vector.activation_scaling` and `.activation_bias`, [1, d] each; there is no config. The
file is a pickle and is read with torch's weights-only unpickler, which runs no code from it. BREP writes the
same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..positions import Positions
from .errors import CheckpointError, read_state
from .records import AdapterRecord, InterventionRecord

WEIGHTS = "delta_vector.pth"

_KEY = re.compile(r"(?P<path>.+)\.delta_vector\.(?P<name>\w+)")
_PARAMETERS = {"activation_scaling": "scaling", "activation_bias": "bias"}

#: A module inside a numbered layer, and nothing else that has a number.
_PATH = re.compile(r"(?:[A-Za-z_]\w*\.)+(?P<layer>\d+)\.(?P<inner>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
#: The linear layers that it edits the output of, where that has a name as a site.
_SITES = {
    "mlp.down_proj": "mlp_dense_output",
    "mlp.c_proj": "mlp_dense_output",
    "output.dense": "mlp_dense_output",
    "attention.output.dense": "attention_dense_output",
    "attention.self.query": "query_output",
    "attention.self.key": "key_output",
    "attention.self.value": "value_output",
}


def read(folder: Path, positions: str | Sequence[int] | Positions | None, **unused: Any) -> AdapterRecord:
    """Reads a folder that holds a delta_vector.pth.

    Args:
        positions: which tokens: RED edits "all"; BREP the prompt and the first generated ones.
        unused: what a folder of pyreft's takes beside them; anything but None is refused.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    file = folder / WEIGHTS
    for name, value in unused.items():
        if value is not None:
            raise CheckpointError(f"{name}: {file} is of RED, which has none; was {value!r}")
    if positions is None:
        raise CheckpointError(
            f'positions: needed for {file}, which does not store them; RED edits all tokens: positions="all"'
        )
    parsed = Positions.parse(positions)
    by_path: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in read_state(file).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{file}: {key!r} is no key of RED's, <module>.delta_vector.activation_…")
        if match["name"] not in _PARAMETERS:
            raise CheckpointError(f"{file}: {key!r} is not supported; {', '.join(_PARAMETERS)} are")
        by_path[match["path"]][_PARAMETERS[match["name"]]] = tensor
    if not by_path:
        raise CheckpointError(f"{file}: holds no edit")
    found = tuple(_record(file, path, tensors, parsed) for path, tensors in by_path.items())
    return AdapterRecord(
        interventions=tuple(sorted(found, key=lambda one: (one.layer, one.site))),
        width=found[0].tensors["scaling"].shape[1],
        where=str(file),
    )


def _record(file: Path, path: str, tensors: dict[str, Tensor], positions: Positions) -> InterventionRecord:
    match = _PATH.fullmatch(path)
    if match is None:
        raise CheckpointError(
            f"{file}: {path!r} is not supported: it must be a module in a numbered layer, such as "
            "'model.layers.0.mlp.down_proj' (encoder-decoder models have two stacks of them)"
        )
    shift = tensors.get("bias")
    if "scaling" not in tensors:  # trained without
        assert shift is not None
        tensors = {"scaling": torch.ones_like(shift), "bias": shift}
    shapes = [list(tensor.shape) for tensor in tensors.values()]
    if any(len(shape) != 2 or shape[0] != 1 or shape != shapes[0] for shape in shapes):
        raise CheckpointError(f"{file}: {path!r} must have tensors [1, d] of one width, has {shapes}")
    inner = match["inner"]
    return InterventionRecord(
        method="red",
        layer=int(match["layer"]),
        site=_SITES.get(inner, f"*.{inner}.output"),
        positions=positions,
        rank=1,
        tensors=tensors,
        where=f"{file}: {path}",
    )
