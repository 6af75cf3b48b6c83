"""The main process's side: replicas as one engine, which a run's loop serves as it would serve one.

Contract: a request whose record is not there belongs to the shared queue or to a living replica. When a replica is
lost, what it had finished and sent is taken in first; the rest goes back to the queue's front, and the others run it.
The loop never waits for a replica to take a message: each has a thread that sends.

    start all replicas; wait until each is ready or lost; none is ready: the last one's failure is the run's
    step:   hand out requests; wait a moment for messages; take in iterations and what is finished; hand out again
    lost:   a line that says so; none is left: the run ends with the failure of the last
    close:  ask all to end; take in their last words
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nanoflow.engine import LEAST_WAITING, EngineStats
from nanoflow.errors import ParallelError
from nanoflow.outputs import RequestOutput
from nanoflow.parallel.processes import Child, Loss
from nanoflow.pipeline.program import Program
from nanoflow.recording import IterationRecord, Recorder
from nanoflow.replicas.dispatch import Dispatcher, Pending
from nanoflow.replicas.figures import ReplicaFigures
from nanoflow.replicas.merging import Merger
from nanoflow.replicas.messages import End, Give, Given, Ready, Told
from nanoflow.replicas.remote import Remote
from nanoflow.replicas.totals import add_stats, all_programs
from nanoflow.request_check import Lengths
from nanoflow.sampling_params import SamplingParams
from nanoflow.serving import MOST_WAITING_TOKENS
from nanoflow.tokenizer import Tokenizer

__all__ = ["Pool"]

STEP_SECONDS = 0.02
"""How long a step waits for messages, at most."""
END_SECONDS = 10.0
"""How long replicas may take to end: an iteration may be in flight."""


class Watches(Protocol):
    """What watches children: `nanoflow.parallel.processes.Watch`."""

    def add(self, child: Child) -> None: ...
    def remove(self, child: Child) -> None: ...
    def close(self) -> None: ...


class Pool:
    """Replicas behind one shared queue. Call `close` or `kill` in the end.

    Args:
        start: starts replica 0, 1, ...
        count: replicas.
        watch: makes what tells of a child's loss, by calling what it is given from a thread of its own.
        max_model_len: tokens of a prompt with its output.
        longest_first: the order of admission.
        then: what the user is told of the consequences when none is left, behind the cause.

    Raises:
        ParallelError: none of them could start. Its `mistake` is as an engine in this process would have raised it.
    """

    def __init__(
        self,
        start: Callable[[int], Child],
        count: int,
        watch: Callable[[Callable[[Loss], None]], Watches],
        *,
        max_model_len: int,
        tokenizer: Tokenizer | None = None,
        longest_first: bool = False,
        then: str = "",
    ) -> None:
        self._then = then
        self.tokenizer = tokenizer
        self.scheduler = Dispatcher(count, max_model_len, longest_first=longest_first)
        self.observers: list[Callable[[IterationRecord], None]] = []
        """Called with each iteration of each replica; states in it (running, waiting, pages) are those of all."""
        self._merger: Merger | None = None
        self._submitted = 0
        self._finished: list[RequestOutput] = []
        self._losses: deque[Loss] = deque()
        self._woken, self._wake = Pipe(duplex=False)
        self._all: list[Remote] = []
        self._failure: ParallelError | None = None
        """Why no replica is left."""
        self._started = False
        self._closed = False
        self._watch = watch(self._lost)
        try:
            for number in range(count):
                self._start(number, start)
            while any(replica.ready is None for replica in self._alive):
                self._receive(None)
            if self._failure is not None:
                raise self._failure
            self._tell_who_started()
        except BaseException:
            self.kill()
            raise
        self._most_waiting = self.scheduler.most_waiting(max(map(_full, self._ready)))

    def _start(self, number: int, start: Callable[[int], Child]) -> None:
        replica = Remote(number, start(number))
        self._all.append(replica)
        self._watch.add(replica.child)

    # What a run asks of its engine.

    @property
    def most_waiting(self) -> int:
        """Sequences that the shared queue is filled up to."""
        return self._most_waiting

    @property
    def unfinished(self) -> int:
        """Requests submitted and not finished."""
        return self.scheduler.unfinished

    @property
    def active(self) -> bool:
        """Whether anything runs, or may begin to because a replica does not know yet that nothing is to."""
        admitting = self.scheduler.admitting
        return any(r.last is not None and (r.last.active or (r.last.admitting and not admitting)) for r in self._alive)

    def submit(
        self, prompt_token_ids: NDArray[np.int32], params: SamplingParams, *, key: Any, place: int, arrived: float
    ) -> None:
        """Queue a request. What is wrong with it is found by the replica that gets it, and comes back as its error."""
        self.scheduler.add(Pending(self._submitted, prompt_token_ids, params, place, arrived, key))
        self._submitted += 1

    def step(self) -> list[RequestOutput]:
        """Hand out requests, wait a moment for what replicas tell, and return the requests that have ended.

        Raises ParallelError if no replica is left and requests are; what the last one had finished comes before.
        """
        self._hand_out()
        self._receive(STEP_SECONDS)
        self._hand_out()
        if self._merger is not None:
            self._merger.advance(time.perf_counter())
        finished, self._finished = self._finished, []
        if self._failure is not None and not finished and self.unfinished:
            raise self._failure
        return finished

    def record_to(self, recorder: Recorder) -> None:
        """Tell `recorder` of every iteration from now on."""
        self._merger = Merger(recorder, len(self._all))

    # What the report asks.

    @property
    def programs(self) -> tuple[Program, ...]:
        """Those of all replicas."""
        return all_programs([ready.programs for ready in self._ready])

    @property
    def stats(self) -> EngineStats:
        """Totals over all replicas, lost ones included, as far as they have told."""
        told = [(r.last.stats, r.ready.programs) for r in self._all if r.last is not None and r.ready is not None]
        return add_stats([stats for stats, _ in told], [programs for _, programs in told], self.programs)

    @property
    def preemptions(self) -> int:
        """Over all replicas."""
        return sum(r.last.preemptions for r in self._all if r.last is not None)

    @property
    def sizes(self) -> dict[str, int]:
        """Limits of a replica; KV tokens and running sequences are those of all together."""
        sizes = dict(self._ready[0].sizes)
        for name in ("kv_tokens", "max_running"):
            sizes[name] = sum(ready.sizes[name] for ready in self._ready)
        return sizes

    @property
    def kv_capacity(self) -> int:
        """KV pages that can be in use, of all replicas."""
        return sum(ready.kv_capacity for ready in self._ready)

    @property
    def lengths(self) -> Lengths:
        """How long a sequence may be, wherever it runs."""
        sizes = self._ready[0].sizes
        longest, page_size = sizes["max_model_len"], sizes["page_size"]
        pages = min(ready.kv_capacity for ready in self._ready)
        return Lengths(longest, page_size, min(pages, -(-longest // page_size)))

    def figures(self, seconds: float) -> list[ReplicaFigures]:
        """What each replica did in a run of `seconds`."""
        return [replica.figures(seconds) for replica in self._all]

    # Ends.

    def close(self) -> None:
        """Ask all replicas to end, and wait for their last words. Safe to call again."""
        if self._closed:
            return
        for replica in self._alive:
            self._watch.remove(replica.child)
            replica.send(End())
        deadline = time.monotonic() + END_SECONDS
        waiting = [replica for replica in self._alive if not replica.silent]
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait([replica.child.link for replica in waiting], left)
            for replica in waiting:
                if replica.child.link in ready:
                    self._hear(replica)
            waiting = [replica for replica in waiting if not replica.silent and replica.ended is None]
        self._close(kill=False)

    def kill(self) -> None:
        """End all replicas at once."""
        self._close(kill=True)

    def _close(self, *, kill: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._watch.close()
        for replica in self._alive:
            replica.end(kill=kill or replica.ended is None)
        self._wake.close()
        if self._merger is not None:
            self._merger.finish()

    # Within.

    @property
    def _alive(self) -> list[Remote]:
        return [replica for replica in self._all if replica.loss is None]

    @property
    def _ready(self) -> Sequence[Ready]:
        """Of those that came to be."""
        return [replica.ready for replica in self._all if replica.ready is not None]

    def _hand_out(self) -> None:
        scheduler = self.scheduler
        given: dict[int, list[Given]] = {}
        while (assigned := scheduler.assign()) is not None:
            given.setdefault(assigned[0], []).append(Given.of(assigned[1]))
        now = time.perf_counter()
        for replica in self._alive:
            requests = given.get(replica.number, ())
            expected = scheduler.expected(replica.number)
            # Of a number that shrinks with every request, only its end is worth a message of its own.
            terms = (expected > 0, scheduler.admitting)
            if not requests and replica.given == terms:
                continue
            replica.given = terms
            if requests and self._merger is not None:
                self._merger.works(replica.number, now)
            replica.send(Give(tuple(requests), expected, scheduler.admitting))

    def _receive(self, seconds: float | None) -> None:
        """Wait for messages and losses, at most so long, and take them in."""
        heard = [replica for replica in self._alive if not replica.silent]
        ready = wait([*(replica.child.link for replica in heard), self._woken], seconds)
        for replica in heard:
            if replica.child.link in ready:
                self._hear(replica)
        if self._woken in ready:
            self._woken.recv()
        while self._losses:
            self._lose(self._losses.popleft())

    def _hear(self, replica: Remote) -> bool:
        """Take in one message; whether there was one."""
        message = replica.receive()
        if isinstance(message, Ready):
            self.scheduler.join(
                replica.number,
                full=_full(message),
                most_tokens=MOST_WAITING_TOKENS,
                max_running=message.max_running,
            )
        elif isinstance(message, Told):
            self._take_in(replica, message)
        return message is not None

    def _take_in(self, replica: Remote, told: Told) -> None:
        number = replica.number
        self.scheduler.told(number, taken=told.taken, waiting=told.waiting, waiting_tokens=told.waiting_tokens)
        for record in told.iterations:
            replica.record = record
            if self._merger is not None:
                self._merger.observe(number, record)
            if self.observers:
                together = self._together(record)
                for observer in self.observers:
                    observer(together)
        for done in told.done:
            self._finished.append(done.output(self.scheduler.finished(number, done.id)))
        if not told.active and (not self.scheduler.holds(number) or not told.admitting):
            replica.record = None
            if self._merger is not None:
                self._merger.rests(number)

    def _together(self, record: IterationRecord) -> IterationRecord:
        """`record` with the states of all replicas."""
        newest = [replica.record for replica in self._alive if replica.record is not None]
        return replace(
            record,
            running=sum(each.running for each in newest),
            waiting=sum(each.waiting for each in newest),
            kv_pages=sum(each.kv_pages for each in newest),
            kv_capacity=self.kv_capacity,
        )

    def _lost(self, loss: Loss) -> None:
        """Called from the watch's thread."""
        self._losses.append(loss)
        with suppress(OSError):
            self._wake.send(None)

    def _lose(self, loss: Loss) -> None:
        replica = next(replica for replica in self._all if replica.child is loss.child)
        replica.child.kill()  # it may hang, and must not go on with what the others are about to run
        with suppress(OSError):
            while replica.child.link.poll() and self._hear(replica):
                pass
        replica.end(kill=True)
        replica.loss = loss.text
        returned = self.scheduler.leave(replica.number)
        if self._merger is not None:
            self._merger.rests(replica.number)
        left = len(self._alive)
        if not loss.mistake and loss.trace:
            print(loss.trace, file=sys.stderr, flush=True)
        if not left:
            self._failure = ParallelError(self._words(loss))
            self._failure.mistake = loss.error(_own_words(loss))
        elif self._started:
            others = "the other one goes" if left == 1 else f"the other {left} go"
            what = f"{others} on with its {returned} unfinished requests" if returned else f"{others} on"
            _warn(f"{loss.text}; {what}")

    def _words(self, loss: Loss) -> str:
        """Why no replica is left. Of several, a message says which one; of one, a mistake is told as it would be of an
        engine in this process."""
        text = _own_words(loss) if len(self._all) == 1 else loss.text
        parts = [self._then] if self._then and self._ready else []
        if len(self._all) > 1:
            parts.insert(0, "no replica is left" if self._ready else "no replica could start")
        return "; ".join([text, *parts])

    def _tell_who_started(self) -> None:
        """What became of those that did not: only now is it known that there are others."""
        self._started = True
        for replica in self._all:
            if replica.loss is not None:
                _warn(f"{replica.loss}; the run goes on with {len(self._alive)} of {len(self._all)} replicas")


def _own_words(loss: Loss) -> str:
    """A mistake as the replica has said it, without its name."""
    return loss.text.removeprefix(f"{loss.child.name}: ") if loss.mistake else loss.text


def _full(ready: Ready) -> int:
    """Sequences that wait in a replica in the middle of a run: two generations, also where an order by length is asked
    for, since the shared queue is in that order."""
    return max(LEAST_WAITING, 2 * ready.max_running)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
