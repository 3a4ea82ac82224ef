"""JoLA's gates: with noise in training, one draw for a whole forward; none elsewhere; and their penalty."""

from __future__ import annotations

import pytest
import torch
from support.models import batch_of, make_model

import reft_kernels as rk
from reft_kernels.adapter import Intervention
from reft_kernels.sites import HEAD_SITE

pytestmark = pytest.mark.models
HEADS, WIDTH = [0, 2], 8


def patched(**options):
    """Gates that are neither open nor shut, and edits that can be seen."""
    model = make_model(gain=1.0)
    reft = rk.patch(model)
    torch.manual_seed(0)
    config = rk.ReftConfig(
        method="jola", site=HEAD_SITE, heads=HEADS, layers=[0, 2], positions="all", options=options or None
    )
    adapter = reft.add_adapter("mine", config)
    for one in adapter.interventions:
        for name in ("A", "v"):
            getattr(one, name).data.mul_(500)
    return model, adapter


def gates(log_g: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """As the authors' code has them."""
    low, high = -0.1, 1.1
    if uniform is not None:
        noise = (1 - 2 * 1e-6) * uniform + 1e-6
        concrete = torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + log_g) / 0.33)
    else:
        concrete = torch.sigmoid(log_g)
    return torch.clamp(concrete * (high - low) + low, 0, 1)


def seeded(model, batch, **call):
    torch.manual_seed(8)
    return model(**batch, labels=batch["input_ids"], **call)


def test_a_fresh_one_is_initialised_as_the_authors_do():
    _, adapter = patched()
    ones = adapter.interventions
    assert [(one.layer, one.head) for one in ones] == [(0, 0), (0, 2), (2, 0), (2, 2)]
    for one in ones:
        assert 0.05 < one.A.std() < 1.5 and 0.05 < one.v.std() < 1.5  # 0.001, times 500
        assert abs(one.log_g1) <= (6 / 33) ** 0.5 and abs(one.log_g2) <= (6 / 33) ** 0.5


def test_the_fold_in_training_is_the_formula():
    _, adapter = patched()
    one: Intervention = adapter.interventions[1]
    torch.manual_seed(3)
    drawn = one.draw()
    torch.manual_seed(3)
    u1, u2 = torch.rand(1), torch.rand(1)
    h = torch.randn(5, WIDTH)
    fold = one.fold(drawn=drawn)
    g1, g2 = gates(one.log_g1, u1), gates(one.log_g2, u2)
    want = (one.A * g2[:, None] + 1) * h + g1[:, None] * one.v
    torch.testing.assert_close(h * (1 + fold.scale_less_one) + fold.shift, want)
    want = (one.A * gates(one.log_g2)[:, None] + 1) * h + gates(one.log_g1)[:, None] * one.v
    torch.testing.assert_close(h * (1 + one.fold().scale_less_one) + one.fold().shift, want)


def test_noise_in_training_and_nowhere_else():
    model, _ = patched()
    batch = batch_of([6, 5])
    with torch.no_grad():
        still = [model(**batch).logits for _ in range(2)]
    assert torch.equal(*still)
    model.train()
    first, again = seeded(model, batch).logits, seeded(model, batch).logits
    other = model(**batch).logits
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, still[0])
    model.reft.adapters["mine"].trainable = False
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, still[0])


def test_an_evaluation_between_forward_and_backward_changes_nothing():
    model, adapter = patched()
    batch = batch_of([6, 5])
    wanted = []
    for between in (False, True):
        model.train()
        adapter.zero_grad()
        loss = seeded(model, batch).loss
        if between:
            with torch.no_grad():
                model.eval()(**batch)
        loss.backward()
        wanted.append([p.grad.clone() for p in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*wanted))


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_run_again_run_with_the_same_noise(reentrant):
    model, adapter = patched()
    batch = batch_of([6, 5])
    model.train()
    loss = seeded(model, batch).loss
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    assert any(grad.abs().max() > 0 for name, grad in wanted.items() if "log_g" in name)
    adapter.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = seeded(model, batch).loss
    torch.testing.assert_close(found, loss)
    found.backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)


def test_the_penalty_is_the_authors():
    """Heads' gates stand in [heads, 1] there, and the mean over heads is divided by layers and heads."""
    layers, heads = 2, len(HEADS)
    weight = 1 / (layers * heads * heads)
    _, adapter = patched(penalty=weight, gate_lambda=0.1)
    want = 0.0
    for layer in (0, 2):
        mine = [one for one in adapter.interventions if one.layer == layer]
        for name, factor in (("log_g1", 0.1), ("log_g2", 0.9)):
            log_alpha = torch.cat([getattr(one, name) for one in mine])[:, None]
            low, high = torch.tensor((-0.1, 1.1))
            p_open = torch.sigmoid(log_alpha - 0.33 * torch.log(-low / high)).clamp(1e-6, 1 - 1e-6)
            want = want + factor * (p_open.sum() / heads) / (layers * heads)
    torch.testing.assert_close(adapter.penalty(), want)
    adapter.penalty().backward()
    assert all((one.log_g1.grad > 0).all() and one.A.grad is None for one in adapter.interventions)


def test_it_is_saved_and_loaded_with_its_gates(tmp_path):
    model, adapter = patched(penalty=0.5)
    batch = batch_of([6])
    adapter.save_pretrained(tmp_path)
    model.reft.load_adapter(tmp_path, "again")
    with torch.no_grad():
        mine, again = (model(**batch, adapter_names=[name]).logits for name in ("mine", "again"))
    assert torch.equal(mine, again)
    assert model.reft.adapters["again"].interventions[0].options == {"penalty": 0.5, "gate_lambda": 4e-5}
    with pytest.raises(ValueError, match=r"options: gate_lambda must be in \[0, 1\], was 2"):
        rk.ReftConfig(method="jola", site=HEAD_SITE, heads=[0], options={"gate_lambda": 2.0})
    with pytest.raises(ValueError, match="site: jola means something at 'head_attention_value_output' only"):
        rk.ReftConfig(method="jola", positions="all")
