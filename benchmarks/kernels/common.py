"""What the sections of the kernel benchmark share: how to time, how to compare, random data, the machine's ceilings.

Times are of CUDA graphs, replayed hot and one candidate after the other in slices (A B A B ...), so that the clock and
the power limit treat all of them alike. On a machine without a GPU everything still runs, without graphs or watts: good
for trying a section out, not for numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from nanoflow.power import EnergyMeter
from nanoflow.search import timing
from nanoflow.search.timing import Candidate, Timing, on_sms

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


def time_graph(fn: Candidate, seconds: float = 0.5, device: str | torch.device = "cuda") -> Timing:
    """Time one candidate alone; see `time_interleaved`."""
    return time_interleaved({"": fn}, seconds, device=device)[""]


def time_interleaved(
    candidates: Mapping[str, Candidate],
    seconds: float = 0.5,
    *,
    device: str | torch.device = "cuda",
    **options: Any,
) -> dict[str, Timing]:
    """Time candidates against each other, with the GPU's energy; see `nanoflow.search.timing.time_interleaved`."""
    joules = energy_joules if torch.device(device).type == "cuda" else None
    return timing.time_interleaved(candidates, seconds, device=device, joules=joules, **options)


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
