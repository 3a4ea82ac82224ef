"""A vLLM server in a process of its own, and requests to it."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .served import ENGINE, ENVIRONMENT

_PATIENCE = 1200


class Server:
    """Where it listens, and what it said."""

    def __init__(self, port: int, log: Path, model: str) -> None:
        self.port, self.log, self.model = port, log, model

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, answer)"""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                text, status = answer.read().decode(), answer.status
        except urllib.error.HTTPError as error:
            text, status = error.read().decode(), error.code
        try:
            return status, json.loads(text)
        except json.JSONDecodeError:
            return status, text

    def complete(self, prompt: list[int], new: int, **more: Any) -> tuple[int, Any]:
        """(status, the tokens or the error)"""
        body = {"model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, **more}
        status, answer = self.post("/v1/completions", body)
        return status, answer["choices"][0]["token_ids"] if status == 200 else json.dumps(answer)


@contextlib.contextmanager
def running(model: Path, folder: Path, additional: dict[str, Any], **options: Any) -> Iterator[Server]:
    """A server of a model, until the end of the block. options: of vLLM's command line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    settings = {**ENGINE, "served_model_name": "tiny", "port": port, "host": "127.0.0.1", **options}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--additional-config", json.dumps(additional)]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, str(value)]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder)}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(process, port, log)
        yield Server(port, log, "tiny")
    finally:
        # vLLM's own children are in its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not come up:\n{log.read_text()[-6000:]}")
