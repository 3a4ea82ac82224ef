"""Serving engines, each in a process of its own: what `reft-bench serve` measures."""
