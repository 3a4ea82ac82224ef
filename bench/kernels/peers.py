"""Peers that need a GPU: shrink and expand as two Triton launches, and vLLM's own LoRA kernels."""

from __future__ import annotations

import importlib.util
import inspect
import os

import torch

from .base import System


def _needs_cuda(device: str) -> str | None:
    if torch.device(device).type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs a CUDA device"


class ShrinkExpand(System):
    """v = D h with the sum over d split and added up by fp32 atomics, then h += Uᵀ(v + c): three launches.

    This is how multi-LoRA serving does it (the memset of v is the third launch).
    """

    name = "shrink+expand"

    def why_not(self, case, device):
        if case.direction == "backward":
            return "has no backward"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return _needs_cuda(device)

    def forward(self, problem):
        from .shrink_expand import shrink_expand_

        inner = torch.empty(problem.h.shape[0], problem.case.rank, device=problem.h.device)
        arguments = (problem.h, problem.down, problem.up, problem.bias, problem.index, inner)
        return lambda: shrink_expand_(*arguments)


class VllmLora(System):
    """vLLM's lora_shrink and lora_expand, with c added to the inner values between them."""

    name = "vllm"

    def why_not(self, case, device):
        if case.direction == "backward":
            return "has no backward"
        if importlib.util.find_spec("vllm") is None:
            return "vLLM is not installed"
        return _needs_cuda(device)

    def forward(self, problem):
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

        h, case = problem.h, problem.case
        meta = LoRAKernelMeta.make(case.adapters, case.rows, device=h.device)
        meta.prepare_tensors(problem.index.to(torch.int32))
        # Later versions ask in addition whether launches depend on the number of active adapters.
        extra = {"specialize_active_lora"} & inspect.signature(meta.meta_args).parameters.keys()
        arguments = meta.meta_args(case.rows, **dict.fromkeys(extra, False))
        inner = torch.empty(1, case.rows, case.rank, device=h.device)
        down, up = problem.down, problem.up.transpose(1, 2).contiguous()
        bias = problem.bias.float()[problem.index].unsqueeze(0)

        def call() -> None:
            lora_shrink(h, (down,), inner, *arguments, 1.0)
            inner.add_(bias)
            lora_expand(inner, (up,), h, *arguments, offset_start=0, add_inputs=True)

        return call
