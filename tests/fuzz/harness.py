"""Runs a target on many inputs, each with a limit of time."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import Target

__all__ = ["fuzz"]


class Hang(Exception):
    """An input was not dealt with in time."""


def fuzz(target: Target, examples: int, number: int = 0) -> None:
    """Check `examples` inputs, drawn from seed `number`; raises what the first one that fails raises, made small."""

    def one(value: Any) -> None:
        with time_limit(target.seconds):
            target.check(value)

    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    seed(number)(limits(given(target.inputs)(one)))()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang in what runs for longer."""

    def stop(number: int, frame: object) -> None:
        raise Hang(f"nothing after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
