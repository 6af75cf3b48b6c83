"""Correctness and speed of every kernel: ``python -m benchmarks.kernels`` (see `__main__`)."""
