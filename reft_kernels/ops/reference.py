"""The reference backend: plain torch in float64 (float32 where a device has no float64).

It is what every other backend is tested against, and it runs anywhere. It reads the plan back to the
host, so on a GPU it synchronizes: use it to check, not to serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .arguments import Plan, PoolRows
from .checks import check_addend
from .schema import ACT_MASK, NO_PRODUCT, Act, Norm, implement

_SLOPE = 0.01
_QUICK = 1.702


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(_QUICK * z)


def _quick_gelu_slope(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(_QUICK * z)
    return sigmoid * (1 + _QUICK * z * (1 - sigmoid))


_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    Act.NONE: lambda z: z,
    Act.RELU: torch.relu,
    Act.GELU: torch.nn.functional.gelu,
    Act.GELU_TANH: lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    Act.SILU: torch.nn.functional.silu,
    Act.SIGMOID: torch.sigmoid,
    Act.TANH: torch.tanh,
    Act.QUICK_GELU: _quick_gelu,
    Act.LEAKY_RELU: lambda z: torch.nn.functional.leaky_relu(z, _SLOPE),
    Act.STEP: lambda z: (z > 0).to(z.dtype),
}

# Written out rather than taken by autograd, which does not work inside an op under a dispatch mode.
_SLOPES: dict[int, Callable[[Tensor], Tensor]] = {
    Act.RELU: lambda z: (z > 0).to(z.dtype),
    Act.GELU: lambda z: torch.ops.aten.gelu_backward(torch.ones_like(z), z),
    Act.GELU_TANH: lambda z: torch.ops.aten.gelu_backward(torch.ones_like(z), z, approximate="tanh"),
    Act.SILU: lambda z: torch.ops.aten.silu_backward(torch.ones_like(z), z),
    Act.SIGMOID: lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
    Act.TANH: lambda z: 1 - torch.tanh(z).square(),
    Act.QUICK_GELU: _quick_gelu_slope,
    Act.LEAKY_RELU: lambda z: torch.ones_like(z).masked_fill(z <= 0, _SLOPE),
    Act.STEP: torch.zeros_like,
}


def activate(z: Tensor, kind: Tensor) -> Tensor:
    """φ(z), column by column: z [m, r], kind [r]."""
    out = z
    for code in torch.unique(kind & ACT_MASK).tolist():
        if code != Act.NONE:
            out = torch.where((kind & ACT_MASK) == code, _ACTIVATIONS[code](z), out)
    return out


def activation_slope(z: Tensor, kind: Tensor) -> Tensor:
    """φ′(z), column by column."""
    out = torch.ones_like(z)
    for code in torch.unique(kind & ACT_MASK).tolist():
        if code != Act.NONE:
            out = torch.where((kind & ACT_MASK) == code, _SLOPES[code](z), out)
    return out


def wide(t: Tensor) -> torch.dtype:
    """The dtype that sums are taken in."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def _segments(plan: Plan) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """(indices into the plan's rows, indices into h's rows, pool range) of every segment with work."""
    rows, table = plan.rows, plan.spans.tolist()
    grouped: dict[int, list[Tensor]] = {}
    for segment, start, count in plan.tiles.tolist():
        if count > 0 and segment >= 0 and table[segment][1] > 0:
            places = torch.arange(start, start + count, device=rows.device)
            grouped.setdefault(segment, []).append(places)
    for segment, places_of_tiles in grouped.items():
        places = torch.cat(places_of_tiles)
        places = places[rows[places] >= 0]
        if places.numel():
            first, rank = table[segment]
            yield places, rows[places].long(), slice(first, first + rank)


def _pre_activation(x: Tensor, down: Tensor, bias: Tensor, kind: Tensor) -> Tensor:
    bare = (kind & NO_PRODUCT) != 0
    return torch.where(bare, bias, x @ down.masked_fill(bare[:, None], 0).T + bias)


def _of_span(source: Tensor, z: Tensor) -> Tensor:
    """The part of a source [m, s] that belongs to z [m, r]."""
    rank = z.shape[1]
    if source.shape[1] < rank:
        raise ValueError(f"source: must have a column for each of {rank} pool rows, has {source.shape[1]}")
    return source[:, :rank].to(z.dtype)


def _edited(flat: Tensor, index: Tensor, pool: PoolRows, span: slice, source: Tensor | None) -> Tensor:
    down, up, bias, kind = pool
    dtype = wide(flat)
    x = flat[index].to(dtype)
    z = _pre_activation(x, down[span].to(dtype), bias[span].to(dtype), kind[span])
    if source is not None:
        z = z + _of_span(source, z)
    return (x + activate(z, kind[span]) @ up[span].to(dtype)).to(flat.dtype)


def edit_rows(h: Tensor, pool: PoolRows, plan: Plan, source: Tensor | None = None) -> None:
    """`intervene_`, and `source.intervene_source_` with a source [n, s]."""
    flat = h.view(-1, h.shape[-1])
    edits = [
        (index, _edited(flat, index, pool, span, None if source is None else source[places]))
        for places, index, span in _segments(plan)
    ]
    for index, value in edits:
        flat[index] = value


def intervene_(h: Tensor, pool: PoolRows, plan: Plan) -> None:
    edit_rows(h, pool, plan)


def intervene_sum_(h: Tensor, addend: Tensor, pool: PoolRows, plan: Plan) -> None:
    check_addend(h, addend)
    flat, other = h.view(-1, h.shape[-1]), addend.view(-1, h.shape[-1])
    for _, index, _ in list(_segments(plan)):
        flat[index] += other[index]
        other[index] = 0
    intervene_(h, pool, plan)


def normed(x: Tensor, weight: Tensor, shift: Tensor | None, eps: float, norm: int) -> Tensor:
    """The norm of rows x [..., d], in x's dtype. See `schema.Norm`."""
    y = x.to(wide(x))
    if norm & Norm.CENTRED:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if norm & Norm.ROUND:
        y = y.to(x.dtype).to(y.dtype)
    scale = weight.to(y.dtype)
    y = y * (scale + 1 if norm & Norm.PLUS_ONE else scale)
    return (y if shift is None else y + shift.to(y.dtype)).to(x.dtype)


def intervene_norm_(
    h: Tensor, pool: PoolRows, plan: Plan, weight: Tensor, shift: Tensor | None, eps: float, norm: int
) -> Tensor:
    intervene_(h, pool, plan)
    return normed(h, weight, shift, eps, norm).contiguous()


def intervene(h: Tensor, pool: PoolRows, plan: Plan) -> Tensor:
    out = h.clone(memory_format=torch.contiguous_format)
    intervene_(out, pool, plan)
    return out


def intervene_backward(
    grad: Tensor, hs: Tensor, pool: PoolRows, plan: Plan, need_h: bool, need_pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dh, ddown, dup, dbias, _ = gradients(grad, hs, pool, plan, need_h, need_pool)
    return dh, ddown, dup, dbias


def gradients(
    grad: Tensor,
    hs: Tensor,
    pool: PoolRows,
    plan: Plan,
    need_h: bool,
    need_pool: bool,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dc = Σ p, dD = Σ p hᵀ, dU = Σ v gᵀ, dh = g + Dᵀ p, with v = φ(Dh + c) and p = φ′ ⊙ (U g).

    The last is p of each row, like `source`; no elements where there is none.
    """
    down, up, bias, kind = pool
    dsource = grad.new_empty(0) if source is None else torch.zeros_like(source)
    dtype = wide(grad)
    dh = grad.clone(memory_format=torch.contiguous_format) if need_h else grad.new_empty(0)
    if need_pool:
        ddown, dup, dbias = torch.zeros_like(down), torch.zeros_like(up), torch.zeros_like(bias)
    else:
        ddown, dup, dbias = down.new_empty(0), up.new_empty(0), bias.new_empty(0)
    flat = grad.reshape(-1, grad.shape[-1])
    out = dh.view(-1, grad.shape[-1])
    sums: dict[tuple[int, int], list[Tensor]] = {}
    for places, index, span in _segments(plan):
        g, x = flat[index].to(dtype), hs[places].to(dtype)
        d, u, c, k = down[span].to(dtype), up[span].to(dtype), bias[span].to(dtype), kind[span]
        d = d.masked_fill(((k & NO_PRODUCT) != 0)[:, None], 0)
        z = _pre_activation(x, d, c, k)
        if source is not None:
            z = z + _of_span(source[places], z)
        p = activation_slope(z, k) * (g @ u.T)
        if source is not None:
            dsource[places, : len(k)] = p.to(source.dtype)
        if need_h:
            out[index] = (g + p @ d).to(grad.dtype)
        if need_pool:
            bare = ((k & NO_PRODUCT) != 0)[:, None]
            parts = [(p.T @ x).masked_fill(bare, 0), activate(z, k).T @ g, p.sum(0)]
            # Segments may share a range (the same adapter at two position groups): add them up wide.
            key = (span.start, span.stop)
            sums[key] = [a + b for a, b in zip(sums[key], parts)] if key in sums else parts
    for (start, stop), (a, b, c) in sums.items():
        ddown[start:stop] += a.to(ddown.dtype)
        dup[start:stop] += b.to(dup.dtype)
        dbias[start:stop] += c.to(dbias.dtype)
    return dh, ddown, dup, dbias, dsource


implement(
    "reference",
    "CompositeExplicitAutograd",
    {
        "intervene_": intervene_,
        "intervene_sum_": intervene_sum_,
        "intervene_norm_": intervene_norm_,
        "intervene": intervene,
        "intervene_backward": intervene_backward,
    },
)
