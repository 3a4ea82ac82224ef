"""Half precision, casts after patching, autocast, and dtypes of the pool."""

from __future__ import annotations

import pytest
import torch
from support.adapters import patch_with_mixed, patched, random_adapter
from support.models import make_model

import reft_kernels as rk

pytestmark = pytest.mark.models
NAMES = ["everywhere", "untied"]
WIDTH = 32


def logits(model, batch, names=NAMES, **kwargs):
    with torch.no_grad():
        return model(**batch, adapter_names=names, **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_and_pools(dtype, batch):
    exact = logits(patched(), batch)
    errors = []
    for pool_dtype in (None, torch.float32):
        model = make_model().to(dtype)
        reft = patch_with_mixed(model, pool_dtype=pool_dtype)
        assert next(iter(reft._store.pools.values())).dtype == (pool_dtype or dtype)
        assert next(reft.adapters["tied"].parameters()).dtype == torch.float32
        seen = batch["attention_mask"].bool()
        errors.append((logits(model, batch).float() - exact)[seen].norm() / exact[seen].norm())
    assert all(error < 0.1 for error in errors), errors


def test_a_model_cast_after_patching_moves_its_pool(model, batch):
    exact = logits(model, batch)
    model.to(torch.bfloat16)
    got = logits(model, batch)
    assert got.dtype == torch.bfloat16
    seen = batch["attention_mask"].bool()
    assert (got.float() - exact)[seen].norm() < 0.1 * exact[seen].norm()
    assert next(model.reft.adapters["tied"].parameters()).dtype == torch.float32
    model.to(torch.float32)


def test_autocast(model, batch):
    exact = logits(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, batch)
    seen = batch["attention_mask"].bool()
    assert (got.float() - exact)[seen].norm() < 0.1 * exact[seen].norm()


def test_a_pool_dtype_that_the_model_cannot_use_is_refused():
    reft = rk.patch(make_model(), pool_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="pool_dtype: must be the model's"):
        reft.add_adapter("a", random_adapter(rk.ReftConfig(r=1), WIDTH))
    assert not reft.adapters
