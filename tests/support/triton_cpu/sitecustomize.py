"""For processes that have this folder on their path: Triton's interpreter has no backend, without which vLLM
takes Triton for missing. A stand-in that says it is not active makes up for it, in vLLM's workers too.
"""

from __future__ import annotations

import triton


class Driver:
    @staticmethod
    def is_active() -> bool:
        return False


class Backend:
    driver = Driver


triton.backends.backends["cpu"] = Backend
