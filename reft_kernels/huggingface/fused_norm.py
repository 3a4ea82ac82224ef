"""The norm that reads a block's output, fused with the edit of that output.

The next block's first norm must read all of h anyhow, so one launch writes both the edited rows and the
norm of every row. The block offers the norm's result, and the norm takes it. That h is the very tensor that
the launch saw is checked each time, and a fusion whose result nobody took is abandoned: what the model
computes never depends on a guess about its structure.

On a CPU with the native backend the same kernel computes the other norms of the stack as well, alone: one
call in place of six to eight. A row's norm has the same bits either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..batch import BatchPlan
from ..batch.batch_plan import unedited
from ..batch.edit import apply_
from ..batch.tables import SiteTable
from ..batch.workspace import Blank, no_pool_rows
from ..ops import Norm, launch
from ..ops.reference import normed
from .blocks import Blocks
from .standin import StandIn

#: What the norms of model families are, in the order in which they are tried.
_KINDS = (Norm.RMS | Norm.ROUND, Norm.RMS, Norm.PLUS_ONE, Norm.CENTRED)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedNorms:
    """The fused norms of one model, and the result that is on its way from a block to its norm.

    by_layer: layer → the norm that reads its output. devices: where they are; while there are any, no
    forward is idle. runtime: of the model. alone: norms that read something else.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.alone: list[NormForward] = []
        self.by_layer: dict[int, NextNorm] = {}
        self.devices: list[torch.device] = []
        self._offered: tuple[Tensor, Tensor, NextNorm] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_offered": None}

    def use(self, norms: dict[int, NextNorm], alone: list[NormForward]) -> None:
        self.by_layer, self.alone = norms, alone
        stand_ins = [*(norm.stand_in for norm in norms.values()), *alone]
        self.devices = list(dict.fromkeys(one.weights["weight"].device for one in stand_ins))

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
    """The norm's forward: takes the result that was offered for this very tensor, or computes it.

    how: the kind and eps, for the kernel. weights: the module's parameters, whatever they are by then.
    """

    def __init__(self, module: nn.Module, fused: FusedNorms, kind: int, eps: float) -> None:
        super().__init__(module)
        self.fused, self.runtime, self.how = fused, fused.runtime, (kind, eps)
        self.weights: dict[str, Any] = module._parameters
        self.nothing: Blank | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            result = None
            if self.fused._offered is not None:
                result = self.fused.take(self, args[0])
            # What is compiled is fused by the compiler.
            if result is None and not torch.compiler.is_compiling():
                result = self._alone(args[0])
            if result is not None:
                return result
        return self.original(*args, **kwargs)

    def _alone(self, x: Any) -> Tensor | None:
        """The norm of x [..., d] by the kernel, inside a forward of the model; None where that can't be."""
        plan, weight, bias = self.runtime.plan, self.weights["weight"], self.weights.get("bias")
        if (
            plan is None
            or type(x) is not Tensor
            or x.device.type != "cpu"
            or x.dtype not in _DTYPES
            or (plan.backends.get(x.device) or ops.current_backend(x.device)) != "native"
            or self.module.training
            or torch.is_grad_enabled()
            or torch._C._is_any_autocast_enabled()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or not x.is_contiguous()
            or not x.numel()
        ):
            return None
        for one in (weight,) if bias is None else (weight, bias):
            if one.shape != x.shape[-1:] or one.dtype is not x.dtype or one.device != x.device:
                return None
        rows = unedited(x.numel() // x.shape[-1], x.device)
        pool, spans = self.without_edit(x)
        kind, eps = self.how
        return ops.INTERVENE_NORM_["native"](x, *pool, rows.rows, rows.tiles, spans, weight, bias, eps, kind)

    def without_edit(self, h: Tensor) -> Blank:
        """Pool rows and spans for hidden states that nobody edits."""
        nothing = self.nothing
        if nothing is None or nothing[1].device != h.device or nothing[0].down.dtype is not h.dtype:
            nothing = self.nothing = no_pool_rows(h.shape[-1], h.dtype, h.device)
        return nothing


class NextNorm:
    """The norm that reads the output of `block`.

    reader: stands for the block whose norm it is (None: the norm of the whole stack). given_up: nobody
    took its result.
    """

    def __init__(self, block: nn.Module, norm: nn.Module, kind: Norm, eps: float, fused: FusedNorms) -> None:
        self.block, self.norm, self.kind, self.eps = block, norm, int(kind), eps
        self.parameters: dict[str, Any] = norm._parameters
        self.stand_in = stand_in_of(norm, kind, eps, fused)
        self.reader: Any = None
        self.given_up = False

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


def stand_in_of(norm: nn.Module, kind: Norm, eps: float, fused: FusedNorms) -> NormForward:
    return launch.shortened(NormForward, "norm")(norm, fused, int(kind), eps)


def edit_and_norm(h: Tensor, site: SiteTable | None, plan: BatchPlan, norm: NextNorm) -> Tensor:
    """Applies the plan to h [..., d] in place (site: None where nothing is edited), and returns h's norm."""
    device = h.device
    backend = plan.backends.get(device) or ops.current_backend(device)
    if site is not None and plan.stale:
        plan.renew()
    if site is not None and not site.low_rank:  # edited first, and then normed
        apply_(h, site, plan.rows[site.slot], backend)
        site = None
    if site is None:
        pool, spans = norm.stand_in.without_edit(h)
    else:
        pool, spans = site.pool.rows, site.spans
    rows = plan.covers.get((device, site is not None)) or plan.covering(device, site is not None)
    parameters = norm.parameters
    return ops.INTERVENE_NORM_[backend](
        h, *pool, rows.rows, rows.tiles, spans,
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
        # As the model calls it: a norm over channels would take the second dimension.
        cut = torch.func.functional_call(norm, instead, (x.view(3, 4, width),))
    except Exception:  # whatever it is, it does not run on rows of this width
        return None
    if not isinstance(want, Tensor) or want.dtype is not x.dtype or want.shape != x.shape:
        return None
    step = torch.finfo(x.dtype).eps
    if cut.shape != (3, 4, width):
        return None
    if not torch.allclose(cut.reshape(12, width), want, rtol=8 * step, atol=8 * step):
        return None
    scale = want.double().abs().clamp_min(want.double().square().mean().sqrt())
    errors = []
    for kind in _KINDS:
        got = normed(x, instead["weight"], instead.get("bias"), eps, kind)
        errors.append(float(((got.double() - want.double()).abs() / scale).max()))
    best = min(range(len(_KINDS)), key=errors.__getitem__)
    # Two roundings to h's dtype may differ from the module's own, and in float32 the order of its sums.
    return _KINDS[best] if errors[best] <= (8 if x.dtype is torch.float32 else 2) * step else None


class Kinds:
    """Kinds of norms; of those that are alike only one is run."""

    def __init__(self) -> None:
        self._known: dict[tuple, Norm | None] = {}

    def of(self, norm: nn.Module) -> tuple[Norm, float] | None:
        weight, eps = _weight(norm), _eps_of(norm)
        own = norm if "forward" in norm.__dict__ else None  # somebody wrapped this one
        key = (type(norm), weight.dtype, weight.device, weight.shape, eps, own)
        if key not in self._known:
            self._known[key] = kind_of(norm)
        kind = self._known[key]
        return None if kind is None or eps is None else (kind, eps)


def other_norms(
    blocks: Blocks, fused: FusedNorms, norms: dict[int, NextNorm], kinds: Kinds
) -> list[NormForward]:
    """Stand-ins for the stack's other norms on the CPU, whatever they read."""
    taken = {norm.norm for norm in norms.values()}
    found: list[NormForward] = []
    for module in blocks.stack.modules():
        weight = module._parameters.get("weight")
        if (
            module in taken
            or weight is None
            or weight.dim() != 1
            or weight.device.type != "cpu"
            or not {name for name, _ in module.named_parameters()} <= {"weight", "bias"}
            or next(module.buffers(), None) is not None
            or hasattr(module, "_hf_hook")
            or _eps_of(module) is None
        ):
            continue
        how = kinds.of(module)
        if how is not None:
            found.append(stand_in_of(module, *how, fused))
    return found


def next_norms(blocks: Blocks, fused: FusedNorms, kinds: Kinds) -> dict[int, NextNorm]:
    """Layer → the norm that reads its output, for all that could be fused."""
    found: dict[int, NextNorm] = {}
    for layer, block in enumerate(blocks.layers):
        reader = blocks.layers[layer + 1] if layer + 1 < len(blocks.layers) else blocks.stack
        norm = _first_norm(reader, blocks.width)
        if norm is None or any(hasattr(module, "_hf_hook") for module in (block, reader, norm)):
            continue
        how = kinds.of(norm)
        if how is not None:
            found[layer] = NextNorm(block, norm, *how, fused)
    return found
