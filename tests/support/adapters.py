"""Random adapters of several methods, ranks, layers and positions."""

from __future__ import annotations

import torch

import reft_kernels as rk

from .models import make_model


def random_adapter(config: rk.ReftConfig, width: int, n_layers: int = 3, scale: float = 1.0, seed: int = 0):
    """An adapter that is not trained and whose edits are large."""
    generator = torch.Generator().manual_seed(seed)
    adapter = rk.Adapter.from_config(config, n_layers, width, generator=generator)
    adapter.trainable = False
    for intervention in adapter.interventions:
        for name in intervention.names:
            if name in ("W", "b", "scaling", "bias", "A", "v"):
                tensor = getattr(intervention, name)
                tensor.data = torch.randn(tensor.shape, generator=generator) * scale + (name == "scaling")
    return adapter


def mixed_adapters(width: int, n_layers: int = 3) -> dict[str, rk.Adapter]:
    """Adapters that differ in all that a batch may mix."""
    configs = {
        "tied": rk.ReftConfig(r=2, layers=[0, 2], positions="f2+l2", share_weights=True),
        "untied": rk.ReftConfig(r=3, layers=[1], positions="f2+l1", act_fn="relu"),
        "everywhere": rk.ReftConfig(method="direft", r=5, layers="all", positions="all"),
        "generated": rk.ReftConfig(r=1, layers=[1, 2], positions="generated", act_fn="silu"),
    }
    return {
        name: random_adapter(config, width, n_layers, 0.3, seed)
        for seed, (name, config) in enumerate(configs.items())
    }


def elementwise_adapters(n_layers: int = 3) -> dict[str, rk.Adapter]:
    """Adapters that scale and shift, of a model whose width is 32 and its heads' 8."""
    configs = {
        "red": rk.ReftConfig(method="red", layers=[0, 2], positions="all"),
        "red ends": rk.ReftConfig(method="red", layers=[1], positions="f2+l1+generated", share_weights=False),
        "jola": rk.ReftConfig(
            method="jola", layers=[1], positions="all", site="head_attention_value_output", heads=[0, 3]
        ),
    }
    widths = {"jola": 8}
    return {
        name: random_adapter(config, widths.get(name, 32), n_layers, 0.3, seed)
        for seed, (name, config) in enumerate(configs.items())
    }


def patch_with_mixed(model: torch.nn.Module, **options: object) -> rk.Reft:
    """rk.patch(model, **options), and `mixed_adapters` on it."""
    reft = rk.patch(model, **options)
    for name, adapter in mixed_adapters(model.config.hidden_size).items():
        reft.add_adapter(name, adapter)
    return reft


def patched(seed: int = 0) -> torch.nn.Module:
    """A tiny Llama of random weights, patched, with `mixed_adapters` on it."""
    model = make_model(seed=seed)
    patch_with_mixed(model)
    return model
