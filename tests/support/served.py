"""A vLLM engine in a process of its own: `python -m support.served SPEC.json`, its answer in JSON at the end.

SPEC: engine (arguments of vllm.LLM), rounds (a list of lists of requests: prompt, new, extra; those of a
round run together), sabotage (what of the plugin is taken out again, to show that a test sees it), v2 (vLLM's
second model runner, in Triton's interpreter).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "PYTHONPATH": str(TESTS),
}

ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 128,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.3,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
}


def serve(folder: Path, spec: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a spec; `error` of what it returns is what the engine died of, if it did."""
    file = folder / "spec.json"
    file.write_text(json.dumps(spec))
    variables = {**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder), **(environment or {})}
    variables.pop("TRITON_INTERPRET", None)
    if spec.get("v2"):
        variables |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
        variables["PYTHONPATH"] = f"{TESTS}{os.pathsep}{TESTS / 'support' / 'triton_cpu'}"
    done = subprocess.run(
        [sys.executable, "-m", "support.served", str(file)],
        env=variables, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    # Workers of their own may still log after the answer.
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"rounds"')]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"error": done.stderr[-6000:]}


def _sabotage(what: str) -> None:
    if what == "keys":
        from vllm.v1.core import kv_cache_utils

        from reft_kernels.serving.vllm import engine, install, register

        register()
        keyed = kv_cache_utils.generate_block_hash_extra_keys
        install.replace_everywhere(keyed, keyed.__wrapped__)
        engine.check_keys = lambda: None
    elif what == "unchecked keys":
        from vllm.v1.core import kv_cache_utils

        from reft_kernels.serving.vllm import install, register

        register()
        keyed = kv_cache_utils.generate_block_hash_extra_keys
        install.replace_everywhere(keyed, keyed.__wrapped__)
    elif what == "hooks":
        from reft_kernels.serving.vllm import install

        install.attach = lambda *arguments: None
        install.runner.offer_state = lambda *arguments: None
    elif what == "import":
        sys.modules["reft_kernels.serving.vllm.frontend"] = None  # type: ignore[assignment]
    else:
        raise ValueError(what)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec.get("sabotage"):
        _sabotage(spec["sabotage"])
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    preempted = 0
    if spec["engine"].get("tensor_parallel_size", 1) * spec["engine"].get("pipeline_parallel_size", 1) == 1:
        from vllm.v1.core.sched.scheduler import Scheduler

        preempt = Scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal preempted
            preempted += 1
            return preempt(*args, **kwargs)

        Scheduler._preempt_request = counting
    engine = LLM(**{**ENGINE, **spec["engine"]})
    rounds = []
    for requests in spec["rounds"]:
        found: list[Any] = [None] * len(requests)
        prompts, parameters, places = [], [], []
        for place, one in enumerate(requests):
            sampling = SamplingParams(
                temperature=0, max_tokens=one["new"], ignore_eos=True, extra_args=one.get("extra")
            )
            try:
                engine.llm_engine.input_processor.process_inputs(
                    "trial", {"prompt_token_ids": one["prompt"]}, sampling, ("generate",)
                )
            except VLLMValidationError as error:
                found[place] = {"refused": str(error)}
                continue
            prompts.append({"prompt_token_ids": one["prompt"]})
            parameters.append(sampling)
            places.append(place)
        outputs = engine.generate(prompts, parameters, use_tqdm=False) if prompts else []
        for place, output in zip(places, outputs):
            found[place] = {
                "tokens": list(output.outputs[0].token_ids),
                "cached": output.num_cached_tokens,
            }
        rounds.append(found)
    runner = None
    if preempted is not None and not spec["engine"].get("tensor_parallel_size"):
        runner = engine.llm_engine.vllm_config.use_v2_model_runner
    print("\n" + json.dumps({"rounds": rounds, "preempted": preempted, "v2": runner}))


if __name__ == "__main__":
    main()
