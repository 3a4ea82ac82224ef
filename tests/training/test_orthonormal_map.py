"""The Cholesky map beside torch's `orthogonal` parametrization on one small task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reft_kernels.adapter.orthonormal import _lower, orthonormal_rows

WIDTH, RANK = 48, 4


def losses_of(rows, parameters, seed: int) -> list[float]:
    """Losses while R and a bias learn to make h + Rᵀ(b − R h) what another R and b make of it."""
    generator = torch.Generator().manual_seed(100 + seed)
    target = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))[0].T
    offset = 3 * torch.randn(RANK, generator=generator)
    h = torch.randn(256, WIDTH, generator=generator)
    wanted = h + (offset - h @ target.T) @ target
    bias = nn.Parameter(torch.zeros(RANK))
    optimizer = torch.optim.AdamW([*parameters, bias], lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(250):
        optimizer.zero_grad()
        r = rows()
        loss = (h + (bias - h @ r.T) @ r - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_learns_like_torchs_orthogonal_map():
    ours, theirs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        start = nn.init.orthogonal_(torch.empty(RANK, WIDTH))
        raw = nn.Parameter(start.clone())
        ours.append(losses_of(lambda raw=raw: orthonormal_rows(raw), [raw], seed))
        linear = nn.Linear(WIDTH, RANK, bias=False)
        linear.weight.data.copy_(start)
        nn.utils.parametrizations.orthogonal(linear)
        theirs.append(losses_of(lambda linear=linear: linear.weight, list(linear.parameters()), seed))
        r = orthonormal_rows(raw)
        assert (r @ r.T - torch.eye(RANK)).abs().max() < 1e-6
        assert abs(ours[-1][0] - theirs[-1][0]) < 1e-4
    for step in (50, 249):
        mine = sum(losses[step] for losses in ours)
        assert mine < 1.25 * sum(losses[step] for losses in theirs), step
    assert all(losses[-1] < 0.05 * losses[0] for losses in ours)


def test_rows_that_depend_on_each_other():
    rows = torch.randn(2, 3, WIDTH)
    rows[1, 2] = 0
    with pytest.raises(torch.linalg.LinAlgError):
        orthonormal_rows(rows)
    # Unchecked, as on an accelerator: NaN for the matrix that failed, and for no other.
    gram = torch.stack([torch.ones(2, 2), 4 * torch.eye(2)]).double().requires_grad_()
    with pytest.raises(torch.linalg.LinAlgError):
        _lower(gram, checked=True)
    lower = _lower(gram, checked=False)
    assert lower[0].isnan().all() and torch.equal(lower[1], 2 * torch.eye(2).double())
    lower[1].sum().backward()
    assert not gram.grad[1].isnan().any()
