"""What the sections of the kernel benchmark share: how to time, how to compare, random data, the machine's ceilings.

Times are of CUDA graphs, replayed hot and one candidate after the other in slices (A B A B ...), so that the clock and
the power limit treat all of them alike. On a machine without a GPU everything still runs, without graphs or watts: good
for trying a section out, not for numbers.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from nanoflow.ops.operation import device_sms
from nanoflow.pipeline.partitions import Partition
from nanoflow.power import EnergyMeter

__all__ = [
    "MeasuredCeilings",
    "Timing",
    "check_row",
    "device_ceilings",
    "energy_joules",
    "floor_ms",
    "on_sms",
    "poisoned",
    "power_limit_watts",
    "randn",
    "relative_error",
    "time_graph",
    "time_interleaved",
    "time_row",
]

SLICE_SECONDS = 0.25
"""One candidate's turn: some steps of the card's energy counter (each some tens of milliseconds)."""
SAMPLE_SECONDS = 1e-3
"""Least time of one timed replay: a graph holds as many calls as that takes."""
MAX_CALLS = 200
"""Calls in one graph at most."""

Candidate = Callable[[], object] | Sequence[Callable[[], object]]


@contextmanager
def on_sms(sms: int | None, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """The current stream has `sms` SMs of a GPU and no others, which stay idle; None for all of them, and on a CPU.

    Raises PartitionError if the device does not give a part of that size.
    """
    if device.type != "cuda" or sms in (None, device_sms(device)):
        yield None
        return
    partition = Partition((sms,), device)
    try:
        torch.cuda.synchronize(device)
        with torch.cuda.stream(partition.streams[0]) as stream:
            yield stream
        torch.cuda.synchronize(device)
    finally:
        partition.close()


@dataclass(frozen=True)
class Timing:
    """Milliseconds, watts and joules of one call."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    watts: float | None
    """Mean power of the whole card while the candidate ran; None if NVML does not tell."""
    joules: float | None
    """Energy of the whole card for one call."""
    calls: int
    """Calls that were timed."""


def time_graph(fn: Candidate, seconds: float = 0.5, device: str | torch.device = "cuda") -> Timing:
    """Time one candidate alone; see `time_interleaved`."""
    return time_interleaved({"": fn}, seconds, device=device)[""]


def time_interleaved(
    candidates: Mapping[str, Candidate],
    seconds: float = 0.5,
    *,
    warmup_seconds: float = 0.3,
    slice_seconds: float = SLICE_SECONDS,
    device: str | torch.device = "cuda",
    stream: torch.cuda.Stream | None = None,
) -> dict[str, Timing]:
    """Time candidates against each other, `seconds` of replays each, after `warmup_seconds` of them all in turn.

    They take turns of about `slice_seconds`: shorter ones compare better, but tell no energy.

    A candidate is a call, or several calls that do the same on different inputs, which then take turns (for inputs that
    would otherwise stay in the L2 cache). It must be launchable in a CUDA graph: no synchronisation, the same buffers
    each time. It is called a few times before capture, so it may compile and tune on its first call.

    Args:
        stream: to capture and replay on, of a part of the SMs (see `on_sms`); a plain one by default.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    replays = {name: _captured(_calls(fn), stream) if on_gpu else _plain(_calls(fn)) for name, fn in candidates.items()}
    ends = time.perf_counter() + warmup_seconds
    while True:
        for replay in replays.values():
            replay.run_for(min(0.05, warmup_seconds))
        if time.perf_counter() >= ends:
            break
    rounds = max(2, math.ceil(seconds / slice_seconds))
    for _ in range(rounds):
        for replay in replays.values():
            replay.run_for(seconds / rounds, record=True)
    timings = {name: replay.timing() for name, replay in replays.items()}
    del replays
    gc.collect()
    return timings


def _calls(fn: Candidate) -> list[Callable[[], object]]:
    return [fn] if callable(fn) else list(fn)


class _Replays:
    """Some calls that run as one, and what their runs have taken."""

    def __init__(
        self, replay: Callable[[], object], calls: int, on_gpu: bool, stream: torch.cuda.Stream | None = None
    ) -> None:
        self._replay, self._calls, self._on_gpu, self._stream = replay, calls, on_gpu, stream
        self._samples: list[float] = []
        self._energy: list[float] = []
        self._energy_seconds = 0.0
        self._counted = 0

    def run_for(self, seconds: float, record: bool = False) -> None:
        """Replay for about `seconds`; the queue is kept some replays deep, so that launching costs nothing."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._run_for(seconds, record)

    def _run_for(self, seconds: float, record: bool) -> None:
        samples: list[float] = []
        self._wait()
        begun = time.perf_counter()
        meter = _EnergyMeter() if self._on_gpu and record else None
        waiting: list[tuple[Any, Any]] = []
        while time.perf_counter() - begun < seconds:
            if not self._on_gpu:
                started = time.perf_counter()
                self._replay()
                samples.append((time.perf_counter() - started) * 1e3 / self._calls)
                continue
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._replay()
            pair[1].record()
            waiting.append(pair)
            if len(waiting) > 8:
                samples.append(self._milliseconds(waiting.pop(0)))
            if meter is not None:
                meter.look()
        samples += [self._milliseconds(pair) for pair in waiting]
        self._wait()
        if record:
            self._samples += samples
            self._counted += len(samples) * self._calls
            used = meter.used() if meter is not None else None
            if used is not None:
                self._energy.append(used[0])
                self._energy_seconds += used[1]

    def _milliseconds(self, pair: tuple[Any, Any]) -> float:
        pair[1].synchronize()
        return float(pair[0].elapsed_time(pair[1])) / self._calls

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def timing(self) -> Timing:
        ordered = sorted(self._samples)
        watts = sum(self._energy) / self._energy_seconds if self._energy else None
        median = statistics.median(ordered)
        return Timing(
            median_ms=median,
            p10_ms=ordered[int(0.1 * (len(ordered) - 1))],
            p90_ms=ordered[int(0.9 * (len(ordered) - 1))],
            watts=watts,
            # Of the time of the calls themselves: the moments between replays belong to nobody.
            joules=watts * median * 1e-3 if watts is not None else None,
            calls=self._counted,
        )


class _EnergyMeter:
    """Energy between two steps of the card's counter, which moves only every some tens of milliseconds."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, float]] = []
        self._looked = time.perf_counter()
        self._last = energy_joules()

    def look(self) -> None:
        """Note a step of the counter; looks at most every two milliseconds."""
        now = time.perf_counter()
        if self._last is None or now - self._looked < 2e-3:
            return
        self._looked, joules = now, energy_joules()
        if joules is not None and joules != self._last:
            self._steps.append((now, joules))
            self._last = joules

    def used(self) -> tuple[float, float] | None:
        """Joules and seconds from the first step to the last; None if fewer than two were seen."""
        if len(self._steps) < 2:
            return None
        (began, first), (ended, last) = self._steps[0], self._steps[-1]
        return last - first, ended - began


def _plain(calls: list[Callable[[], object]]) -> _Replays:
    def replay() -> None:
        for call in calls:
            call()

    replay()
    return _Replays(replay, len(calls), on_gpu=False)


def _captured(calls: list[Callable[[], object]], stream: torch.cuda.Stream | None) -> _Replays:
    side = stream or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for call in calls:
                call()
        torch.cuda.synchronize()
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        for call in calls:
            call()
        ended.record()
        ended.synchronize()
    turn = started.elapsed_time(ended) * 1e-3
    turns = max(1, min(MAX_CALLS // len(calls), math.ceil(SAMPLE_SECONDS / turn)))
    # Of launches that are slower than the kernel, the first measurement is too long: a graph of ten turns tells.
    if turns < 10 and turn < 10 * SAMPLE_SECONDS and len(calls) * 10 <= MAX_CALLS:
        turns = 10
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(turns):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    return _Replays(graph.replay, turns * len(calls), True, stream)


@cache
def _meter() -> EnergyMeter:
    return EnergyMeter(torch.device("cuda"))


def energy_joules() -> float | None:
    """Energy that the current GPU has used since its driver was loaded; None if NVML does not tell."""
    return _meter().joules()


def power_limit_watts() -> float | None:
    """The current GPU's power limit; None if NVML does not tell."""
    return _meter().power_limit_watts()


@dataclass(frozen=True)
class MeasuredCeilings:
    """What this machine sustains, from which floors are taken."""

    tflops: float
    """Of a bfloat16 matrix product [8192, 8192] x [8192, 8192] through torch."""
    gbytes_per_second: float
    """Of a copy between buffers of 2 GiB, bytes read and written both counted."""
    read_gbytes_per_second: float
    """Of a sum over 2 GiB."""


@cache
def device_ceilings(device: str = "cuda") -> MeasuredCeilings:
    """Measure the ceilings, once a process (about four seconds on a GPU)."""
    on_gpu = torch.device(device).type == "cuda"
    size, numel = (8192, 2**30) if on_gpu else (256, 2**20)
    a, b = randn(size, size, device=device), randn(size, size, device=device)
    c = torch.empty_like(a)
    gemm = time_graph(lambda: torch.mm(a, b.t(), out=c), device=device)
    source = randn(numel, device=device)
    target = torch.empty_like(source)
    total = torch.empty((), dtype=torch.bfloat16, device=device)
    copy = time_graph(lambda: target.copy_(source), device=device)
    read = time_graph(lambda: torch.sum(source, dim=0, out=total), device=device)
    return MeasuredCeilings(
        tflops=2 * size**3 / gemm.median_ms / 1e9,
        gbytes_per_second=4 * numel / copy.median_ms / 1e6,
        read_gbytes_per_second=2 * numel / read.median_ms / 1e6,
    )


def floor_ms(device: str, *, flops: float = 0.0, bytes: float = 0.0) -> float:
    """Least milliseconds of work at the measured ceilings: the larger of arithmetic and moving.

    Each input counts as read once and each output as written once.
    """
    ceilings = device_ceilings(str(device))
    rate = max(ceilings.gbytes_per_second, ceilings.read_gbytes_per_second)
    return max(flops / ceilings.tflops / 1e9, bytes / rate / 1e6)


def randn(
    *shape: int,
    device: str | torch.device = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 1.0,
    seed: int | None = None,
) -> torch.Tensor:
    """Normal values, made on the device; fresh every time unless a seed is given. Never time on zeros."""
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, scale, generator=generator)


def poisoned(*shape: int, device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """An output buffer in which an element that nobody writes is NaN."""
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """``|out - reference| / |reference|`` over all elements, in float64; NaN if an element of `out` is."""
    out, reference = out.detach().double(), reference.detach().double()
    return float((out - reference).norm() / reference.norm().clamp_min(1e-300))


def check_row(name: str, shape: str, error: float, limit: float, config: str = "") -> dict[str, Any]:
    """A line of the correctness table. NaN never passes."""
    return {"name": name, "shape": shape, "config": config, "error": error, "limit": limit, "ok": error <= limit}


def time_row(
    name: str,
    shape: str,
    timing: Timing,
    *,
    config: str = "",
    flops: float = 0.0,
    bytes: float = 0.0,
    device: str = "cuda",
    target: str = "",
    met: bool | None = None,
) -> dict[str, Any]:
    """A line of the table of times.

    Args:
        flops: floating-point operations of one call, by its maths (masked pairs left out).
        bytes: least bytes of one call: each input read once, each output written once.
        target: the aim in words, with `met` for whether it was reached.
    """
    seconds = timing.median_ms / 1e3
    return {
        "name": name,
        "shape": shape,
        "config": config,
        "milliseconds": timing.median_ms,
        "p10": timing.p10_ms,
        "p90": timing.p90_ms,
        "flops": flops,
        "bytes": bytes,
        "tflops": flops / seconds / 1e12,
        "gbytes_per_second": bytes / seconds / 1e9,
        "floor_ms": floor_ms(device, flops=flops, bytes=bytes),
        "watts": timing.watts,
        "joules": timing.joules,
        "calls": timing.calls,
        "target": target,
        "met": met,
    }
