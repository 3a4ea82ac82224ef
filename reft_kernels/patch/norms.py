"""The norm that reads a block's output, fused with the edit of that output.

The next block's first norm must read all of h anyhow, so one launch writes both the edited rows and the
norm of every row; the norm then finds its result waiting. That h is the very tensor that the launch saw is
checked each time, and a fusion whose result nobody fetched is given up: what the model computes never
depends on a guess about its structure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Norm
from ..ops.reference import normed
from .blocks import Blocks
from .standin import StandIn
from .state import State

#: What the norms of model families are, in the order in which they are tried.
_KINDS = (Norm.RMS | Norm.ROUND, Norm.RMS, Norm.PLUS_ONE, Norm.CENTRED)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NormForward(StandIn):
    """The norm's forward: fetches the result that waits, if it is of this very tensor."""

    def __init__(self, module: nn.Module, state: State) -> None:
        super().__init__(module)
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        waiting = self.state.waiting
        if waiting is not None and len(args) == 1 and not kwargs and waiting[2].stand_in is self:
            self.state.waiting = None
            if waiting[0] is args[0]:
                return waiting[1]
        return self.original(*args, **kwargs)


class NextNorm:
    """The norm that reads the output of `block`.

    reader: stands for the block whose norm it is (None: the norm of the whole stack). given_up: nobody
    fetched its result.
    """

    def __init__(self, block: nn.Module, norm: nn.Module, kind: Norm, eps: float, state: State) -> None:
        self.block, self.norm, self.kind, self.eps = block, norm, int(kind), eps
        self.parameters: dict[str, Any] = norm._parameters
        self.stand_in = NormForward(norm, state)
        self.reader: Any = None
        self.state = state
        self.given_up = False
        self.nothing: tuple[Tensor, ...] | None = None

    def stands(self, h: Tensor, training: bool) -> bool:
        """Whether the fused op gives this forward's norm: nothing that could change h comes in between.

        Of the module and the call alone, never of the batch.
        """
        left = self.state.waiting
        if left is not None:
            left[2].given_up, self.state.waiting = True, None
        weight, norm, reader = self.parameters["weight"], self.norm, self.reader
        return (
            not self.given_up
            and not training
            and not torch.is_grad_enabled()
            and weight.dtype is h.dtype
            and weight.device == h.device
            and h.is_contiguous()
            and not self.block._forward_hooks
            and not norm._forward_pre_hooks
            and norm.__dict__.get("forward") is self.stand_in
            and (reader is None or not (reader.inputs or reader.module._forward_pre_hooks))
        )

    def without_edit(self, h: Tensor) -> tuple[Tensor, ...]:
        """down, up, bias, kind and spans for a layer that nobody edits."""
        if self.nothing is None or self.nothing[0].dtype is not h.dtype or self.nothing[0].device != h.device:
            rows = h.new_empty(0, h.shape[-1])
            ints: dict[str, Any] = {"dtype": torch.int32, "device": h.device}
            bias = torch.empty(0, dtype=torch.float32, device=h.device)
            self.nothing = (rows, rows, bias, torch.empty(0, **ints), torch.empty(0, 2, **ints))
        return self.nothing


def _weight(norm: nn.Module) -> Tensor:
    return norm._parameters["weight"]  # type: ignore[return-value]


def _first_norm(module: nn.Module, width: int) -> nn.Module | None:
    """The first child with a weight [width] and at most a bias of its own."""
    for child in module.children():
        names = {name for name, _ in child.named_parameters()}
        weight = child._parameters.get("weight")
        if names <= {"weight", "bias"} and weight is not None and weight.shape == (width,):
            return child
    return None


def _eps_of(norm: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return None


@torch.no_grad()
def kind_of(norm: nn.Module) -> Norm | None:
    """Which norm a module computes, found out by running it, or None where it is none of `Norm`.

    Run with random weights in place of its own (weights of 0 or 1 would not tell), on rows of ordinary
    size, tiny ones (where eps counts) and one with a massive activation.
    """
    weight, eps = _weight(norm), _eps_of(norm)
    if eps is None or weight.dtype not in _DTYPES or weight.device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    width = weight.shape[0]
    x = draw(12, width)
    x[4:8] *= 1e-3
    x[8:, 0] = 300
    instead = {name: draw(width) for name, _ in norm.named_parameters()}
    try:
        want = torch.func.functional_call(norm, instead, (x,))
    except Exception:  # whatever it is, it does not run on rows of this width
        return None
    if not isinstance(want, Tensor) or want.dtype is not x.dtype or want.shape != x.shape:
        return None
    step = torch.finfo(x.dtype).eps
    scale = want.double().abs().clamp_min(want.double().square().mean().sqrt())
    errors = []
    for kind in _KINDS:
        got = normed(x, instead["weight"], instead.get("bias"), eps, kind)
        errors.append(float(((got.double() - want.double()).abs() / scale).max()))
    best = min(range(len(_KINDS)), key=errors.__getitem__)
    # Two roundings to h's dtype may differ from the module's own, and in float32 the order of its sums.
    return _KINDS[best] if errors[best] <= (8 if x.dtype is torch.float32 else 2) * step else None


def next_norms(blocks: Blocks, state: State) -> dict[int, NextNorm]:
    """Layer → the norm that reads its output, for all that could be fused."""
    found: dict[int, NextNorm] = {}
    known: dict[tuple, Norm | None] = {}
    for layer, block in enumerate(blocks.layers):
        reader = blocks.layers[layer + 1] if layer + 1 < len(blocks.layers) else blocks.stack
        norm = _first_norm(reader, blocks.width)
        if norm is None or any(hasattr(module, "_hf_hook") for module in (block, reader, norm)):
            continue
        weight, eps = _weight(norm), _eps_of(norm)
        key = (type(norm), weight.dtype, weight.device, eps)
        if key not in known:
            known[key] = kind_of(norm)
        kind = known[key]
        if kind is not None and eps is not None:
            found[layer] = NextNorm(block, norm, kind, eps, state)
    return found
