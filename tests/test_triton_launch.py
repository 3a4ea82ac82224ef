"""Direct launches reach the driver with what Triton alone would pass, and only where they may."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from reft_kernels.ops.triton_ops import launch
from reft_kernels.ops.triton_ops.launcher import Launcher

TESTS = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, str(TESTS / "support" / "triton_direct.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {case["name"]: case for case in json.loads(done.stdout)}


def test_kernel_and_arguments_are_those_that_triton_chooses(cases: dict[str, dict]) -> None:
    """After a launch with other tensors; every alignment, stride, dtype and d that Triton compiles for."""
    assert len(cases) > 100
    assert [name for name, case in cases.items() if not case["same"]] == []


@pytest.mark.parametrize(
    ("case", "direct"),
    [
        ("edit: the same", 1),
        ("rms_norm: the same", 1),
        ("layer_norm: the same", 1),
        ("backward: the same", 2),
        ("edit: another number of rows", 1),
        ("edit: another pool", 1),
        ("edit: the plan elsewhere", 1),
        ("backward: another number of rows", 2),
        # The pool's gradients are float32 parts here: another variant, and one that adds them.
        ("backward: rows that programs share", 1),
        ("edit: h 8 bytes on", 0),
        ("rms_norm: weight 8 bytes on", 0),
        ("rms_norm: h 8 bytes on", 1),  # since h was copied
        ("edit: rows apart by no multiple of 16", 0),
        ("edit: debug is set", 0),
        ("edit: launch_enter_hook is set", 0),
        ("edit: twice on another device and stream", 1),
    ],
)
def test_what_is_launched_directly(cases: dict[str, dict], case: str, direct: int) -> None:
    assert cases[case]["direct"] == direct


@pytest.mark.parametrize(
    ("names", "numbers"), [(("row_stride", "n_rows"), (8, 1)), (("n_rows", "row_stride"), (8,))]
)
def test_numbers_that_are_not_the_kernels_are_refused(
    names: tuple[str, ...], numbers: tuple[int, ...]
) -> None:
    launcher = Launcher(launch.intervene_kernel, launch.options.forward_options, names)
    dtypes = (torch.float32, torch.float32)
    with pytest.raises(
        TypeError, match=r"numbers: the kernel takes \('n_rows', 'row_stride'\) after 8 tensors"
    ):
        launcher.launch((1, 1, 1), dtypes, 8, (None,) * 8, numbers)
