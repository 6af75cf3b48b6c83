"""The iterations of several replicas as one course of time.

Contract: the recorder gets one stretch of time after the other, each with what all replicas did in it, so that its
timeline and series read as those of one engine: rates are sums, `running`, `waiting` and `kv_pages` too, and the busy
share is the mean over all replicas, dead and idle ones included. A stretch is handed on once every replica at work has
told of it; one that has nothing to do is not waited for.
"""

from nanoflow.recording import Course, IterationRecord, Recorder
from nanoflow.timeline import COLUMNS, Amounts, amounts

__all__ = ["Merger"]

SECONDS, BUSY = COLUMNS.index("seconds"), COLUMNS.index("busy_seconds")
SHORTEST = 0.02
"""Seconds of a stretch, at least, unless the run ends."""

_Stretch = tuple[float, float, Amounts]


class Merger:
    """Gives a recorder what replicas tell.

    Args:
        replicas: of the run.
    """

    def __init__(self, recorder: Recorder, replicas: int) -> None:
        self._recorder = recorder
        self._replicas = replicas
        self._courses: dict[int, Course] = {}  # of those that have been at work
        self._working: set[int] = set()
        self._pending: list[_Stretch] = []

    def works(self, replica: int, time: float) -> None:
        """A replica is given work at `time` (by `time.perf_counter`): what it does is to be waited for."""
        if replica not in self._working:
            self._working.add(replica)
            since = max(time - self._recorder.started, self._recorder.last)
            self._courses[replica] = Course(since)

    def observe(self, replica: int, record: IterationRecord) -> None:
        """Record an iteration of a replica; those of one replica come in order."""
        self.works(replica, record.time - record.seconds)
        for start, end, values in self._courses[replica].stretches(record.time - self._recorder.started, record):
            values[SECONDS] = 0.0  # time passes once, however many are at work
            values[BUSY] /= self._replicas
            self._pending.append((start, end, values))
        self._recorder.note(record)

    def rests(self, replica: int) -> None:
        """A replica has nothing to do, or is dead."""
        self._working.discard(replica)

    def advance(self, time: float) -> None:
        """Hand on what is known of all replicas; `time` is now, by `time.perf_counter`."""
        ends = [self._courses[replica].last for replica in self._working]
        end = min(ends, default=time - self._recorder.started)
        if end - self._recorder.last >= SHORTEST:
            self._hand_on(end)

    def finish(self) -> None:
        """Hand on all that is left."""
        self._working.clear()
        self._hand_on(max([self._recorder.last, *(end for _, end, _ in self._pending)]))

    def _hand_on(self, until: float) -> None:
        since = self._recorder.last
        total = amounts(seconds=until - since)
        rest: list[_Stretch] = []
        for start, end, values in self._pending:
            # What began before `since` was told too late to be put there.
            start = min(max(start, since), end)
            if end <= until:
                total += values
            elif start >= until:
                rest.append((start, end, values))
            else:
                share = (until - start) / (end - start)
                total += values * share
                rest.append((until, end, values * (1 - share)))
        self._pending = rest
        self._recorder.account(until, total)
