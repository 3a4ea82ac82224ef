"""The CUDA kernels, run on a CPU by an emulator: the properties of tests/ops without a GPU.

What this can't show (memory orders, real tensor cores) is what tests/gpu and `make gpu` are for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import pathlib

import hypothesis
import pytest
import torch
from support import cuda_emulator, oracle
from support.calls import backward, gradient_like, in_place, norm_of, normed_in_place
from support.cases import DTYPES, HALF, Spec, bits, build, same_bits

from reft_kernels import ops
from reft_kernels.ops.reference import normed

NAME = "emulated"
OPS = pathlib.Path(__file__).parent / "ops"

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no g++")


@functools.cache
def _module(name: str):
    """A module of tests/ops, whose tests are functions of (backend, device)."""
    spec = importlib.util.spec_from_file_location(f"{NAME}_{name}", OPS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _properties() -> list:
    """The tests of values and bits."""
    found = []
    for name in ("test_forward", "test_sum", "test_invariance", "test_norm", "test_backward"):
        for key, value in vars(_module(name)).items():
            if key.startswith("test_") and not getattr(value, "pytestmark", None):
                # What torch or the bindings do is there for the real ops.
                others = ("only_what_needs_a_gradient", "in_place_function", "opcheck", "does_not_fit")
                if not any(other in key for other in others):
                    found.append(value)
    return found


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory):
    """The kernels as a backend of the tests' own calls. A third of the examples: fibers are slow."""
    kernels = cuda_emulator.build(tmp_path_factory.mktemp("emulated"))
    fewer = max(hypothesis.settings().max_examples // 3, 5)
    hypothesis.settings.register_profile(NAME, hypothesis.settings(), max_examples=fewer)
    hypothesis.settings.load_profile(NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.INTERVENE_, NAME, kernels.intervene_)
        patch.setitem(ops.INTERVENE_SUM_, NAME, kernels.intervene_sum_)
        patch.setitem(ops.INTERVENE_NORM_, NAME, kernels.intervene_norm_)
        patch.setitem(ops.INTERVENE, NAME, kernels.intervene)
        patch.setitem(ops.INTERVENE_BACKWARD, NAME, kernels.intervene_backward)
        yield kernels
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.mark.parametrize("multiprocessors", [cuda_emulator.MANY, 0], ids=["clusters", "blocks"])
@pytest.mark.parametrize("holds", _properties(), ids=lambda holds: holds.__name__)
def test_property(holds, multiprocessors: int, emulated) -> None:
    emulated.multiprocessors = multiprocessors
    holds(NAME, "cpu")


def _spec(dtypes, d: int, ranks: tuple[int, ...], count: int = 21, **changes) -> Spec:
    n = len(ranks)
    plain = {"row_pad": 0, "offset": 0, "ragged": False, "plain": False, "scale": 1.0, "density": 1.0}
    fixed = {"seed": 7, "gaps": (1,) * n, "shared": (False,) * n, "lead": (count,), "count": count}
    return Spec(dtypes=dtypes, d=d, ranks=ranks, **(plain | fixed | changes))


@pytest.mark.parametrize("norm", range(1 + sum(ops.Norm)))
def test_every_norm(norm: int, emulated) -> None:
    emulated.multiprocessors = cuda_emulator.MANY
    _module("test_norm").test_every_norm_with_and_without_shift(NAME, "cpu", norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norms_rounding(dtype: torch.dtype, emulated) -> None:
    emulated.multiprocessors = cuda_emulator.MANY
    _module("test_norm").test_rounding_before_the_weight_is_llamas(NAME, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("d", "r"), [(64, 1), (1000, 16)])
def test_rms_error_with_sums_that_are_cut(dtype: torch.dtype, d: int, r: int, emulated) -> None:
    """The emulator adds as the least precise tensor cores do."""
    emulated.multiprocessors = cuda_emulator.MANY
    _module("test_accuracy").test_rms_error_beside_the_unfused_sequence(NAME, "cpu", dtype, d, r)


#: Of a chip: so few that a cluster gets fewer blocks than it could, and 0 for one without clusters.
CHIPS = (cuda_emulator.MANY, 6, 3, 2, 1, 0)


@pytest.mark.parametrize("count", [9, 40], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1032, 4096])
def test_a_cluster_sums_as_one_block_does(dtypes, d: int, count: int, emulated) -> None:
    """Whatever its size: the bits of h, of the norm and of the gradients."""
    case = build(_spec(dtypes, d, (8, 3, 20) if count < 20 else (8,), count=count))
    results, sizes = [], set()
    for emulated.multiprocessors in CHIPS:
        after, out = normed_in_place(case.covered(), NAME, norm_of(case)._replace(norm=ops.Norm.CENTRED))
        sizes.add(emulated.cluster)
        results.append((in_place(case, NAME).h, after.h, out, *backward(case, gradient_like(case), NAME)))
    assert sizes == ({1, 2, 4} if d == 1032 else {1, 2, 4, 8})
    for other in results[1:]:
        for one, it in zip(results[0], other):
            assert same_bits(one, it)


@pytest.mark.parametrize("count", [9, 40], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("chip", [cuda_emulator.MANY, 2], ids=["a unit a block", "several"])
def test_any_schedule_of_the_threads_gives_the_same_bits(dtypes, count: int, chip: int, emulated) -> None:
    """Where a barrier is missing, some thread reads what another has not written yet or has written over.

    Each barrier of the kernels was taken out once, and this test failed each time.
    """
    emulated.multiprocessors = chip
    case = build(_spec(dtypes, 1544, (8, 3, 20) if count < 20 else (20,), count=count))
    norm = norm_of(case)._replace(norm=ops.Norm.CENTRED)
    results = []
    try:
        for seed in range(3):
            emulated.shuffle_threads(seed)
            after, out = normed_in_place(case.covered(), NAME, norm)
            edited, gradients = in_place(case, NAME), backward(case, gradient_like(case), NAME)
            results.append((edited.h, after.h, out, *gradients))
    finally:
        emulated.shuffle_threads(0)
    for other in results[1:]:
        for one, it in zip(results[0], other):
            assert same_bits(one, it)


#: Beside the usual one (csrc/cuda/intervene.h).
PUSH, RING = 1, 2


@contextlib.contextmanager
def _way(emulated, number: int, seed: int = 0):
    emulated.take_way(number)
    emulated.shuffle_threads(seed)
    try:
        yield
    finally:
        emulated.take_way(0)
        emulated.shuffle_threads(0)


#: By case: a chip's multiprocessors, rows, ranks, d, and whether the norm follows. A block has one unit or
#: several, tiles few rows or many, and values fit of all rows of a tile, of some, or of none.
WAYS = {
    PUSH: [
        (cuda_emulator.MANY, 9, (8, 3, 20), 4096, False),
        (cuda_emulator.MANY, 9, (8, 3, 20), 1032, True),
        (cuda_emulator.MANY, 1, (8,), 1544, True),
        (cuda_emulator.MANY, 4, (1100,), 520, False),
        (cuda_emulator.MANY, 1, (4103,), 520, True),
        (6, 9, (8, 3, 20), 4096, True),
        (1, 2, (20,), 4616, True),
    ],
    RING: [
        (3, 9, (8, 3, 20), 4096, False),
        (1, 9, (8, 3, 20), 1032, False),
        (2, 40, (20, 1), 1544, False),
        (1, 40, (8,), 4096, False),
        (1, 4, (1100,), 2056, False),
    ],
}


@pytest.mark.parametrize(
    ("way", "case"),
    [(way, case) for way, cases in WAYS.items() for case in cases],
    ids=lambda it: "-".join(map(str, it)) if isinstance(it, tuple) else ("", "push", "ring")[it],
)
def test_every_way_gives_the_same_bits_in_any_schedule(way: int, case: tuple, emulated) -> None:
    """What is stored and copied by itself comes late and in any order; each wait was taken out once."""
    emulated.multiprocessors, count, ranks, d, normed = case
    made = build(_spec(HALF[0], d, ranks, count=count, scale=0.1 if ranks[0] > 100 else 1.0))

    def run() -> list[torch.Tensor]:
        if normed:
            after, out = normed_in_place(made.covered(), NAME, norm_of(made)._replace(norm=ops.Norm.CENTRED))
            return [after.h, out]
        return [in_place(made, NAME).h]

    usual, cluster = run(), emulated.cluster
    for seed in (0, 1, 2, 3) if ranks[0] < 1000 else (1,):
        with _way(emulated, way, seed):
            results = run()
        assert emulated.cluster == cluster
        for one, it in zip(usual, results):
            assert same_bits(one, it)


#: A schedule in which one warp hardly ever runs (`kSlowFrom` of cuda_emulator.cpp).
SLOW = 64


@pytest.mark.parametrize(
    ("way", "chip", "ranks", "count"),
    # So high a rank that a set of sums comes again; at a d of three units one of four blocks has none.
    [(PUSH, cuda_emulator.MANY, (20,), 1), (PUSH, cuda_emulator.MANY, (40,), 1), (RING, 1, (8, 3, 20), 9)],
    ids=["push-20", "push-40", "ring"],
)
def test_every_way_waits_for_a_warp_that_hardly_runs(way: int, chip: int, ranks, count, emulated) -> None:
    """What it has yet to read is not written over, and it is not left waiting for what was long ago."""
    emulated.multiprocessors = chip
    made = build(_spec(HALF[0], 1032, ranks, count=count))
    usual = in_place(made, NAME).h
    for seed in range(SLOW, SLOW + 3):
        with _way(emulated, way, seed):
            assert same_bits(in_place(made, NAME).h, usual)


@pytest.mark.parametrize(
    ("way", "chip", "dtypes", "changes", "reason"),
    [
        (PUSH, 0, HALF[0], {}, "before sm_90"),
        (PUSH, cuda_emulator.MANY, DTYPES[0], {}, "bfloat16"),
        (RING, 1, HALF[0], {"d": 1033}, "16-byte loads"),
        (PUSH, cuda_emulator.MANY, HALF[0], {"d": 512}, "a block does a tile alone"),
        (PUSH, cuda_emulator.MANY, HALF[0], {"d": 4104}, "several units"),
        (PUSH, 1, HALF[0], {"count": 40}, "more than 4 rows"),
        (RING, cuda_emulator.MANY, HALF[0], {}, "one unit"),
    ],
)
def test_a_way_that_has_no_kernel_says_why(way, chip, dtypes, changes, reason, emulated) -> None:
    """And writes nothing."""
    emulated.multiprocessors = chip
    case = build(_spec(dtypes, **({"d": 1032, "ranks": (8,), "count": 3} | changes)))
    copy = case.copy()
    with _way(emulated, way), pytest.raises(RuntimeError, match=f"way.*{reason}"):
        ops.INTERVENE_[NAME](copy.h, *copy.pool, *copy.plan)
    assert same_bits(copy.storage, case.storage)


@pytest.mark.parametrize("dtypes", [HALF[0], DTYPES[0]], ids=str)
def test_many_rows_of_few_pool_rows_are_split_among_blocks(dtypes, emulated) -> None:
    """With the bits that one block gives, which takes the same slices of the rows in turn."""
    case = build(_spec(dtypes, 72, (8, 3), count=1200, gaps=(0, 2)))
    results, sizes = [], []
    for emulated.multiprocessors in (cuda_emulator.MANY, 0):
        results.append(backward(case, gradient_like(case), NAME))
        sizes.append(emulated.cluster)
    assert sizes == [8, 1]
    for one, it in zip(*results):
        assert same_bits(one, it)
    expected, scale = oracle.backward(case, gradient_like(case))
    for name, got in zip(("down", "up", "bias"), results[0][1:]):
        want = expected[name]
        limit = _module("test_backward")._limit(case, scale[name], want, got.dtype)
        assert (abs(oracle.wide(got.reshape(want.shape)) - want) <= limit).all(), name


def test_both_tile_forms_give_the_same_bits(emulated) -> None:
    """Eight rows at once where tiles have few, else sixteen; the plan's padding decides here."""
    emulated.multiprocessors = cuda_emulator.MANY
    for dtypes in HALF:
        case = build(_spec(dtypes, 1032, (8, 3, 20), count=40))
        rows = torch.cat([case.rows, case.rows.new_full((1000,), -1)])
        other = dataclasses.replace(case, rows=rows)
        few = dataclasses.replace(case, tiles=torch.cat([case.tiles, case.tiles.new_zeros(100, 3)]))
        results = [in_place(it, NAME).storage for it in (other, few)]
        assert same_bits(*results)


@pytest.mark.parametrize("dtypes", [HALF[0], DTYPES[0]], ids=str)
@pytest.mark.parametrize("rank", [70, 300, 1500])
def test_high_ranks(dtypes, rank: int, emulated) -> None:
    """More pool rows than p and v are kept for, than values fit of 16 rows, than values fit of 4."""
    emulated.multiprocessors = cuda_emulator.MANY
    case = build(_spec(dtypes, 72, (rank,), count=18 if rank < 1000 else 5, scale=0.1))
    _module("test_forward").assert_equals_oracle(case, in_place(case, NAME).h)
    grad = gradient_like(case)
    expected, scale = oracle.backward(case, grad)
    results = dict(zip(("h", "down", "up", "bias"), backward(case, grad, NAME)))
    for name, want in expected.items():
        got = oracle.wide(results[name].reshape(want.shape))
        limit = _module("test_backward")._limit(case, scale[name], want, results[name].dtype)
        used = case.edited if name == "h" else slice(None)
        assert (abs(got - want) <= limit)[used].all(), name


@pytest.mark.parametrize(("dtypes", "d"), [(HALF[0], 72), (DTYPES[0], 520), (DTYPES[0], 72)], ids=str)
def test_a_rank_beyond_shared_memory_is_done_in_parts(dtypes, d: int, emulated) -> None:
    """Where the values of one row do not fit: in two parts and more, with the norm, and of the gradient."""
    emulated.multiprocessors = cuda_emulator.MANY
    case = build(_spec(dtypes, d, (4103,), count=1, scale=0.1))
    grad = gradient_like(case)
    emulated.shuffle_threads(1)
    try:
        (after, out), dh = (
            normed_in_place(case.covered(), NAME),
            backward(case, grad, NAME, need_pool=False)[0],
        )
    finally:
        emulated.shuffle_threads(0)
    _module("test_forward").assert_equals_oracle(case, after.h)
    want = normed(after.h, *norm_of(case))
    torch.testing.assert_close(out, want)
    expected, scale = oracle.backward(case, grad)
    limit = _module("test_backward")._limit(case, scale["h"], expected["h"], dh.dtype)
    assert (abs(oracle.wide(dh.reshape(expected["h"].shape)) - expected["h"]) <= limit)[case.edited].all()


@pytest.mark.parametrize("d", [4096, 5120])
@pytest.mark.parametrize("dtypes", [HALF[0], DTYPES[0]], ids=str)
def test_shared_memory_does_not_grow_with_the_pool(dtypes, d: int, emulated) -> None:
    """64 adapters of rank 8 on 32 layers are 16384 pool rows; the ranges are of 8 rows as before."""
    case = build(_spec(dtypes, d, (8,), count=1))
    large = case.copy()
    for name in ("down", "up", "bias", "kind"):
        part = getattr(case, name)
        whole = torch.empty(16384, *part.shape[1:], dtype=part.dtype)  # what is not used is not touched
        whole[: len(part)] = part
        setattr(large, name, whole)
    for emulated.multiprocessors in (cuda_emulator.MANY, 2, 1, 0):
        found = []
        for it in (case, large):
            after = in_place(it, NAME)
            found.append((emulated.cluster, emulated.shared))
        share = -(-d // 512 // emulated.cluster)
        beyond = max(0, 4 * (512 * share + 512 - 4096))  # where so many columns are a block's
        assert found[1] == (found[0][0], found[0][1] + beyond)
        assert share > 7 or beyond == 0
        assert same_bits(after.h, in_place(case, NAME).h)


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_rows_beyond_h_are_skipped(dtypes, emulated) -> None:
    """A static plan may name rows that this forward's h does not have."""
    emulated.multiprocessors = cuda_emulator.MANY
    case = build(_spec(dtypes, 64, (4,), count=12))
    all_rows, short = in_place(case, NAME), case.copy()
    short.h = short.h[:7]
    ops.INTERVENE_[NAME](short.h, *case.pool, *case.plan)
    assert same_bits(short.storage[: 7 * 64], all_rows.storage[: 7 * 64])
    assert same_bits(short.storage[7 * 64 :], case.storage[7 * 64 :])


def _signalling(pool: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """The pool with signalling NaNs in all other rows."""
    words = bits(pool).clone()
    words[~used] = (
        0x7FA00001 if pool.element_size() == 4 else 0x7FA1 if pool.dtype is torch.bfloat16 else 0x7D01
    )
    return words.view(pool.dtype)


@pytest.mark.parametrize("count", [1, 3, 21])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("chip", [cuda_emulator.MANY, 1], ids=["a unit a block", "several"])
def test_nothing_is_added_up_that_nobody_wrote(dtypes, count: int, chip: int, emulated) -> None:
    """Shared memory before it is written, pool rows beside the ranges: not even in what is thrown away."""
    emulated.multiprocessors = chip
    spec = _spec(dtypes, 1032, (3, 8, 70), count=count, gaps=(1, 5, 3), plain=True)
    case = build(spec).covered()
    used = torch.zeros(len(case.bias), dtype=torch.bool)
    for segment in case.segments:
        used[segment.first : segment.first + segment.rank] = True
    case.down, case.up = _signalling(case.down, used), _signalling(case.up, used)
    case.bias = _signalling(case.bias, used)
    case.storage.nan_to_num_(0.0, 0.0, 0.0)
    for norm in (ops.Norm.RMS, ops.Norm.CENTRED):
        in_place(case, NAME)
        assert not emulated.invalid()
        normed_in_place(case, NAME, norm_of(case)._replace(norm=norm))
        assert not emulated.invalid()
    backward(case, gradient_like(case), NAME)
    assert not emulated.invalid()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_inf_and_nan_where_the_reference_has_them(dtypes, emulated) -> None:
    """In U, in D and in h, beside values of every size; 1 is a value that TF32 holds whole."""
    emulated.multiprocessors = cuda_emulator.MANY
    case = build(_spec(dtypes, 72, (5,), count=9, plain=True))
    (segment,) = case.segments
    first = segment.first
    case.kind[first] = ops.NO_PRODUCT
    case.bias[first : first + 5] = torch.tensor([1.0, 0.0, -1.5, 1e-3, 7.0])
    case.flat[case.edited[0]] = 0  # so that the values are the biases themselves
    case.flat[case.edited[1], 3] = torch.inf
    for column, (row, value) in enumerate(itertools.product(range(5), (torch.inf, -torch.inf, torch.nan))):
        case.up[first + row, 2 * column] = value
    got = in_place(case, NAME)
    want = in_place(case, "reference")
    classes = [[torch.isnan(it.flat), torch.isposinf(it.flat), torch.isneginf(it.flat)] for it in (got, want)]
    for mine, reference in zip(*classes):
        assert reference[case.edited[0]].any()
        assert torch.equal(mine[case.edited], reference[case.edited])
