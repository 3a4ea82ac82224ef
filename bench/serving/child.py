"""A vLLM engine that takes orders: `python -m reft_bench.serving.child SPEC.json`, a line of JSON each.

SPEC: engine (arguments of vllm.LLM), requests, prompt, new (tokens), seed. An order is {"requests": [what
each asks for: null, an adapter's name, or {"lora": [name, number, folder]}]}; the answer has the seconds of
the whole batch, and of each request those to its first token and between its tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def _orders(spec: dict[str, Any], say: Any) -> None:
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(**spec["engine"]).llm_engine
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    prompts = np.random.default_rng(spec["seed"]).integers(
        3, vocabulary, size=(spec["requests"], spec["prompt"])
    )
    say({"ready": True})
    count = 0
    for line in sys.stdin:
        order = json.loads(line)
        added: dict[str, float] = {}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        tokens: dict[str, list[int]] = {}
        start = time.perf_counter()
        for prompt, asked in zip(prompts, order["requests"], strict=True):
            count += 1
            lora = LoRARequest(*asked["lora"]) if isinstance(asked, dict) else None
            extra = {"reft_adapter": asked} if isinstance(asked, str) else None
            sampling = SamplingParams(
                temperature=0, max_tokens=spec["new"], ignore_eos=True, extra_args=extra, detokenize=False
            )
            name = str(count)
            added[name] = time.perf_counter()
            engine.add_request(name, {"prompt_token_ids": prompt.tolist()}, sampling, lora_request=lora)
        while engine.has_unfinished_requests():
            for output in engine.step():
                now = time.perf_counter()
                first.setdefault(output.request_id, now)
                last[output.request_id] = now
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        took = time.perf_counter() - start
        between = max(spec["new"] - 1, 1)
        say(
            {
                "seconds": took,
                "first": [first[name] - added[name] for name in added],
                "between": [(last[name] - first[name]) / between for name in added],
                "tokens": [tokens[name][:4] for name in added],
            }
        )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    # What vLLM prints must not stand among the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    _orders(spec, say)


if __name__ == "__main__":
    main()
