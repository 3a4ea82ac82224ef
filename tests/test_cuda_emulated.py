"""The CUDA kernels, run on a CPU by an emulator: the properties of tests/ops without a GPU.

What this can't show (races, memory orders, real tensor cores) is what tests/gpu and `make gpu` are for.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib

import hypothesis
import pytest
from support import cuda_emulator, oracle
from support.calls import backward, gradient_like, in_place
from support.cases import DTYPES, HALF, Spec, build, same_bits

from reft_kernels import ops

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
    for name in ("test_forward", "test_invariance", "test_backward"):
        for key, value in vars(_module(name)).items():
            if key.startswith("test_") and not getattr(value, "pytestmark", None):
                # Autograd is registered for the real ops.
                if "only_what_needs_a_gradient" not in key and "in_place_function" not in key:
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
        patch.setitem(ops.INTERVENE, NAME, kernels.intervene)
        patch.setitem(ops.INTERVENE_BACKWARD, NAME, kernels.intervene_backward)
        yield kernels
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.mark.parametrize("clusters", [True, False], ids=["clusters", "blocks"])
@pytest.mark.parametrize("holds", _properties(), ids=lambda holds: holds.__name__)
def test_property(holds, clusters: bool, emulated) -> None:
    emulated.clusters = clusters
    holds(NAME, "cpu")


def _spec(dtypes, d: int, ranks: tuple[int, ...], count: int = 21, **changes) -> Spec:
    n = len(ranks)
    plain = {"row_pad": 0, "offset": 0, "ragged": False, "plain": False, "scale": 1.0, "density": 1.0}
    fixed = {"seed": 7, "gaps": (1,) * n, "shared": (False,) * n, "lead": (count,), "count": count}
    return Spec(dtypes=dtypes, d=d, ranks=ranks, **(plain | fixed | changes))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("d", [512, 1032, 4096])
def test_a_cluster_sums_as_one_block_does(dtypes, d: int, emulated) -> None:
    case = build(_spec(dtypes, d, (8, 3, 20), count=9))
    results = []
    for emulated.clusters in (True, False):
        results.append((in_place(case, NAME).h, *backward(case, gradient_like(case), NAME)))
    for one, other in zip(*results):
        assert same_bits(one, other)


@pytest.mark.parametrize("dtypes", [HALF[0], DTYPES[0]], ids=str)
@pytest.mark.parametrize("rank", [70, 300, 1500])
def test_high_ranks(dtypes, rank: int, emulated) -> None:
    """More pool rows than p and v are kept for, than values fit of 16 rows, than values fit of 4."""
    emulated.clusters = True
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


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_rows_beyond_h_are_skipped(dtypes, emulated) -> None:
    """A static plan may name rows that this forward's h does not have."""
    emulated.clusters = True
    case = build(_spec(dtypes, 64, (4,), count=12))
    all_rows, short = in_place(case, NAME), case.copy()
    short.h = short.h[:7]
    ops.INTERVENE_[NAME](short.h, *case.pool, *case.plan)
    assert same_bits(short.storage[: 7 * 64], all_rows.storage[: 7 * 64])
    assert same_bits(short.storage[7 * 64 :], case.storage[7 * 64 :])
