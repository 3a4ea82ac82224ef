"""The examples in public docstrings run as they stand, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

import reft_kernels as rk

#: Public names without an example of their own, and where to look instead.
ELSEWHERE = {
    "BackendUnavailable": "an error",
    "NotPatchable": "an error",
    "Option": "Method has one",
    "PoolFull": "an error",
    "Plan": "make_plan makes it",
    "Reft": "patch makes it",
    "ReftTrainer": "README trains with it",
    "Span": "Pool.add makes it",
    "functional": "a module",
    "register_method": "Method registers one",
    "unpatch": "patch has one",
    "unregister_method": "Method has one",
}
PUBLIC = {name: getattr(rk, name) for name in rk.__all__} | {
    f"functional.{name}": getattr(rk.functional, name) for name in rk.functional.__all__
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_an_example(name: str) -> None:
    assert inspect.getdoc(PUBLIC[name])
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(PUBLIC[name]) or "")
    assert bool(examples) != (name in ELSEWHERE), ELSEWHERE.get(name, "no example")


MODULES = sorted({inspect.unwrap(it).__module__ for name, it in PUBLIC.items() if name not in ELSEWHERE})


@pytest.mark.models
@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    found = importlib.import_module(module)
    names = {"rk": rk, "ReftConfig": rk.ReftConfig, "patch": rk.patch, "unpatch": rk.unpatch}
    result = doctest.testmod(found, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed
