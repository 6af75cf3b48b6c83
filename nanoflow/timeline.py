"""A run's course over time in a fixed amount of memory: what was done, added up in intervals of equal length.

An iteration's work is spread over the time that it took, so that one that takes longer than an interval shows as a
plateau and not as a spike beside gaps. What is a state and not work (running requests, KV pages) is weighted with time.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLUMNS", "Amounts", "Timeline", "amounts", "describe", "interval_of", "shares"]

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


def amounts(**values: float) -> Amounts:
    """A row of `COLUMNS` with the given values, the others 0."""
    row = np.zeros(len(COLUMNS))
    for name, value in values.items():
        row[INDEX[name]] = value
    return row


def shares(start: float, end: float, width: float) -> Iterator[tuple[int, float]]:
    """(number of the interval, share of ``start .. end`` that lies in it), for intervals of `width` seconds from 0.

    An interval holds its end: what happens there happens at the end of the iteration before.
    """
    first, last = int(start / width), interval_of(end, width)
    if first >= last:
        yield last, 1.0
        return
    for index in range(first, last + 1):
        yield index, (min(end, (index + 1) * width) - max(start, index * width)) / (end - start)


def interval_of(time: float, width: float) -> int:
    """Number of the interval that holds `time`."""
    return max(0, math.ceil(time / width) - 1)


def describe(row: Amounts) -> dict[str, float]:
    """An interval in the words of reports: tokens a second, mean rows of an iteration, mean states, counts.

    ``watts`` is there where energy was measured. All are 0 if no time was accounted for.
    """
    of = dict(zip(COLUMNS, row.tolist(), strict=True))
    seconds, iterations = of["seconds"] or math.inf, of["iterations"] or math.inf
    values = {
        "tokens_per_second": (of["decode_rows"] + of["prefill_rows"]) / seconds,
        "output_tokens_per_second": of["output_tokens"] / seconds,
        "iterations": of["iterations"],
        "decode_rows": of["decode_rows"] / iterations,
        "prefill_rows": of["prefill_rows"] / iterations,
        "padding_rows": of["padding_rows"] / iterations,
        "running": of["running_seconds"] / seconds,
        "waiting": of["waiting_seconds"] / seconds,
        "kv_pages": of["kv_page_seconds"] / seconds,
        "busy_share": of["busy_seconds"] / seconds,
        "preemptions": of["preemptions"],
        "completed": of["completed"],
        "errors": of["errors"],
    }
    if of["joules"]:
        values["watts"] = of["joules"] / seconds
    return {name: float(f"{value:.6g}") for name, value in values.items()}


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
        while end > self.width * len(self._rows):
            half = len(self._rows) // 2
            self._rows[:half] = self._rows[0::2] + self._rows[1::2]
            self._rows[half:] = 0
            self._used = -(-self._used // 2)
            self.width *= 2
        last = interval_of(end, self.width)
        self._used = max(self._used, last + 1)
        if int(start / self.width) >= last:
            self._rows[last] += values
            return
        for index, share in shares(start, end, self.width):
            self._rows[index] += values * share

    @property
    def rows(self) -> NDArray[np.float64]:
        """[intervals so far, columns]; a copy."""
        return self._rows[: self._used].copy()

    def as_dict(self) -> dict[str, Any]:
        """What the report keeps: the interval's seconds, and a list for each quantity, as `describe` names them."""
        described = [describe(row) for row in self.rows]
        names = dict.fromkeys(name for interval in described for name in interval)
        lists = {name: [interval.get(name, 0.0) for interval in described] for name in names}
        return {"interval_seconds": self.width, **lists}
