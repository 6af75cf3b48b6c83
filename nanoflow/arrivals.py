"""When requests arrive: seconds after the run's start, by a random process with a rate."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.workload_schema import ArrivalSection

__all__ = ["arrival_times", "with_arrivals"]

BLOCK = 4096
"""Gaps drawn at a time."""


def arrival_times(spec: ArrivalSection) -> Iterator[float]:
    """Endless arrival times in seconds, never falling; for `trace`, which has times of its own, see `nanoflow.traces`.

    The gaps of `gamma` have shape b and mean 1 / rate, so their standard deviation is 1 / (rate * sqrt(b)); with b = 1
    they are exponential, a Poisson process. Each gap comes before its request; with `constant` the first is at 0.
    """
    if spec.constant is not None:
        number = 0
        while True:
            yield number / spec.constant
            number += 1
    generator = np.random.default_rng(spec.seed)
    if spec.poisson is not None:
        shape, rate = 1.0, spec.poisson
    else:
        assert spec.gamma is not None, "the arrivals of a trace are in the trace"
        shape, rate = spec.gamma.burstiness, spec.gamma.rate
    now = 0.0
    while True:
        for gap in generator.gamma(shape, 1 / (rate * shape), BLOCK).tolist():
            now += gap
            yield now


def with_arrivals(
    requests: Iterable[ParsedRequest | ErrorRecord], times: Iterator[float]
) -> Iterator[ParsedRequest | ErrorRecord]:
    """`requests` with an arrival each; what is none keeps its place and takes no time."""
    for request in requests:
        yield replace(request, arrival=next(times)) if isinstance(request, ParsedRequest) else request
