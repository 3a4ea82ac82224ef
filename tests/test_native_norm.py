"""The native CPU backend's intervene_norm_: what it refuses, and plans that cover in the other ops.

Its values on every instruction set are in test_native.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reft_kernels as rk
from reft_kernels.ops import native
from reft_kernels.ops.schema import INTERVENE_, INTERVENE_BACKWARD, INTERVENE_NORM_

pytestmark = pytest.mark.skipif(native.cpu_missing is not None, reason=str(native.cpu_missing))


def ints(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_pool(rank: int, d: int) -> tuple[Tensor, ...]:
    return torch.randn(rank, d), torch.randn(rank, d), torch.randn(rank), torch.zeros(rank, dtype=torch.int32)


NORM = {"weight": torch.ones(8), "shift": torch.ones(8), "eps": 1e-6, "norm": 7}
BAD_NORM = {
    "h float64": ({"h": torch.zeros(4, 8, dtype=torch.float64)}, "h: dtype.*the reference backend takes"),
    "h strides": ({"h": torch.zeros(4, 16)[:, ::2]}, "h: its last dimension must be contiguous"),
    "down width": ({"down": torch.zeros(5, 7)}, "down: must have 2 dimensions and a last one of 8"),
    "rows range": ({"rows": ints(0, 2, 1, 4)}, "rows: must be less than 4"),
    "tile segment": ({"tiles": ints([2, 0, 1])}, "tiles: tile 0 names segment 2 of 2"),
    "span end": ({"spans": ints([0, 2], [4, 2])}, "spans: segment 1 takes pool rows"),
    "weight shape": ({"weight": torch.ones(7)}, r"weight: must have 1 dimension and a last one of 8.*\[7\]"),
    "weight dimensions": ({"weight": torch.ones(1, 8)}, "weight: must have 1 dimension"),
    "weight dtype": ({"weight": torch.ones(8).half()}, "weight: dtype must be h's, was Half"),
    "weight float64": ({"weight": torch.ones(8).double()}, "weight: dtype must be Float, BFloat16 or Half"),
    "weight strides": ({"weight": torch.ones(16)[::2]}, "weight: must be contiguous"),
    "shift shape": ({"shift": torch.ones(9)}, "shift: must have 1 dimension and a last one of 8"),
    "shift dtype": ({"shift": torch.ones(8).bfloat16()}, "shift: dtype must be h's, was BFloat16"),
    "eps negative": ({"eps": -1e-6}, "eps: must be finite and 0 or more, was -1e-06"),
    "eps NaN": ({"eps": float("nan")}, "eps: must be finite"),
    "eps Inf": ({"eps": float("inf")}, "eps: must be finite"),
    "norm": ({"norm": 8}, r"norm: must be a sum of RMS \(0\), CENTRED \(1\), .*, was 8"),
    "norm negative": ({"norm": -1}, "norm: must be a sum"),
    "row missed": ({"tiles": ints([0, 0, 1], [1, 1, 2])}, "rows: row 3 of h is in no tile"),
    "row twice": ({"rows": ints(0, 2, 2, 1)}, "rows: row 2 of h is named twice"),
    "row in two tiles": (
        {"tiles": ints([0, 0, 1], [1, 1, 2], [-1, 2, 2])},
        "rows: row 1 of h is named twice",
    ),
    "padding for a row": ({"rows": ints(0, 2, -1, 3)}, "rows: row 1 of h is in no tile"),
}


@pytest.mark.parametrize("name", BAD_NORM)
def test_bad_arguments_of_the_norm_are_named_before_anything_is_written(name):
    changes, message = BAD_NORM[name]
    pool = dict(zip(("down", "up", "bias", "kind"), make_pool(5, 8)))
    tiles = ints([0, 0, 1], [1, 1, 2], [-1, 3, 1])
    plan = {"rows": ints(0, 2, 1, 3), "tiles": tiles, "spans": ints([0, 2], [2, 2])}
    good = {"h": torch.randn(4, 8), **pool, **plan, **NORM}
    INTERVENE_NORM_["native"](*good.values())
    case = {**good, **changes}
    before = case["h"].clone()
    with pytest.raises(RuntimeError, match=message):
        INTERVENE_NORM_["native"](*case.values())
    assert torch.equal(case["h"], before)


def test_weights_that_share_memory_with_h_are_refused():
    pool, plan = make_pool(2, 8), rk.make_plan([], total_rows=4, cover=True)
    h, apart = torch.randn(4, 8), torch.ones(8)
    for name, weights in (("weight", (h[2], None)), ("shift", (apart, h[3]))):
        with pytest.raises(RuntimeError, match=f"h: shares memory with {name}"):
            INTERVENE_NORM_["native"](h, *pool, *plan[:3], *weights, 1e-6, 0)


def test_a_plan_that_covers_edits_the_same_rows_in_every_op():
    """Tiles without a segment have nothing to do, forward and backward."""
    entries, pool = [(rk.Span(0, 3), [4, 1]), (rk.Span(3, 2), [0])], make_pool(5, 8)
    h, grad = torch.randn(2, 6, 8)
    outcomes = []
    for plan in (rk.make_plan(entries), rk.make_plan(entries, total_rows=6, cover=True)):
        edited = h.clone()
        INTERVENE_["native"](edited, *pool, *plan[:3])
        hs = h[plan.rows.long()]
        rest = (hs, *pool, *plan[:3], plan.offsets, True, True)
        outcomes.append((edited, *INTERVENE_BACKWARD["native"](grad, *rest)))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))
