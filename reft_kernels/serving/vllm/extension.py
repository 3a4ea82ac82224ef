"""`WorkerExtension`: what the engine asks of a worker (vLLM's option worker_extension_cls)."""

from __future__ import annotations

from typing import Any

from ... import __version__
from ..worker import Worker
from .model import worker_of

NAME = "reft_kernels.serving.vllm.extension.WorkerExtension"


class WorkerExtension:
    """Methods that vLLM adds to its workers, which must have none of these names."""

    model_runner: Any

    def reft_worker(self) -> Worker | None:
        return worker_of(self.model_runner.get_model())

    def reft_report(self) -> dict[str, Any]:
        """The plugin's version, and the layers that are edited here; None where the model was not hooked."""
        worker = self.reft_worker()
        return {"plugin": __version__, "layers": None if worker is None else list(worker.layers)}

    def reft_stage(self, tickets: dict[str, dict[str, Any]]) -> dict[str, str | None]:
        """See `Worker.staged`; those of which nothing is known are read beside the steps from now on."""
        worker = self.reft_worker()
        assert worker is not None
        return {key: worker.stage_beside(key, given) for key, given in tickets.items()}
