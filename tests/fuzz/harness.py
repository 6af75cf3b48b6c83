"""Runs a target on many inputs, each with a limit of time."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.mutations import variants
from tests.fuzz.targets import Target

__all__ = ["fuzz"]


class Hang(Exception):
    """An input was not dealt with in time."""


def fuzz(target: Target, examples: int, number: int = 0, *, each: int = 0) -> int:
    """Check `examples` inputs, drawn from seed `number`, and `each` changed copies of every one that is bytes or text.

    Returns how many were checked; raises what the first one that fails raises, made small.
    """
    checked = 0

    def one(value: Any) -> None:
        nonlocal checked
        for variant in (value, *variants(value, each)):
            try:
                with time_limit(target.seconds):
                    target.check(variant)
            except Exception as error:
                error.add_note(f"with {variant!r}")
                raise
            checked += 1

    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    seed(number)(limits(given(target.inputs)(one)))()
    return checked


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
