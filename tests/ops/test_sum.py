"""intervene_sum_: the edit of hidden states that are still the sum of two tensors."""

from __future__ import annotations

import pytest
import torch
from support.cases import USUAL, Case, bits, build, check, same_bits

from reft_kernels.ops import INTERVENE_, INTERVENE_SUM_


def halves(case: Case) -> tuple[Case, torch.Tensor]:
    """A copy of the case, and an addend beside its h, with another stride between rows."""
    generator = torch.Generator().manual_seed(case.spec.seed + 3)
    wide = torch.randn(case.spec.count, case.spec.d + 5, generator=generator).to(case.h)
    addend = wide[:, : case.spec.d]
    return case.copy(), addend.reshape(case.h.shape) if case.h.dim() != 2 else addend


def test_it_edits_the_sum_and_leaves_the_rest(backend: str, device: str) -> None:
    """To the bit what adding the two and then editing gives; zero beside it; all other rows as they were."""

    def holds(case: Case) -> None:
        after, addend = halves(case)
        before = addend.clone()
        expected = case.copy()
        flat, other = expected.flat, before.reshape(-1, case.spec.d)
        flat[case.edited] = flat[case.edited] + other[case.edited]
        INTERVENE_[backend](expected.h, *expected.pool, *expected.plan)
        INTERVENE_SUM_[backend](after.h, addend, *after.pool, *after.plan)
        assert torch.equal(torch.isnan(after.flat), torch.isnan(expected.flat))
        kept = [row for row in range(case.spec.count) if row not in case.edited]
        finite = ~torch.isnan(expected.flat)
        assert torch.equal(after.flat[finite], expected.flat[finite])
        assert torch.equal(bits(after.flat[kept]), bits(case.flat[kept]))
        rest = addend.reshape(-1, case.spec.d)
        assert same_bits(rest[case.edited], torch.zeros_like(rest[case.edited]))
        assert same_bits(rest[kept], other[kept])

    check(holds, backend, device)


def test_opcheck(backend: str, device: str) -> None:
    case = build(USUAL, device)
    for tensor in (case.storage, case.down, case.up, case.bias):
        tensor.nan_to_num_(0.5, 0.5, 0.5)
    torch.library.opcheck(
        INTERVENE_SUM_[backend], (case.copy().h, torch.ones_like(case.h), *case.pool, *case.plan)
    )


def test_an_addend_that_does_not_fit_is_refused_before_anything_is_written(backend: str, device: str) -> None:
    case = build(USUAL, device)
    after = case.copy()
    wrong = [after.h, after.h.double(), torch.zeros(2, 4, case.spec.d, device=device)]
    for addend in wrong:
        with pytest.raises((ValueError, RuntimeError), match="addend"):
            INTERVENE_SUM_[backend](after.h, addend, *after.pool, *after.plan)
        assert same_bits(after.storage, case.storage)
