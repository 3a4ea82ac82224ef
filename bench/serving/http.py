"""A vLLM HTTP server in a process of its own, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class ServerError(RuntimeError):
    """The server did not come up, or answered with an error."""


def complete(port: int, body: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
    """POST /v1/completions. Raises ServerError with what the server says."""
    with _post(port, body, timeout) as answer:
        return json.loads(answer.read())


def _post(port: int, body: dict[str, Any], timeout: float) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise ServerError(f"HTTP {error.code}: {error.read().decode()}") from error


@contextlib.contextmanager
def server(
    model: Path,
    log: Path,
    options: dict[str, Any],
    patience: float = 600,
    environment: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """A server of `model` on a free port, which is given, until the block ends.

    options: of vLLM's command line by their Python names; dicts go as JSON, lists as several words.
    environment: variables beside those of this process.

    Raises ServerError.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    for name, value in {"host": "127.0.0.1", "port": port, **options}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            command += [flag, *map(str, value)]
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            command += [flag] if value is True else [flag, text]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **_ENVIRONMENT, **(environment or {})}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + patience
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"the server did not come up; its last words:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield port
    finally:
        # vLLM's own processes are in the group of the one that was started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class HttpEngine:
    """A server under many clients, with the interface of `engines.Engine`: each request from its own thread.

    prompts: of the requests, token ids. options, environment: as in `server`.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        options: dict[str, Any],
        prompts: list[list[int]],
        new: int,
        environment: Mapping[str, str],
    ) -> None:
        self.prompts, self.new = prompts, new
        self._stack = contextlib.ExitStack()
        options = {"served_model_name": "base", **options}
        self._port = self._stack.enter_context(server(model, log, options, environment=environment))
        self._pool = self._stack.enter_context(ThreadPoolExecutor(len(prompts)))

    def run(self, requests: Sequence[Any]) -> dict[str, Any]:
        """One batch: what each request asks for, as in `child`. Times are those that the clients see."""
        start = time.perf_counter()
        found = list(self._pool.map(self._ask, self.prompts, requests))
        took = time.perf_counter() - start
        first, between, tokens = (list(one) for one in zip(*found))
        return {"seconds": took, "first": first, "between": between, "tokens": tokens}

    def _ask(self, prompt: list[int], asked: Any) -> tuple[float, float, list[int]]:
        body: dict[str, Any] = {"model": "base", "prompt": prompt, "temperature": 0, "stream": True}
        body |= {"max_tokens": self.new, "ignore_eos": True, "return_token_ids": True}
        if isinstance(asked, dict):
            body["model"] = asked["lora"][0]
        elif asked is not None:
            body["vllm_xargs"] = {"reft_adapter": asked}
        begin = time.perf_counter()
        first = last = 0.0
        tokens: list[int] = []
        with _post(self._port, body, 600) as answer:
            for line in answer:
                text = line.decode().removeprefix("data: ").strip()
                if not text or text == "[DONE]":
                    continue
                last = time.perf_counter()
                first = first or last
                tokens += json.loads(text)["choices"][0]["token_ids"] or []
        return first - begin, (last - first) / max(self.new - 1, 1), tokens[:4]

    def close(self) -> None:
        self._stack.close()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False
