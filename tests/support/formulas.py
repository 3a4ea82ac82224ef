"""Every method's formula, written out as in its source, and parameters for it. Nothing of ours but names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reft_kernels.adapter.method import METHODS
from reft_kernels.ops.schema import NO_PRODUCT, Act

#: Options under which a method's formula is another one.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sae": [{"mode": "clamp"}, {"mode": "minimum"}],
    "concept": [{"mode": "clamp"}, {"mode": "add"}, {"mode": "replace"}, {"mode": "threshold"}],
    "vector": [{"mode": "add"}, {"mode": "piecewise"}],
}


def parameters(
    method: str,
    r: int,
    d: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Random ones, all that the method has under these options."""
    generator = torch.Generator().manual_seed(seed)
    spec = METHODS[method]
    resolved = spec.resolve(options)
    made: dict[str, Tensor] = {}
    for name in spec.shapes:
        if method == "concept" and name in spec.optional and not spec.has(name, resolved):
            continue
        made[name] = torch.randn(spec.shape(name, r, d), generator=generator, dtype=torch.float64).to(dtype)
    if method == "sae":
        made["target"].abs_()
    if "kind" in made:
        codes = [Act.NONE, Act.GELU, NO_PRODUCT | Act.TANH]
        made["kind"] = torch.tensor([codes[row % 3] for row in range(r)], dtype=torch.int32)
    return made


def _ablation(p: Mapping[str, Tensor], h: Tensor) -> Tensor:
    """Direction after direction, each made orthogonal to those before it (Gram and Schmidt)."""
    out, basis = h, []
    for v, alpha, add in zip(p["v"], p["alpha"], p.get("add", torch.zeros_like(p["alpha"]))):
        u = v
        for before in basis:
            u = u - (u @ before) * before
        u = u / u.norm()
        basis.append(u)
        out = out - alpha * (h @ u)[:, None] * u + add * v
    return out


def _sae(p: Mapping[str, Tensor], h: Tensor, mode: str) -> Tensor:
    z = h @ p["w_enc"].T + p["b_enc"]
    a = torch.relu(z) * (z > p["threshold"]) if "threshold" in p else torch.relu(z)  # JumpReLU
    wanted = p["target"] if mode == "clamp" else torch.maximum(a, p["target"])
    return h + (wanted - a) @ p["w_dec"]


def _concept(p: Mapping[str, Tensor], h: Tensor, mode: str) -> Tensor:
    out = h
    for row, w in enumerate(p["w"]):
        along = (h @ w)[:, None]
        if mode == "replace":
            out = out + along / (w @ w) * (p["other"][row] - w)
        elif mode == "threshold":
            out = out + torch.where(along < p["value"][row], p["value"][row], 0.0) * w
        else:
            out = out + p["value"][row] * w
            out = out - torch.relu(along) * w if mode == "clamp" else out
    return out


def written_out(
    method: str,
    p: Mapping[str, Tensor],
    act: Callable[[Tensor], Tensor],
    h: Tensor,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """h [n, d] edited."""
    mode = (options or {}).get("mode", "clamp")
    if method == "loreft":
        return h + (act(h @ p["W"].T + p["b"]) - h @ p["R"].T) @ p["R"]
    if method == "noreft":
        return h + (act(h @ p["W1"].T + p["b1"]) - (h @ p["W2"].T + p.get("b2", 0))) @ p["W2"]
    if method == "consreft":
        return h + (p["b"] - h @ p["R"].T) @ p["R"]
    if method == "lobireft":
        return h + p["b"] @ p["R"]
    if method == "direft":
        return h + act(h @ p["W"].T + p["b"]) @ p["R"]
    if method == "nodireft":
        return h + act(h @ p["W1"].T + p["b1"]) @ p["W2"]
    if method == "vector":
        signs = torch.sign(h @ p["v"].T) if mode == "piecewise" else torch.ones(len(h), len(p["v"])).to(h)
        return h + sum(c * sign[:, None] * v for c, v, sign in zip(p["coefficient"], p["v"], signs.T))
    if method == "lofit":
        return h + p["v"].sum(0)
    if method == "ablation":
        return _ablation(p, h)
    if method == "sae":
        return _sae(p, h, mode)
    if method == "concept":
        return _concept(p, h, mode)
    if method == "red":
        return h + sum((s * h + b) - h for s, b in zip(p["scaling"], p["bias"]))
    if method == "jola":
        gates = [torch.clamp(torch.sigmoid(p[f"log_g{i}"]) * (1.1 - -0.1) + -0.1, 0, 1) for i in (1, 2)]
        return h + sum(g2 * A * h + g1 * v for A, v, g1, g2 in zip(p["A"], p["v"], *gates))
    if method == "folded_scale":
        return h + sum(less * h + v for less, v in zip(p["scale_less_one"], p["shift"]))
    if method == "adapter":
        return h + act(h @ p["W_down"].T + p.get("b_down", 0)) @ p["W_up"] + p.get("b_up", 0)
    raise NotImplementedError(method)
