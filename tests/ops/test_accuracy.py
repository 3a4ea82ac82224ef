"""Promise: over many draws, the RMS error is at most 1.1x that of the unfused sequence in the same dtypes."""

from __future__ import annotations

import pytest
import torch
from support.cases import interpreted

from reft_kernels.ops import INTERVENE_
from reft_kernels.plan import one_segment


def _errors(backend: str, device: str, dtype: torch.dtype, d: int, r: int, seed: int) -> tuple[float, float]:
    """Sums of squared errors against float64: of the op, and of h + (h Dᵀ + c) U."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    count = 24
    h = normal(count, d).to(device, dtype)
    up = torch.linalg.qr(normal(d, r)).Q.T.contiguous().to(device, dtype)
    down = (normal(r, d) * d**-0.5 - up.float().cpu()).to(device, dtype)
    c = normal(r).to(device, dtype)

    x, down64, up64, c64 = (t.double() for t in (h, down, up, c))
    exact = x + (x @ down64.T + c64) @ up64
    unfused = h + (h @ down.T + c) @ up
    plan = one_segment(None, count, r, h.device)
    kind = torch.zeros(r, dtype=torch.int32, device=device)
    INTERVENE_[backend](h, down, up, c.float(), kind, plan.rows, plan.tiles, plan.spans)
    return float((h.double() - exact).square().sum()), float((unfused.double() - exact).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "r"), [(64, 1), (96, 4), (768, 4), (1000, 16), (4096, 8)])
def test_rms_error_beside_the_unfused_sequence(
    backend: str, device: str, dtype: torch.dtype, d: int, r: int
) -> None:
    draws = range(2 if interpreted(backend, device) else 12)
    pairs = [_errors(backend, device, dtype, d, r, seed) for seed in draws]
    ours, theirs = (sum(column) ** 0.5 for column in zip(*pairs))
    assert theirs > 0
    assert ours <= 1.1 * theirs, f"{ours / theirs:.3f} times the error of the unfused sequence"
