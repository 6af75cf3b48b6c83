"""The sequences that wait: for their first admission, or for the next one after a preemption.

Contract: `head` is the next to be admitted. Preempted sequences go first. The others go in order of their index, or
with `longest_first` in blocks of `BLOCK` in order of arrival: within a block, most output tokens first (`limit`), then
the longer prompt, then the lower index. So a sequence is overtaken by less than `BLOCK` others, however many still
come. An empty queue begins a new block.

Those that come next stand in a sorted list; the rest are in a heap behind it.
"""

from bisect import insort
from heapq import heappop, heappush

from nanoflow.sequence import Sequence

__all__ = ["BLOCK", "WaitingQueue"]

BLOCK = 65_536
"""Sequences that are put in order of length together."""
_FRONT = 1024

_Entry = tuple[int, int, int, int, Sequence]
"""A sequence behind what it is ordered by; the index is unique, so sequences themselves are never compared."""


class WaitingQueue:
    """Sequences in order. One that ends while it waits (`finish_reason` set) leaves without a word."""

    def __init__(self) -> None:
        self.expected = 0.0
        """Sequences that will come, as far as is known; infinite: predictions take the queue for endless."""
        self.prompt_tokens = 0
        """Tokens of the prompts of all that wait."""
        self._longest_first = False
        self._front: list[_Entry] = []
        self._back: list[_Entry] = []  # heap; none of it comes before any of `_front`
        self._preempted: list[_Entry] = []  # heap
        self._count = 0
        self._block = 0
        self._in_block = 0  # sequences that the newest block has so far

    def __len__(self) -> int:
        """Sequences that wait and have not ended."""
        return self._count

    @property
    def longest_first(self) -> bool:
        """Whether long sequences are admitted before short ones."""
        return self._longest_first

    @longest_first.setter
    def longest_first(self, value: bool) -> None:
        if self._count and value != self._longest_first:
            raise ValueError(f"the order cannot change while {self._count} sequences wait; change it before they come")
        self._longest_first = value

    def add(self, sequence: Sequence) -> None:
        """Puts in a sequence that was never admitted; its `limit` is known."""
        if not self._count or self._in_block == BLOCK:
            self._block += 1
            self._in_block = 0
        self._in_block += 1
        self._come(sequence)
        entry = self._entry(sequence)
        if self._back and self._back[0] < entry:
            heappush(self._back, entry)
            return
        insort(self._front, entry)
        if len(self._front) > 2 * _FRONT:
            for later in self._front[_FRONT:]:
                heappush(self._back, later)
            del self._front[_FRONT:]

    def put_back(self, sequence: Sequence) -> None:
        """Puts in a sequence that was preempted."""
        self._come(sequence)
        heappush(self._preempted, self._entry(sequence, block=0))

    def discard(self, sequence: Sequence) -> None:
        """Counts out a sequence that has ended while it waited."""
        self._leave(sequence)

    def head(self) -> Sequence | None:
        """The sequence to admit next; None if there is none, or if a token of it is in flight yet."""
        while self._preempted and self._preempted[0][-1].finished:
            heappop(self._preempted)
        if self._preempted:
            sequence = self._preempted[0][-1]
            return sequence if sequence.in_flight == 0 else None
        while True:
            if not self._front:
                self._front = [heappop(self._back) for _ in range(min(_FRONT, len(self._back)))]
            if not self._front or not self._front[0][-1].finished:
                return self._front[0][-1] if self._front else None
            del self._front[0]

    def take(self, sequence: Sequence) -> None:
        """Takes out what `head` returned."""
        if self._preempted and self._preempted[0][-1] is sequence:
            heappop(self._preempted)
        else:
            del self._front[0]
        self._leave(sequence)

    def sample(self, count: int) -> list[Sequence]:
        """Those that were preempted, and about `count` of the others, evenly from the first to the last."""
        front, back = self._front, self._back
        total = len(front) + len(back)
        places = range(0, total, max(1, total // count))
        entries = [front[place] if place < len(front) else back[place - len(front)] for place in places]
        return [entry[-1] for entry in (*self._preempted, *entries) if not entry[-1].finished]

    def _entry(self, sequence: Sequence, block: int | None = None) -> _Entry:
        if not self._longest_first:
            return (0, 0, 0, sequence.index, sequence)
        own = self._block if block is None else block
        return (own, -sequence.limit, -len(sequence.prompt), sequence.index, sequence)

    def _come(self, sequence: Sequence) -> None:
        self._count += 1
        self.prompt_tokens += len(sequence.prompt)

    def _leave(self, sequence: Sequence) -> None:
        self._count -= 1
        self.prompt_tokens -= len(sequence.prompt)
