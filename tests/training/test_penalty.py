"""ReftTrainer's loss has the penalties of the adapters that a batch names, once a step."""

from __future__ import annotations

import pytest
import torch
from support.models import make_model

import reft_kernels as rk
from reft_kernels.adapter.elementwise import Red

pytestmark = pytest.mark.models
pytest.importorskip("accelerate")
RATE, PULL = 0.01, 3.0


class Pulled(Red):
    """RED, and a penalty whose gradient is the same everywhere."""

    def penalty(self, p, options):
        return PULL * p["bias"].sum()


@pytest.fixture(autouse=True)
def pulled():
    rk.register_method("pulled", Pulled())
    yield
    rk.unregister_method("pulled")


def rows(names: list[str]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for name in names:
        ids = torch.randint(3, 97, (6,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:], "adapter_names": name})
    return made


def trained(folder, method: str, steps: int = 1, **arguments):
    """Biases by adapter after training on eight rows a step, of which none names "idle"."""
    from transformers import TrainingArguments

    model = make_model(gain=1.0)
    reft = rk.patch(model)
    for name in ("a", "idle"):
        reft.add_adapter(name, rk.ReftConfig(method=method, layers=[1], positions="all"))
    trainer = rk.ReftTrainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        rk.ReftCollator(pad_token_id=0),
        train_dataset=rows(["a"] * 16),
        eval_dataset=rows(["a", "idle"]),
    )
    trainer.train()
    return trainer, {name: it.interventions[0].bias.detach().clone() for name, it in reft.adapters.items()}


@pytest.mark.parametrize(("size", "accumulated"), [(8, 1), (2, 4)])
def test_it_counts_once_a_step_however_the_step_is_cut(tmp_path, size, accumulated):
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    _, without = trained(tmp_path, "red", **cut)
    _, with_it = trained(tmp_path, "pulled", **cut)
    for name, pull in {"a": PULL, "idle": 0.0}.items():
        moved = with_it[name] - without[name]
        torch.testing.assert_close(moved, torch.full_like(moved, -RATE * pull), rtol=1e-4, atol=1e-6)


def test_evaluation_is_without_it(tmp_path):
    trainer, found = trained(tmp_path, "pulled", per_device_train_batch_size=8)
    assert abs(found["a"].sum()) > 0.5
    plain, model = trainer.evaluate()["eval_loss"], trainer.model.eval()
    batch = trainer.data_collator(rows(["a", "idle"]))
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(plain, rel=1e-5)
    for key in ("adapter_names", "reft_adapter_names"):
        loss = trainer.compute_loss(model.train(), {**_without_names(batch), key: [["a", "idle"], None]})
        want = model(**_without_names(batch), adapter_names=[["a", "idle"], None]).loss
        extra = sum(adapter.penalty() for adapter in model.reft.adapters.values())
        torch.testing.assert_close(loss, want + extra)


def _without_names(batch: dict) -> dict:
    return {key: value for key, value in batch.items() if "adapter_names" not in key}
