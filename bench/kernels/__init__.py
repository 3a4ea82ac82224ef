"""reft-bench kernels: the op alone, beside torch's own ways of doing the same."""
