"""The examples run in their quick mode and do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.models
ROOT = Path(__file__).resolve().parent.parent


def run(name: str, *arguments: str) -> str:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "160"}
    command = [sys.executable, str(ROOT / "examples" / name), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_life_cycle(tmp_path):
    pytest.importorskip("rich")
    said = run("life_cycle.py", "--out", str(tmp_path))
    assert "logits of the reloaded model and adapters: identical" in said
    assert "each adapter is the best of the three at its own behaviour: yes" in said
    for name in ("capitals", "small", "joined"):
        assert (tmp_path / name / "reft_model.safetensors").exists()
