"""The time series of a run: a file with one JSON line an interval, written while the run goes on.

Lines are only ever appended. Each has the same keys. `time` is UTC, taken from the clock once and counted on from
there, so that a change of the clock cannot turn the series back. A run that goes on after a stop appends to what is
there, and `elapsed` starts again.
"""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanoflow.power import EnergyMeter
from nanoflow.recording import Recorder
from nanoflow.timeline import COLUMNS, Amounts, amounts, describe, interval_of, shares

__all__ = ["SeriesWriter"]

SECONDS = COLUMNS.index("seconds")


class SeriesWriter:
    """Adds a recorder's numbers up and writes a line for each interval that is over.

    What cannot be written (a full disk) is not worth a run: `problem` then says so, and no more is written.

    Args:
        path: appended to.
        recorder: its sinks get this writer.
        width: seconds of an interval.
        kv_capacity: KV pages that can be in use.
        fresh: replace what is there.
    """

    def __init__(
        self,
        path: Path,
        recorder: Recorder,
        *,
        width: float,
        kv_capacity: int,
        meter: EnergyMeter | None = None,
        fresh: bool = False,
    ) -> None:
        self.path = path
        self.problem: str | None = None
        self._recorder = recorder
        self._width = width
        self._kv_capacity = kv_capacity
        self._meter = meter
        self._energy = (0.0, meter.joules() if meter else None)  # (when, counter)
        self._clock = time.time() - (time.perf_counter() - recorder.started)
        self._interval = 0
        self._row = amounts()
        self._file: int | None = None
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0)
            self._file = os.open(path, flags, 0o666)
            self._end_torn_line()
        except OSError as error:
            self._give_up(error)
        recorder.time_sinks.append(self.add)

    def add(self, start: float, end: float, values: Amounts) -> None:
        """Spread `values` over ``start .. end`` and write the intervals that are over. Calls never go back in time."""
        last = interval_of(end, self._width)
        if last == self._interval:
            self._row += values
            return
        for index, share in shares(start, end, self._width):
            while self._interval < index:
                self._write((self._interval + 1) * self._width)
                self._interval += 1
            self._row += values * share

    def close(self) -> None:
        """Write what is left of the last interval and close the file."""
        if self.add in self._recorder.time_sinks:
            self._recorder.time_sinks.remove(self.add)
        if self._row.any():
            self._write(self._interval * self._width + float(self._row[SECONDS]))
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, elapsed: float) -> None:
        row, self._row = self._row, amounts()
        if self._file is None:
            return
        values = describe(row)
        values["kv_used"] = float(f"{values.pop('kv_pages') / self._kv_capacity:.6g}")
        values.pop("watts", None)
        if (watts := self._watts(elapsed)) is not None:
            values["watts"] = watts
        moment = datetime.fromtimestamp(self._clock + elapsed, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": moment.replace("+00:00", "Z"),
            "elapsed": round(elapsed, 6),
            "seconds": round(float(row[SECONDS]), 6),
            **values,
        }
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._give_up(error)

    def _watts(self, elapsed: float) -> float | None:
        """Mean power since it was last asked, which the recorder's timeline gets too; None if it cannot be measured."""
        if self._meter is None:
            return None
        when, before = self._energy
        now = self._meter.joules()
        if now is None or before is None or elapsed <= when:
            return None
        self._energy = (elapsed, now)
        self._recorder.timeline.add(when, elapsed, amounts(joules=now - before))
        return float(f"{(now - before) / (elapsed - when):.6g}")

    def _end_torn_line(self) -> None:
        """A killed run may have left half a line; it must not swallow the first one of this run."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def _give_up(self, error: OSError) -> None:
        self.problem = f"{self.path}: the time series cannot be written: {error.strerror}; the run goes on without it"
        if self._file is not None:
            os.close(self._file)
            self._file = None
