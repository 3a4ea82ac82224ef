"""`Beside`: a thread that works while the model runs."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable


class Beside:
    """Runs jobs one after another in a thread of its own, which begins with the first and ends with the
    process, whatever is left to do. A job that raises is logged."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._count = itertools.count()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, job: Callable[[], None], urgent: bool = False) -> None:
        """Has a job done, before all that are not urgent where it is."""
        self._jobs.put((0 if urgent else 1, next(self._count), job))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="reft", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()[2]
            try:
                job()
            except Exception:
                logging.getLogger("vllm.reft_kernels").warning("reft: reading ahead failed", exc_info=True)
