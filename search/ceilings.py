"""Ceilings measured on this machine: what a large GEMM and a long read of memory reach."""

import time
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import cast

import torch

from nanoflow.ops.linear import Linear
from nanoflow.ops.operation import NanoContext
from nanoflow.search.cost_model import Ceilings

__all__ = ["measure_ceilings"]

SECONDS = 0.3


@cache
def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """FLOP/s and bytes/s that `device` sustains in `dtype`, each the best of a few repetitions (a second in all).

    The GEMM is the engine's own linear operation with its preferred kernel. On random data: zeros draw less power and
    run faster than real work does.
    """
    place = torch.device(device)
    on_gpu = place.type == "cuda"
    size = 8192 if on_gpu else 1024
    gemm = _best_seconds(_gemm(size, place, dtype), place)
    numel = (2**30 if on_gpu else 2**28) // dtype.itemsize
    block = torch.empty(numel, device=place, dtype=dtype).uniform_()
    read = _best_seconds(lambda: block.amax(), place)
    return Ceilings(flops=2 * size**3 / gemm, bytes_per_second=block.numel() * block.element_size() / read)


def _gemm(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A product of two [size, size] matrices through `Linear`."""
    linear = Linear("gemm", "source", "target", size, [size], ["gemm"])
    source, weight = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    context = SimpleNamespace(
        weights={"weight": linear.pack("weight", weight)},
        rows={"source": source, "target": torch.empty_like(source)}.__getitem__,
    )
    kernel = linear.kernels[linear.preferred_kernel(device, dtype)]
    return lambda: kernel(cast(NanoContext, context))


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Shortest of at least three calls, within about `SECONDS`."""

    def wait() -> None:
        if device.type == "cuda":
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
        if repetition >= 2 and ended - begun > SECONDS:
            break
    return best
