"""The sequences that wait: for their first admission, or for the next one after a preemption."""

from bisect import insort
from heapq import heappop, heappush

from nanoflow.sequence import Sequence

__all__ = ["WaitingQueue"]

_TRIM = 4096


class WaitingQueue:
    """Sequences in order of their index. One that ends while it waits (`finish_reason` set) leaves without a word."""

    def __init__(self) -> None:
        self.expects_more = False
        """Whether more sequences will come; then predictions take the queue for endless."""
        self._arrivals: list[Sequence] = []
        self._next = 0  # everything before it in `_arrivals` has left
        self._preempted: list[tuple[int, Sequence]] = []  # heap by index
        self._count = 0

    def __len__(self) -> int:
        """Sequences that wait and have not ended."""
        return self._count

    def add(self, sequence: Sequence) -> None:
        """Puts in a sequence that was never admitted."""
        if not self._arrivals or self._arrivals[-1].index <= sequence.index:
            self._arrivals.append(sequence)
        else:
            insort(self._arrivals, sequence, lo=self._next, key=lambda s: s.index)
        self._count += 1

    def put_back(self, sequence: Sequence) -> None:
        """Puts in a sequence that was preempted."""
        heappush(self._preempted, (sequence.index, sequence))
        self._count += 1

    def discard(self) -> None:
        """Counts out a sequence that has ended while it waited."""
        self._count -= 1

    def head(self) -> Sequence | None:
        """The sequence to admit next; None if there is none, or if a token of it is in flight yet."""
        while self._preempted and self._preempted[0][1].finished:
            heappop(self._preempted)
        while self._next < len(self._arrivals) and self._arrivals[self._next].finished:
            self._next += 1
        arrival = self._arrivals[self._next] if self._next < len(self._arrivals) else None
        if self._preempted and (arrival is None or self._preempted[0][0] <= arrival.index):
            sequence = self._preempted[0][1]
            return sequence if sequence.in_flight == 0 else None
        return arrival

    def take(self, sequence: Sequence) -> None:
        """Takes out what `head` returned."""
        if self._preempted and self._preempted[0][1] is sequence:
            heappop(self._preempted)
        else:
            self._next += 1
        self._count -= 1
        if self._next >= _TRIM:  # keep no reference to what has left
            del self._arrivals[: self._next]
            self._next = 0

    def sample(self, count: int) -> list[Sequence]:
        """Those that were preempted, and the next `count` others."""
        return [s for _, s in self._preempted if not s.finished] + self._arrivals[self._next : self._next + count]
