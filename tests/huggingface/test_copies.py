"""Copies, pickles and saved files of a patched model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.models import batch_of, make_model

import reft_kernels as rk

pytestmark = pytest.mark.models
NAMES = ["everywhere", "untied"]


def logits(model, batch, names=NAMES, **kwargs):
    with torch.no_grad():
        return model(**batch, adapter_names=names, **kwargs).logits


def test_a_deepcopy_is_a_patched_model_of_its_own(model, batch):
    want = logits(model, batch)
    twin = copy.deepcopy(model)
    model.reft.delete_adapter("everywhere")
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin, batch), want)
    out = twin.generate(**batch, adapter_names=NAMES, max_new_tokens=2, do_sample=False)
    assert out.shape == (2, 8)
    rk.unpatch(twin)
    assert torch.equal(twin(**batch).logits, make_model()(**batch).logits)


def test_pickle_and_torch_save(model, batch):
    want = logits(model, batch)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), batch), want)


def test_state_dict_and_save_pretrained_are_the_base_models(model, tmp_path):
    bare = make_model()
    assert list(model.state_dict()) == list(bare.state_dict())
    model.load_state_dict(bare.state_dict())
    torch.nn.ModuleDict({"inner": model}).load_state_dict(
        {f"inner.{k}": v for k, v in bare.state_dict().items()}
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in bare.state_dict().items() if "embed" not in k})
    model.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    assert list(again.state_dict()) == list(bare.state_dict())
    model.reft.save_pretrained(tmp_path / "adapter", "untied")
    reft = rk.patch(again)
    reft.load_adapter(tmp_path / "adapter", "untied")
    batch = batch_of([5])
    again.eval()
    assert torch.equal(logits(again, batch, ["untied"]), logits(model, batch, ["untied"]))
