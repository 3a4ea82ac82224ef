"""What a system is: it makes a runner for a setup; a runner does prefills, decode steps and generations."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import reft_kernels as rk

from . import adapters, models

BASELINE, CONTROL = "merged LoRA", "merged LoRA (A/A)"


class Unable(Exception):
    """A system can't do a setup; the message says why. The others go on."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences other libraries' warnings and prints while they are imported or set up."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclasses.dataclass(frozen=True)
class Point:
    """What is swept, apart from the phase. adapters: distinct ones in the batch; layers: how many edited;
    heads: of each layer, at sites of one head."""

    batch: int
    prompt: int
    rank: int
    layers: int
    positions: str
    adapters: int
    method: str = adapters.METHOD
    site: str = adapters.SITE
    heads: int | None = None


class Setup:
    """A point on a model: the inputs, and the adapters that all ReFT systems share.

    Attributes:
        original: the model as loaded; PEFT's unmerged LoRA runs on its weights.
        merged: a LoRA merged into it by PEFT, the baseline. The ReFT systems run on these weights: values
            don't change what a forward costs, and the memory is then the same.
        lora_targets: modules that the LoRA is on.
        input_ids: [batch, prompt]. next_ids: [batch, 1], the tokens of the decode step.
        layers: numbers of the edited layers.
        adapter_of: [batch] number of each row's adapter.
        adapters: of the point's method at its site, not trainable.
        compiled: whether generations have a static cache and a compiled decode step.
        compile_options: for transformers' CompileConfig, where they are; its defaults otherwise.
    """

    def __init__(self, original: nn.Module, point: Point, seed: int, compiled: bool = False) -> None:
        self.original, self.point, self.seed, self.compiled = original, point, seed, compiled
        depth = models.depth(original)
        try:
            width = adapters.width_at(original, point.site, point.heads)
        except ValueError as error:
            raise Unable(str(error)) from error
        if point.layers > depth:
            raise Unable(f"{point.layers} layers are to be edited, the model has {depth}")
        if point.rank > width:
            raise Unable(f"rank {point.rank} is more than the model's width {width} at {point.site}")
        if point.adapters > point.batch:
            raise Unable(f"{point.adapters} distinct adapters don't fit a batch of {point.batch}")
        limit = getattr(original.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and point.prompt >= limit:
            raise Unable(f"a prompt of {point.prompt} tokens leaves no room in the model's {limit} positions")
        parameter = next(original.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        generator = torch.Generator().manual_seed(seed)
        vocabulary = original.config.get_text_config().vocab_size
        shape = (point.batch, point.prompt + 1)
        tokens = torch.randint(3, vocabulary, shape, generator=generator).to(self.device)
        self.input_ids, self.next_ids = tokens[:, :-1].contiguous(), tokens[:, -1:].contiguous()
        self.layers = models.spread(point.layers, depth)
        self.adapter_of = [row % point.adapters for row in range(point.batch)]
        config = adapters.config_of(
            point.method, point.site, point.heads, point.rank, self.layers, point.positions
        )
        self.adapters = [adapters.make(config, depth, width, generator) for _ in range(point.adapters)]
        self.merged: nn.Module = original
        self.compile_options: dict[str, Any] = {}

    def eager(self) -> Setup:
        """The same with generations that are not compiled."""
        other = copy.copy(self)
        other.compiled = False
        return other

    @property
    def every_position(self) -> bool:
        return self.point.positions == "all"

    def prompt_positions(self) -> list[int]:
        """Edited positions of a prompt."""
        parsed = rk.Positions.parse(self.point.positions)
        return parsed.resolve(self.point.prompt).tolist()


def compiled_generation(**options: Any) -> dict[str, Any]:
    """Arguments of transformers' generate for a static cache and a compiled decode step, on any device.

    options: those of transformers' CompileConfig.
    """
    from transformers import CompileConfig

    config = CompileConfig(**options)
    config._compile_all_devices = True  # transformers compiles on accelerators only
    return {"cache_implementation": "static", "compile_config": config}


class Runner:
    """Runs one system's model. A decode step follows a prefill; `rewind` undoes it.

    Attributes:
        model: what is called.
        attributed: packages whose hooks and wrappers on the model are the system's own cost; empty where
            that can't be told apart.
        single: all rows take the first adapter, as this system can't mix.
    """

    attributed: tuple[str, ...] = ()
    single = False

    def __init__(self, setup: Setup, model: nn.Module) -> None:
        self.setup, self.model = setup, model
        self.cache: Any = None

    def context(self) -> contextlib.AbstractContextManager:
        """Entered around every use."""
        return contextlib.nullcontext()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that this system adds to every call of the model."""
        return {}

    def call(self, decode: bool, **inputs: Any) -> Any:
        """One forward; returns transformers' output."""
        return self.model(**inputs, **self.arguments())

    def prefill(self) -> Tensor:
        """Runs the prompts; returns the logits of their last tokens, [batch, vocabulary]."""
        out = self.call(False, input_ids=self.setup.input_ids, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def decode(self) -> Tensor:
        """Runs one more token of each row; returns [batch, vocabulary]."""
        out = self.call(True, input_ids=self.setup.next_ids, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1]

    def rewind(self) -> None:
        """Cuts the cache back to the prompts."""
        excess = self.cache.get_seq_length() - self.setup.point.prompt
        if excess > 0:
            self.cache.crop(-excess)

    def generate(self, tokens: int, **options: Any) -> Tensor:
        """Greedy generation of exactly `tokens` tokens; returns [batch, prompt + tokens].

        options: further arguments of transformers' generate.
        """
        return self.model.generate(**self.generation(tokens), **options, **self.arguments())

    def generation(self, tokens: int) -> dict[str, Any]:
        ids = self.setup.input_ids
        how = compiled_generation(**self.setup.compile_options) if self.setup.compiled else {}
        return how | {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
            "do_sample": False,
        }


class System:
    """A way of adapting a model. `why_not` is asked first, then `build`."""

    name = ""
    #: "lora" or "reft": what its output is compared with.
    family = "reft"

    def why_not(self, setup: Setup) -> str | None:
        """Why it can't do a setup, or None."""
        return None

    def build(self, setup: Setup) -> Runner:
        raise NotImplementedError
