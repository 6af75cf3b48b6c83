"""Moments on a device's time line."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Mark", "StepMarks"]


class Mark:
    """The moment at which all that was queued on the current stream before it is done; on a CPU, now.

    In the capture of a CUDA graph it is the moment in each replay, the last one that has come.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            # A blocking wait leaves the processor to other threads.
            self._event = torch.cuda.Event(  # type: ignore[no-untyped-call]
                enable_timing=True, blocking=True, external=torch.cuda.is_current_stream_capturing()
            )
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def wait(self) -> None:
        """Until the moment has come."""
        if self._event is not None:
            self._event.synchronize()

    def until(self, later: "Mark") -> float:
        """Seconds from this moment to a later one; both have come."""
        if self._event is None or later._event is None:
            return later._seconds - self._seconds
        return float(self._event.elapsed_time(later._event)) / 1e3


class StepMarks:
    """When each step of an iteration started and ended on its stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun: Mark | None = None
        self._steps: dict[int, tuple[Mark, Mark]] = {}

    def begin(self) -> None:
        """An iteration begins on the current stream; the marks of the one before are forgotten."""
        self._begun = Mark(self._device)
        self._steps = {}

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Around the launch of a step."""
        started = Mark(self._device)
        yield
        self._steps[index] = started, Mark(self._device)

    def times(self) -> list[tuple[float, float]]:
        """Seconds from the begin to each step's start and end, by step; all of them have come."""
        if self._begun is None:
            raise ValueError("no iteration has run yet")
        begun = self._begun
        return [(begun.until(a), begun.until(b)) for _, (a, b) in sorted(self._steps.items())]
