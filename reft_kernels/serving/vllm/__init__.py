"""The plugin of vLLM: adapters in every batch of an unmodified vLLM. docs/serving.md is for its users.

vLLM calls `register` in each of its processes (entry point group "vllm.general_plugins"). Nothing changes
there unless the server was started with `additional_config={"reft": {…}}`.

install     the places at which vLLM is hooked, all of them
frontend    the process that takes requests in: which adapter, and refusals
staging     adapters read by all workers before a request for them is scheduled
http        the same of the HTTP server: adapters by `model`, loaded and unloaded at run time
engine      the process that schedules: keys of the prefix cache, and whether all workers are there
layers      the process that runs the model: finds its layers and what they return
model       the edits in them
runner      which rows of a step are whose, for both of vLLM's model runners
extension   what the engine asks of a worker
"""

from __future__ import annotations

import logging

_registered = False


def register() -> None:
    """Hooks vLLM in this process. vLLM may call it several times.

    Where that fails, a server that asks for adapters does not start; others do.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from . import guard

    try:
        from . import install

        install.install()
    except Exception as error:
        # Not raised: vLLM would then not start without adapters either.
        logging.getLogger("vllm.reft_kernels").warning("reft: could not hook this vLLM", exc_info=True)
        guard.refuse(error)
