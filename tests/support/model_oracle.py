"""What a patched model must compute, by other means: eager hooks in float64 on one unpadded row."""

from __future__ import annotations

import contextlib

import torch

import reft_kernels as rk

from . import position_oracle

_ACT = {
    None: lambda z: z,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}


def formula(intervention, h: torch.Tensor) -> torch.Tensor:
    """The paper's formulas, from the stored parameters; h [n, d] float64."""
    p = {name: tensor.detach().double() for name, tensor in intervention.named_parameters()}
    act = _ACT[intervention.act_fn]
    if intervention.method == "loreft":
        return h + (act(h @ p["W"].T + p["b"]) - h @ p["R"].T) @ p["R"]
    if intervention.method == "direft":
        return h + act(h @ p["W"].T + p["b"]) @ p["R"]
    if intervention.method == "red":
        return h * p["scaling"] + p["bias"]
    raise NotImplementedError(intervention.method)


def columns(positions: rk.Positions, prompt: int, total: int, ids: list[int] | None = None) -> list[int]:
    """Token indices that are edited in an unpadded row of `total` tokens, `prompt` of them prompt."""
    return position_oracle.edited(positions.to_json(), prompt, total, ids, positions.last_position)


@contextlib.contextmanager
def eager_hooks(model, adapter: rk.Adapter | None, prompt: int):
    """Edits the model's blocks by plain hooks that recompute everything without a cache."""
    seen: list[int] = []
    blocks = next(
        child
        for child in model.modules()
        if isinstance(child, torch.nn.ModuleList) and len(child) == model.config.num_hidden_layers
    )
    handles = []

    def hook_for(interventions):
        def hook(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            for intervention in interventions:
                index = columns(intervention.positions, prompt, h.shape[1], seen)
                h[:, index] = formula(intervention, h[:, index].double()).to(h.dtype)

        return hook

    for layer, block in enumerate(blocks):
        here = [i for i in (adapter.interventions if adapter is not None else []) if i.layer == layer]
        assert all(i.site == "block_output" for i in here)
        if here:
            handles.append(block.register_forward_hook(hook_for(here)))

    def note(module, args, kwargs):
        ids = args[0] if args else kwargs.get("input_ids")
        seen[:] = [] if ids is None else ids[0].tolist()

    if adapter is not None:
        handles.append(model.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def greedy(model, row: dict[str, torch.Tensor], adapter: rk.Adapter | None, steps: int):
    """Greedy tokens [steps] and the logits [steps, vocabulary] they were taken from, for one unpadded row."""
    ids = row["input_ids"]
    prompt = ids.shape[1]
    logits = []
    with eager_hooks(model, adapter, prompt):
        for _ in range(steps):
            out = model(input_ids=ids, use_cache=False).logits[:, -1]
            logits.append(out[0])
            ids = torch.cat([ids, out.argmax(-1, keepdim=True)], dim=1)
    return ids[0, prompt:], torch.stack(logits)


@torch.no_grad()
def forward(model, row: dict[str, torch.Tensor], adapter: rk.Adapter | None) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one unpadded row."""
    with eager_hooks(model, adapter, row["input_ids"].shape[1]):
        return model(input_ids=row["input_ids"], use_cache=False).logits[0]
