"""What tests of many kinds of adapters do with a patched model: logits, tokens, compiled steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from support.models import batch_of

#: Of six prompts, padded on the left.
LENGTHS = [6, 5, 4, 6, 3, 2]


@torch.no_grad()
def logits(model: Any, names: Any, lengths: Sequence[int] = LENGTHS, **options: Any) -> Tensor:
    """Of one forward with an adapter a row (None: the active one). Fewer names take the first prompts."""
    batch = batch_of(list(lengths[: len(names or lengths)]))
    return model(**batch, adapter_names=names, **options).logits


def tokens(model: Any, names: Any, **options: Any) -> Tensor:
    """Of a greedy generate."""
    call = {**batch_of(LENGTHS), "max_new_tokens": 4, "do_sample": False, **options}
    return model.generate(**call, adapter_names=names)


def check_rows_are_as_among_their_like(model: Any, names: Sequence[Any]) -> Tensor:
    """Each row's logits are to the bit those that it has where all rows take what it takes."""
    found = logits(model, names)
    for row, name in enumerate(names):
        assert torch.equal(found[row], logits(model, [name] * len(names))[row]), name
    return found


def recorded_steps() -> tuple[dict[str, Any], list[Any]]:
    """Arguments with which generate compiles whole decode steps, and the list that their graphs come to."""
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module

    config = CompileConfig(fullgraph=True, mode=None, backend=backend)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}, graphs
