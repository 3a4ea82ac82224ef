"""intervene_ and intervene: values, what they leave alone, what they must not read."""

from __future__ import annotations

import torch
from support import oracle
from support.calls import in_place, out_of_place
from support.cases import Case, bits, check, same_bits

from reft_kernels.ops import INTERVENE_, INTERVENE_BACKWARD, NO_PRODUCT, Act
from reft_kernels.plan import one_segment


def assert_equals_oracle(case: Case, result: torch.Tensor) -> None:
    flat = oracle.wide(result.reshape(-1, case.spec.d))
    for row, (value, error) in oracle.forward(case).items():
        excess = abs(flat[row] - value) - error
        assert (excess <= 0).all(), f"row {row}: {flat[row]} for {value}, {excess.max()} beyond {error.max()}"


def test_in_place_equals_the_formula(backend: str, device: str) -> None:
    check(lambda case: assert_equals_oracle(case, in_place(case, backend).h), backend, device)


def test_out_of_place_equals_in_place_to_the_bit(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        result = out_of_place(case, backend)
        assert result.is_contiguous() and result.shape == case.h.shape
        assert same_bits(result, in_place(case, backend).h)

    check(holds, backend, device)


def test_all_that_is_not_selected_keeps_its_bits(backend: str, device: str) -> None:
    """Rows without an edit (or with rank 0), bytes between strided rows and around h, pool and plan."""

    def holds(case: Case) -> None:
        constants = [t.clone() for t in (*case.pool, *case.plan, case.offsets)]
        after = in_place(case, backend)
        untouched = torch.ones_like(case.storage, dtype=torch.bool)
        mine = untouched.as_strided((case.spec.count, case.spec.d), case.flat.stride(), case.spec.offset)
        mine[case.edited] = False
        assert torch.equal(bits(after.storage)[untouched], bits(case.storage)[untouched])
        for now, before in zip((*case.pool, *case.plan, case.offsets), constants):
            assert same_bits(now, before)

    check(holds, backend, device)


def test_out_of_place_writes_nothing_that_it_was_given(backend: str, device: str) -> None:
    def holds(case: Case) -> None:
        before = case.storage.clone()
        constants = [t.clone() for t in (*case.pool, *case.plan, case.offsets)]
        out_of_place(case, backend)
        assert same_bits(case.storage, before)
        for now, then in zip((*case.pool, *case.plan, case.offsets), constants):
            assert same_bits(now, then)

    check(holds, backend, device)


def test_only_the_named_pool_rows_are_read(backend: str, device: str) -> None:
    """Other pool rows, and D where there is no product, change nothing whatever they hold."""

    def holds(case: Case) -> None:
        other = case.copy()
        used = torch.zeros(len(case.bias), dtype=torch.bool, device=device)
        for segment in case.segments:
            used[segment.first : segment.first + segment.rank] = True
        bare = (case.kind & NO_PRODUCT) != 0
        other.down = torch.where((used & ~bare)[:, None], case.down, torch.zeros_like(case.down))
        other.up = torch.where(used[:, None], case.up, torch.full_like(case.up, 3.0))
        other.bias = torch.where(used, case.bias, torch.full_like(case.bias, -1.0))
        assert same_bits(in_place(other, backend).storage, in_place(case, backend).storage)

    check(holds, backend, device)


def test_what_one_row_holds_reaches_no_other(backend: str, device: str) -> None:
    """A row of NaN or Inf in the batch, beside the same pool rows, leaves the others' bits alone."""

    def holds(case: Case) -> None:
        victims = case.edited[::2]
        if not victims:
            return
        clean = in_place(case, backend)
        dirty = case.copy()
        dirty.flat[victims[::2]] = torch.nan
        dirty.flat[victims[1::2]] = torch.inf
        dirty = in_place(dirty, backend)
        keep = [row for row in case.edited if row not in victims]
        assert same_bits(dirty.flat[keep], clean.flat[keep])

    check(holds, backend, device)


def test_a_step_is_1_above_0_and_0_elsewhere(backend: str, device: str) -> None:
    """Of zeros of both signs, NaN, Inf and subnormals as of others; its slope is 0, so no gradient passes."""
    z = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40, 1e-4, -1e-4, 3.0, -3.0])
    h = torch.stack([torch.zeros_like(z), z], 1).to(device)
    one = torch.tensor([[0.0, 1.0]], device=device)
    kind = torch.tensor([Act.STEP], dtype=torch.int32, device=device)
    pool = (one, one.flip(1).contiguous(), torch.full((1,), -0.0, device=device), kind)
    plan = one_segment(None, len(z), 1, h.device)
    edited = h.clone()
    INTERVENE_[backend](edited, *pool, *plan[:-1])
    assert edited[:, 0].tolist() == [float(value > 0) for value in z]
    grad = torch.ones_like(h)
    dh, ddown, _, dbias = INTERVENE_BACKWARD[backend](grad, h.nan_to_num(0, 1, -1), *pool, *plan, True, True)
    assert torch.equal(dh, grad) and not ddown.any() and not dbias.any()
