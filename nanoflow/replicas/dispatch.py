"""Which replica gets which request.

Contract: a request is in the shared queue or in the hands of one replica, and leaves when its record is there. Requests
go out on demand, so that a replica takes as many as it is fast. Each is given what keeps it full: as many waiting
sequences as an engine's own queue would have. Towards the end the hands get smaller, so that no replica is left with a
queue while another has nothing: of all that waits anywhere, a replica is given no more than its share, halved. What a
dead replica held comes first again.

    target of a replica = min(full, max(LEAST_WAITING, all that waits / (2 * replicas)))
    it is filled up to its target once it is down to half of it
    a request goes to the replica that is filled least; among equals to the one that holds the least for its size,
    then to the one that was given the fewest
"""

from collections import deque
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.sampling_params import SamplingParams
from nanoflow.sequence import Sequence
from nanoflow.waiting import BLOCK, WaitingQueue

__all__ = ["Dispatcher", "Pending"]

LEAST_WAITING = 8
"""Sequences that a replica is given at the very end, when its share would be less."""
REFILL = 0.5
"""Share of its target down to which a replica's queue falls before it is filled up: pacing predicts anew each time."""


@dataclass(frozen=True, eq=False)
class Pending:
    """A request that has no record yet."""

    id: int
    """Order of submission."""
    token_ids: NDArray[np.int32]
    """[tokens] of the prompt."""
    params: SamplingParams
    place: int
    """Its place in the run, of which its seed is made if it names none: wherever it runs, its tokens are the same."""
    arrived: float
    """By `time.perf_counter`, one clock for all processes of a machine."""
    key: Any = None
    """Stays in the main process."""


@dataclass(eq=False)
class _Hand:
    """What one replica holds."""

    full: int
    """Waiting sequences that it is filled up to in the middle of a run."""
    most_tokens: int
    """Prompt tokens of those, at most."""
    max_running: int
    held: dict[int, Pending] = field(default_factory=dict)
    on_the_way: deque[Pending] = field(default_factory=deque)
    """Sent, and not in its engine as far as it has told."""
    sequences_on_the_way: int = 0
    tokens_on_the_way: int = 0
    waiting_there: int = 0
    """Sequences that waited in its engine when it told last."""
    tokens_there: int = 0
    filling: bool = True
    given: int = 0
    """Requests so far."""

    @property
    def waiting(self) -> int:
        return self.waiting_there + self.sequences_on_the_way

    def filled(self, target: int) -> float:
        tokens = self.tokens_there + self.tokens_on_the_way
        return max(self.waiting / target, tokens / self.most_tokens)


class Dispatcher:
    """The shared queue and the replicas' hands. Knows nothing of processes; not thread-safe.

    Args:
        replicas: that there are; those that are still loading will `join`.
        max_model_len: tokens of a prompt with its output, which limits how long an output may become.
        longest_first: whether long requests go out before short ones (in blocks, as an engine's queue has them).
    """

    def __init__(self, replicas: int, max_model_len: int, *, longest_first: bool = False) -> None:
        self.replicas = replicas
        """Those that take part, loading ones included."""
        self.admitting = True
        """Whether requests go out."""
        self.expects_more = False
        """Whether more requests will be added."""
        self._max_model_len = max_model_len
        self._queue = WaitingQueue()
        self._queue.longest_first = longest_first
        self._waiting = 0
        self._hands: dict[int, _Hand] = {}

    @property
    def longest_first(self) -> bool:
        """Whether long requests go out before short ones."""
        return self._queue.longest_first

    @property
    def waiting(self) -> int:
        """Sequences in the shared queue."""
        return self._waiting

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the requests in the shared queue."""
        return self._queue.prompt_tokens

    @property
    def unfinished(self) -> int:
        """Requests without a record, wherever they are."""
        return len(self._queue) + sum(len(hand.held) for hand in self._hands.values())

    def most_waiting(self, full: int) -> int:
        """Sequences that the shared queue is filled up to: all whose number decides when hands get smaller.

        `full` as `join` has it. An order by length wants to see most if not all requests.
        """
        return BLOCK if self.longest_first else 2 * self.replicas * full

    def join(self, replica: int, *, full: int, most_tokens: int, max_running: int) -> None:
        """A replica is ready.

        Args:
            full: waiting sequences that keep its engine full and show pacing what comes.
            most_tokens: prompt tokens of them, at most.
            max_running: sequences that it can run at a time.
        """
        self._hands[replica] = _Hand(full, most_tokens, max_running)

    def leave(self, replica: int) -> int:
        """A replica is dead, or never came to be; how many unfinished requests came back to the queue's front."""
        self.replicas -= 1
        hand = self._hands.pop(replica, None)
        if hand is None:
            return 0
        for pending in hand.held.values():
            self._queue.put_back(self._entry(pending))
            self._waiting += pending.params.n
        return len(hand.held)

    def add(self, pending: Pending) -> None:
        """Put a request into the shared queue."""
        self._queue.add(self._entry(pending))
        self._waiting += pending.params.n

    def assign(self) -> tuple[int, Pending] | None:
        """The next request and the replica that it goes to; None if no replica wants one, or there is none."""
        entry = self._queue.head() if self.admitting else None
        if entry is None:
            return None
        wanting = []
        for number, hand in self._hands.items():
            filled = hand.filled(self._target(hand))
            hand.filling = filled < 1 and (hand.filling or filled <= REFILL)
            if hand.filling:
                wanting.append((filled, len(hand.held) / hand.max_running, hand.given, number))
        if not wanting:
            return None
        number = min(wanting)[-1]
        hand = self._hands[number]
        self._queue.take(entry)
        pending: Pending = entry.parent
        self._waiting -= pending.params.n
        hand.held[pending.id] = pending
        hand.given += 1
        hand.on_the_way.append(pending)
        hand.sequences_on_the_way += pending.params.n
        hand.tokens_on_the_way += len(pending.token_ids) * pending.params.n
        return number, pending

    def told(self, replica: int, *, taken: int, waiting: int, waiting_tokens: int) -> None:
        """A replica has told how things stand.

        Args:
            taken: requests that have come to its engine since it told last.
            waiting: sequences that wait there.
            waiting_tokens: prompt tokens of these.
        """
        hand = self._hands[replica]
        for _ in range(taken):
            pending = hand.on_the_way.popleft()
            hand.sequences_on_the_way -= pending.params.n
            hand.tokens_on_the_way -= len(pending.token_ids) * pending.params.n
        hand.waiting_there, hand.tokens_there = waiting, waiting_tokens

    def finished(self, replica: int, id: int) -> Pending:
        """A request has its answer, or its error; it is nobody's any more."""
        return self._hands[replica].held.pop(id)

    def expected(self, replica: int) -> float:
        """Sequences that a replica will get beside those that it holds: infinite, or its share of all that wait."""
        if self.expects_more:
            return inf
        hand = self._hands.get(replica)
        if hand is None or not self._waiting:
            return 0.0
        return max(1.0, self._everywhere / self.replicas - hand.waiting)

    def holds(self, replica: int) -> int:
        """Requests in a replica's hands."""
        hand = self._hands.get(replica)
        return len(hand.held) if hand is not None else 0

    def _target(self, hand: _Hand) -> int:
        if self.expects_more:
            return hand.full
        return min(hand.full, max(LEAST_WAITING, ceil(self._everywhere / (2 * self.replicas))))

    @property
    def _everywhere(self) -> int:
        """Sequences that wait, in the queue and in hands."""
        return self._waiting + sum(hand.waiting for hand in self._hands.values())

    def _entry(self, pending: Pending) -> Sequence:
        """The request as the queue orders it: by index, or by the length that its output may have."""
        entry = Sequence(pending.id, pending.token_ids, pending.params, seed=0, parent=pending)
        entry.limit = min(pending.params.max_tokens, max(0, self._max_model_len - len(pending.token_ids)))
        return entry
