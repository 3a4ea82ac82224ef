"""The elementwise CUDA kernels in the emulator: the properties of tests/ops/test_scale_shift.py."""

from __future__ import annotations

import importlib.util
import os
import pathlib

import hypothesis
import pytest
from support import cuda_emulator

from reft_kernels.ops import SCALE_SHIFT, SCALE_SHIFT_, SCALE_SHIFT_BACKWARD

NAME = "emulated"

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no g++")

_path = pathlib.Path(__file__).parent / "ops" / "test_scale_shift.py"
_spec = importlib.util.spec_from_file_location("emulated_test_scale_shift", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory):
    kernels = cuda_emulator.build(tmp_path_factory.mktemp("emulated"))
    fewer = max(hypothesis.settings().max_examples // 3, 5)
    hypothesis.settings.register_profile(NAME, hypothesis.settings(), max_examples=fewer)
    hypothesis.settings.load_profile(NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALE_SHIFT_, NAME, kernels.scale_shift_)
        patch.setitem(SCALE_SHIFT, NAME, kernels.scale_shift)
        patch.setitem(SCALE_SHIFT_BACKWARD, NAME, kernels.scale_shift_backward)
        yield kernels
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


#: All but what asks torch, where the emulated kernels are not registered.
PROPERTIES = [
    it for name, it in vars(_module).items() if name.startswith("test_") and "dispatcher" not in name
]


@pytest.mark.parametrize("threads", [0, 1], ids=["in turn", "in any order"])
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda it: it.__name__)
def test_property(holds, threads: int, emulated) -> None:
    emulated.shuffle_threads(threads)
    try:
        holds(NAME, "cpu")
    finally:
        emulated.shuffle_threads(0)
