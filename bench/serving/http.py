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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class ServerError(RuntimeError):
    """The server did not come up, or answered with an error."""


def complete(port: int, body: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
    """POST /v1/completions. Raises ServerError with what the server says."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise ServerError(f"HTTP {error.code}: {error.read().decode()}") from error


@contextlib.contextmanager
def server(model: Path, log: Path, options: dict[str, Any], patience: float = 600) -> Iterator[int]:
    """A server of `model` on a free port, which is given, until the block ends.

    options: of vLLM's command line by their Python names; dicts go as JSON. Raises ServerError.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    for name, value in {"host": "127.0.0.1", "port": port, **options}.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [text])
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **_ENVIRONMENT}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
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


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False
