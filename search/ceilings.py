"""Ceilings measured on this machine: what a large GEMM and a long read of memory reach."""

import time
from collections.abc import Callable
from functools import cache

import torch

from nanoflow.search.cost_model import Ceilings

__all__ = ["measure_ceilings"]


@cache
def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """FLOP/s and bytes/s that `device` sustains in `dtype`, each the best of a few repetitions (under a second in all).

    On random data: zeros draw less power and run faster than real work does.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = 8192 if on_gpu else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    numel = (2**30 if on_gpu else 2**27) // left.element_size()
    block = torch.empty(numel, device=device, dtype=dtype).uniform_()
    gemm = _best_seconds(lambda: torch.mm(left, right, out=product), device)
    read = _best_seconds(lambda: block.amax(), device)
    return Ceilings(flops=2 * size**3 / gemm, bytes_per_second=block.numel() * block.element_size() / read)


def _best_seconds(run: Callable[[], object], device: str) -> float:
    """Shortest of at least three calls, within about a third of a second."""

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    best, begun = float("inf"), time.perf_counter()
    for repetition in range(50):
        started = time.perf_counter()
        run()
        wait()
        ended = time.perf_counter()
        best = min(best, ended - started)
        if repetition >= 2 and ended - begun > 0.3:
            break
    return best
