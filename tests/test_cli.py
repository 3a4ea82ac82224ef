"""`reft-kernels`: what doctor reports is what dispatch does, and convert passes on what it was given."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reft_kernels as rk
from reft_kernels import adapter, cli, doctor, ops
from reft_kernels.ops import dispatch

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture
def fresh_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend chosen by name, and none remembered from an earlier call."""
    monkeypatch.setattr(dispatch, "_chosen", None)
    monkeypatch.setattr(dispatch, "_resolved", {})


def test_doctor_json_agrees_with_dispatch(fresh_dispatch: None, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    for device_type, device in facts["devices"].items():
        assert device["default"] == ops.current_backend(device_type)
        for name, backend in device["backends"].items():
            reason = ops.why_not(name, device_type)
            assert backend["available"] == (reason is None)
            assert reason is None or backend["detail"] == reason
    assert set(facts["devices"]["cpu"]["backends"]) == set(ops.BACKENDS)
    assert facts["fast"] == any(device["default"] != "reference" for device in facts["devices"].values())
    assert status == (0 if facts["fast"] else 1)


def test_doctor_without_any_fused_backend(
    fresh_dispatch: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def why_not(name: str, device_type: str) -> str | None:
        return None if name == "reference" else f"{name} was taken away"

    monkeypatch.setattr(dispatch, "why_not", why_not)
    monkeypatch.setattr(ops, "why_not", why_not)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "native was taken away" in text
    assert "several times slower" in text
    assert "used here: reference" in text
    assert "Only the reference backend runs" in text


def test_doctor_says_when_the_chosen_backend_cannot_run(
    fresh_dispatch: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "_chosen", "native")
    monkeypatch.setattr(dispatch, "why_not", lambda name, device_type: "no compiler")
    assert cli.main(["doctor"]) == 1
    assert "can't run on cpu: no compiler" in capsys.readouterr().out


def test_doctor_in_a_process_of_its_own_obeys_the_environment() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reft_kernels.cli", "doctor", "--json"],
        env={**os.environ, dispatch.ENVIRONMENT: "reference"},
        cwd=PYPROJECT.parent,
        capture_output=True,
        text=True,
    )
    facts = json.loads(done.stdout)
    assert {device["default"] for device in facts["devices"].values()} == {"reference"}
    assert facts["environment"] == {dispatch.ENVIRONMENT: "reference"}
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("version", "oldest", "below", "inside"),
    [
        ("2.10.0", "2.10", None, True),
        ("2.9.1+cu128", "2.10", None, False),
        ("2.13.0+cpu", "2.10", None, True),
        ("4.57.0.dev0", "4.57", "6", True),
        ("4.56.9", "4.57", "6", False),
        ("5.99.1", "4.57", "6", True),
        ("6.0.0", "4.57", "6", False),
        ("10", "3.10", None, True),
    ],
)
def test_version_ranges(version: str, oldest: str, below: str | None, inside: bool) -> None:
    assert doctor.in_range(version, oldest, below) is inside


def test_doctor_knows_the_ranges_of_the_package() -> None:
    text = PYPROJECT.read_text()
    for name, (oldest, below) in doctor.SUPPORTED.items():
        wanted = f">={oldest}" + (f",<{below}" if below else "")
        pattern = r'requires-python = "([^"]*)"' if name == "python" else rf'"{name}([<>=][^";]*)'
        found = set(re.findall(pattern, text.split("[project]")[1]))
        assert found == {wanted}, name


def test_convert_passes_everything_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(adapter, "convert", lambda *args, **kwargs: calls.append((args, kwargs)))
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    options = "--positions f3+l3 --act-fn relu --dropout 0.1 --last-position length-1".split()
    assert cli.main(["convert", *folders, *options]) == 0
    assert cli.main(["convert", *folders, "--positions", "0,4,7"]) == 0
    assert [args for args, _ in calls] == [(tmp_path / "a", tmp_path / "b")] * 2
    assert [kwargs for _, kwargs in calls] == [
        {"positions": "f3+l3", "act_fn": "relu", "dropout": 0.1, "last_position": "length-1"},
        {"positions": [0, 4, 7], "act_fn": None, "dropout": 0.0, "last_position": "length"},
    ]


def test_convert_of_what_is_no_checkpoint_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert cli.main(["convert", str(tmp_path), str(target), "--positions", "l1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("reft-kernels convert: ") and captured.err.count("\n") == 1
    assert str(tmp_path) in captured.err
    assert not target.exists()


@pytest.fixture
def occupied(tmp_path: Path) -> tuple[Path, Path]:
    """A folder to convert, and one that holds another adapter."""
    adapters = [rk.Adapter.from_config(rk.ReftConfig(r=r, layers=[0]), 2, 8) for r in (1, 2)]
    for one, name in zip(adapters, ("source", "target")):
        one.save_pretrained(tmp_path / name)
    return tmp_path / "source", tmp_path / "target"


def convert_to(target: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, *options: str) -> tuple:
    """(exit status, whether an adapter was written, what was asked). answer: None where there is no tty."""
    written, asked = [], []
    monkeypatch.setattr(adapter, "convert", lambda *args, **kwargs: written.append(args))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: answer is not None, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    status = cli.main(["convert", "somewhere", str(target), "--positions", "l1", *options])
    return status, len(written), asked


def test_convert_asks_before_it_replaces_an_adapter(
    occupied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = occupied[1]
    question = f"{target} holds an adapter already. Replace it? [y/N] "
    assert convert_to(target, monkeypatch, "y") == (0, 1, [question])
    assert convert_to(target, monkeypatch, "") == (2, 0, [question])
    assert f"{target} was left as it is" in capsys.readouterr().err
    assert convert_to(target, monkeypatch, None) == (2, 0, [])
    assert "give --force to replace it" in capsys.readouterr().err
    assert convert_to(target, monkeypatch, None, "--force") == (0, 1, [])
    assert convert_to(target.parent / "new", monkeypatch, None) == (0, 1, [])


def test_convert_says_which_data_sets_count_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    _, counts_from_length, one_less = re.split(r"\n  length(?:-1)? +", capsys.readouterr().out)
    assert "ReftRawDataset" in counts_from_length and "ReftSupervisedDataset" not in counts_from_length
    for name in ("Supervised", "Generation", "Classification", "Reward"):
        assert f"Reft{name}Dataset" in one_less


def test_the_data_sets_are_those_of_the_live_pyreft(capsys: pytest.CaptureFixture[str]) -> None:
    """Every class of pyreft's that reckons a last position stands under what it reckons with."""
    spec = importlib.util.find_spec("pyreft")
    if spec is None or spec.origin is None:
        pytest.skip("pyreft is not installed")
    source = (Path(spec.origin).parent / "dataset.py").read_text()
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    groups = re.split(r"\n  length(?:-1)? +", capsys.readouterr().out)[1:]
    found = 0
    for part in re.split(r"\n(?=class |def )", source):
        match = re.search(r"last_position ?= ?base_prompt_length( - 1)?,?\s", part)
        if match:
            found += 1
            name = re.match(r"(?:class|def) (\w+)", part)[1]
            assert name in groups[bool(match[1])].split("Exit status")[0], name
    assert found >= 6


def test_convert_without_positions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(tmp_path), str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "--positions" in capsys.readouterr().err


def test_doctor_says_whether_edits_pass_the_dispatcher_by(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reft_kernels.ops import launch

    for missing, said in (
        (None, "on CPUs: yes"),
        ("its library was taken away", "on CPUs: no\n  its library"),
    ):
        monkeypatch.setattr(launch, "missing", missing)
        cli.main(["doctor"])
        assert said in capsys.readouterr().out
