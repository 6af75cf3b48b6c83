"""Moments on a device's time line."""

import time

import torch

__all__ = ["Mark"]


class Mark:
    """The moment at which all that was queued on the current stream before it is done; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = 0.0
        if device.type == "cuda":
            # A blocking wait leaves the processor to other threads.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
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
