"""A run's course over time in a fixed amount of memory: what was done, added up in intervals of equal length.

An iteration's work is spread over the time that it took, so that one that takes longer than an interval shows as a
plateau and not as a spike beside gaps. What is a state and not work (running requests, KV pages) is weighted with time.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLUMNS", "Amounts", "Timeline", "amounts", "per_second", "shares"]

Amounts = NDArray[np.float64]
"""One value for each of `COLUMNS`."""

COLUMNS = (
    "seconds",
    "busy_seconds",
    "iterations",
    "decode_rows",
    "prefill_rows",
    "padding_rows",
    "output_tokens",
    "preemptions",
    "completed",
    "errors",
    "joules",
    "running_seconds",
    "waiting_seconds",
    "kv_page_seconds",
)
"""What is added up. ``seconds``: time accounted for; ``*_seconds`` of a state: the state times how long it lasted."""

INDEX = {name: place for place, name in enumerate(COLUMNS)}
RATES = ("decode_rows", "prefill_rows", "padding_rows", "output_tokens", "completed")
STATES = {"running": "running_seconds", "waiting": "waiting_seconds", "kv_pages": "kv_page_seconds"}


def amounts(**values: float) -> Amounts:
    """A row of `COLUMNS` with the given values, the others 0."""
    row = np.zeros(len(COLUMNS))
    for name, value in values.items():
        row[INDEX[name]] = value
    return row


def shares(start: float, end: float, width: float) -> Iterator[tuple[int, float]]:
    """(number of the interval, share of ``start .. end`` that lies in it), for intervals of `width` seconds from 0."""
    first, last = int(start / width), int(end / width)
    if first == last or end <= start:
        yield last, 1.0
        return
    for index in range(first, last + 1):
        covered = min(end, (index + 1) * width) - max(start, index * width)
        if covered > 0:
            yield index, covered / (end - start)


def per_second(row: Amounts) -> dict[str, float]:
    """An interval's rates a second, mean states, busy share and, where energy was measured, mean watts."""
    seconds = float(row[INDEX["seconds"]]) or 1.0
    values = {f"{name}_per_second": float(row[INDEX[name]]) / seconds for name in RATES}
    values |= {name: float(row[INDEX[column]]) / seconds for name, column in STATES.items()}
    values["busy_share"] = min(1.0, float(row[INDEX["busy_seconds"]]) / seconds)
    return values


class Timeline:
    """Adds amounts up in at most `points` intervals; when they are full, each two become one.

    Args:
        points: an even number of intervals.
        width: seconds of an interval at first.
    """

    def __init__(self, points: int = 240, width: float = 0.125) -> None:
        self.width = width
        self._rows = np.zeros((points, len(COLUMNS)))
        self._used = 0

    def add(self, start: float, end: float, values: Amounts) -> None:
        """Spread `values` evenly over ``start .. end``, seconds since the run's start."""
        while end >= self.width * len(self._rows):
            half = len(self._rows) // 2
            self._rows[:half] = self._rows[0::2] + self._rows[1::2]
            self._rows[half:] = 0
            self._used = -(-self._used // 2)
            self.width *= 2
        for index, share in shares(start, end, self.width):
            self._rows[index] += values if share == 1 else values * share
            self._used = max(self._used, index + 1)

    @property
    def rows(self) -> NDArray[np.float64]:
        """[intervals so far, columns]; a copy."""
        return self._rows[: self._used].copy()

    def as_dict(self) -> dict[str, Any]:
        """What the report keeps: the interval's seconds, and a list for each quantity, as `per_second` names them."""
        rows = self.rows
        lists: dict[str, list[float]] = {}
        for row in rows:
            for name, value in per_second(row).items():
                lists.setdefault(name, []).append(float(f"{value:.6g}"))
        lists["iterations"] = [float(f"{value:.6g}") for value in rows[:, INDEX["iterations"]]]
        lists["preemptions"] = [float(f"{value:.6g}") for value in rows[:, INDEX["preemptions"]]]
        joules = rows[:, INDEX["joules"]]
        if joules.any():
            lists["watts"] = [float(f"{value / self.width:.6g}") for value in joules]
        return {"interval_seconds": self.width, **lists}
