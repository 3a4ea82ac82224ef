"""The norm that reads a block's output, fused with the edit of that output.

The next block's first norm must read all of h anyhow, so one launch writes both the edited rows and the
norm of every row. The block offers the norm's result, and the norm takes it. That h is the very tensor that
the launch saw is checked each time, and a fusion whose result nobody took is abandoned: what the model
computes never depends on a guess about its structure.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..batch import BatchPlan
from ..batch.tables import SiteTable
from ..ops import Norm
from ..ops.reference import normed
from .blocks import Blocks
from .standin import StandIn

#: What the norms of model families are, in the order in which they are tried.
_KINDS = (Norm.RMS | Norm.ROUND, Norm.RMS, Norm.PLUS_ONE, Norm.CENTRED)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedNorms:
    """The fused norms of one model, and the result that is on its way from a block to its norm.

    by_layer: layer → the norm that reads its output. devices: where they are; while there are any, no
    forward is idle.
    """

    def __init__(self) -> None:
        self.by_layer: dict[int, NextNorm] = {}
        self.devices: list[torch.device] = []
        self._offered: tuple[Tensor, Tensor, NextNorm] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_offered": None}

    def use(self, norms: dict[int, NextNorm]) -> None:
        self.by_layer = norms
        self.devices = list(dict.fromkeys(norm.parameters["weight"].device for norm in norms.values()))

    @property
    def pending(self) -> bool:
        """Whether a result was offered that nobody took yet."""
        return self._offered is not None

    def offer(self, norm: NextNorm, h: Tensor, result: Tensor) -> None:
        """Leaves the norm of h for `norm` to take. What was offered before and not taken is abandoned."""
        self.abandon()
        self._offered = (h, result, norm)

    def take(self, stand_in: NormForward, h: Tensor) -> Tensor | None:
        """The result that was offered to this norm, if it is of this very tensor."""
        offered = self._offered
        if offered is None or offered[2].stand_in is not stand_in:
            return None
        self._offered = None
        return offered[1] if offered[0] is h else None

    def abandon(self) -> None:
        """Gives the fusion up for good whose result was offered and not taken."""
        if self._offered is not None:
            self._offered[2].given_up = True
            self._offered = None

    def forget(self) -> None:
        """Drops an offer without a verdict: the forward failed on its way."""
        self._offered = None


class NormForward(StandIn):
    """The norm's forward: takes the result that was offered for this very tensor, or computes it."""

    def __init__(self, module: nn.Module, fused: FusedNorms) -> None:
        super().__init__(module)
        self.fused = fused

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fused._offered is not None and len(args) == 1 and not kwargs:
            result = self.fused.take(self, args[0])
            if result is not None:
                return result
        return self.original(*args, **kwargs)


class NextNorm:
    """The norm that reads the output of `block`.

    reader: stands for the block whose norm it is (None: the norm of the whole stack). given_up: nobody
    took its result.
    """

    def __init__(self, block: nn.Module, norm: nn.Module, kind: Norm, eps: float, fused: FusedNorms) -> None:
        self.block, self.norm, self.kind, self.eps = block, norm, int(kind), eps
        self.parameters: dict[str, Any] = norm._parameters
        self.stand_in = NormForward(norm, fused)
        self.reader: Any = None
        self.given_up = False
        self.nothing: tuple[Tensor, ...] | None = None

    def gives(self, h: Tensor, training: bool) -> bool:
        """Whether the fused op gives this forward's norm: nothing that could change h comes in between.

        Of the module and the call alone, never of the batch.
        """
        return self.stands(training) and not torch.is_grad_enabled() and self.fits(h)

    def stands(self, training: bool) -> bool:
        """The part of `gives` that is of the modules."""
        norm, reader = self.norm, self.reader
        return (
            not self.given_up
            and not training
            and not self.block._forward_hooks
            and not norm._forward_pre_hooks
            and norm.__dict__.get("forward") is self.stand_in
            and (reader is None or not (reader.inputs or reader.module._forward_pre_hooks))
        )

    def fits(self, h: Tensor) -> bool:
        """The part of `gives` that is of the hidden states."""
        weight = self.parameters["weight"]
        return weight.dtype is h.dtype and weight.device == h.device and h.is_contiguous()

    def without_edit(self, h: Tensor) -> tuple[Tensor, ...]:
        """down, up, bias, kind and spans for a layer that nobody edits."""
        if self.nothing is None or self.nothing[0].dtype is not h.dtype or self.nothing[0].device != h.device:
            rows = h.new_empty(0, h.shape[-1])
            ints: dict[str, Any] = {"dtype": torch.int32, "device": h.device}
            bias = torch.empty(0, dtype=torch.float32, device=h.device)
            self.nothing = (rows, rows, bias, torch.empty(0, **ints), torch.empty(0, 2, **ints))
        return self.nothing


def edit_and_norm(h: Tensor, site: SiteTable | None, plan: BatchPlan, norm: NextNorm) -> Tensor:
    """Applies the plan to h [..., d] in place (site: None where nothing is edited), and returns h's norm."""
    device = h.device
    if site is None:
        down, up, bias, kind, spans = norm.without_edit(h)
    else:
        if plan.stale:
            plan.renew()
        pool, spans = site.pool, site.spans
        down, up, bias, kind = pool.down, pool.up, pool.bias, pool.kind
    rows = plan.covers.get((device, site is not None)) or plan.covering(device, site is not None)
    parameters = norm.parameters
    return ops.INTERVENE_NORM_[plan.backends.get(device) or ops.current_backend(device)](
        h, down, up, bias, kind, rows.rows, rows.tiles, spans,
        parameters["weight"], parameters.get("bias"), norm.eps, norm.kind,
    )  # fmt: skip


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


def next_norms(blocks: Blocks, fused: FusedNorms) -> dict[int, NextNorm]:
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
            found[layer] = NextNorm(block, norm, kind, eps, fused)
    return found
