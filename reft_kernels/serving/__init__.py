"""Adapters in serving engines. The modules here know no engine; the plugins below them do.

config     what a server is started with
ticket     what travels with a request: which adapter, by content, and what it edits
catalog    names → adapters on disk, as the process that takes requests in sees them
block_key  what must stand in the key of a block of a prefix cache
residents  which adapters lie in device memory, and which goes next
beside     a thread that reads adapters while the model runs
worker     all of it in the process that runs the model
vllm       the plugin of vLLM
"""
