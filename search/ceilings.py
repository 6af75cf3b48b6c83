"""Ceilings measured on this machine: what a large GEMM, a long read of memory and a large all-reduce sustain."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import cast

import torch

from nanoflow.ops.communicator import Communicator
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.device_batch import BatchPart, DeviceBatch
from nanoflow.ops.linear import Linear
from nanoflow.ops.operation import NanoContext
from nanoflow.search.cost_model import Ceilings

__all__ = ["measure_ceilings", "measure_link"]

SECONDS = 0.5
"""Of measuring each ceiling on a GPU, after as long a time of the same work: a cold card runs faster than a hot one."""
CPU_SECONDS = 0.3
"""On a CPU, which runs warm enough after one call."""
LINK_BYTES = {"cuda": 2**25, "cpu": 2**20}
"""Of the buffer that is added up: on a GPU as much as two thousand rows of a large model."""
LINK_CALLS = {"cuda": (20, 60), "cpu": (1, 5)}
"""Before those that count, and those. All ranks make as many."""
_QUEUED = 8
"""Calls that are launched ahead on a GPU, so that launching costs nothing."""


@cache
def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """FLOP/s and bytes/s that `device` sustains in `dtype`: medians of hot repetitions (two seconds in all on a GPU).

    The GEMM is the engine's own linear operation with its preferred kernel, the read a sum over a block far larger than
    any cache. On random data: zeros draw less power and run faster than real work does.
    """
    place = torch.device(device)
    on_gpu = place.type == "cuda"
    size = 8192 if on_gpu else 1024
    gemm = _median_seconds(_gemm(size, place, dtype), place)
    block = torch.empty(_block_bytes(place) // dtype.itemsize, device=place, dtype=dtype).uniform_()
    total = torch.empty((), device=place, dtype=dtype)
    read = _median_seconds(lambda: torch.sum(block, dim=0, out=total), place)
    return Ceilings(flops=2 * size**3 / gemm, bytes_per_second=block.numel() * block.element_size() / read)


def measure_link(communicator: Communicator, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s that a rank sends in a large all-reduce of the communicator's library; all ranks must call it.

    Counted as `nanoflow.ops.collectives` does: 2 (N - 1) / N of the buffer. It takes some 20 ms on a GPU. Raises
    CommunicatorError.
    """
    elements = LINK_BYTES[device.type] // dtype.itemsize
    buffer = torch.empty(elements, device=device, dtype=dtype)
    before, count = LINK_CALLS[device.type]

    def run(times: int) -> float:
        """Seconds of a call, the ranks in step."""
        buffer.uniform_()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            communicator.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / times

    run(before)
    sent = 2 * (communicator.size - 1) / communicator.size * elements * dtype.itemsize
    return sent / run(count)


def _block_bytes(device: torch.device) -> int:
    """2 GiB of a GPU if half of what the KV cache leaves holds it, as `benchmarks/kernels` reads; 256 MiB of a CPU."""
    if device.type != "cuda":
        return 2**28
    free = torch.cuda.mem_get_info(device)[0]
    return min(2**31, max(2**28, free // 2 // 2**20 * 2**20))


def _gemm(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A product of two [size, size] matrices through `Linear`."""
    linear = Linear("gemm", "source", "target", size, [size], ["gemm"])
    source, weight = (torch.empty(size, size, device=device, dtype=dtype).normal_() for _ in range(2))
    context = NanoContext(
        batch=cast(DeviceBatch, SimpleNamespace(arrays=DeviceArrays(device))),
        part=cast(BatchPart, SimpleNamespace(rows=slice(None))),
        layer=0,
        buffers={"source": source, "target": torch.empty_like(source)},
        weights={"weight": linear.pack("weight", weight)},
        kv=torch.empty(0, device=device),
    )
    kernel = linear.kernels[linear.preferred_kernel(device, dtype)]
    return lambda: kernel(context)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of at least three calls, hot."""
    if device.type != "cuda":
        run()
        return statistics.median(_cpu_times(run))
    with torch.cuda.device(device):
        _gpu_times(run)
        return statistics.median(_gpu_times(run))


def _cpu_times(run: Callable[[], object]) -> list[float]:
    times: list[float] = []
    while len(times) < 3 or sum(times) < CPU_SECONDS:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _gpu_times(run: Callable[[], object]) -> list[float]:
    """Seconds of each call, by the device's own clock."""
    times: list[float] = []
    ends = time.perf_counter() + SECONDS
    queued: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def collect() -> None:
        began, ended = queued.popleft()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)

    while len(times) < 3 or time.perf_counter() < ends:
        pair = _event(), _event()
        pair[0].record()
        run()
        pair[1].record()
        queued.append(pair)
        if len(queued) == _QUEUED:
            collect()
    while queued:
        collect()
    return times
