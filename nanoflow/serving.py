"""The loop between the feed, the engine and the output file.

Contract: the engine's queue holds a bounded number of requests, filled up a little in each iteration while the device
computes; a request is submitted no earlier than it arrives; a finished one is written before the next step.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.batch_output import error_line, response_line
from nanoflow.errors import InputError
from nanoflow.feed import Feed, Prompt
from nanoflow.interrupt import Interrupts
from nanoflow.outputs import RequestOutput
from nanoflow.progress import RunProgress
from nanoflow.recording import Recorder
from nanoflow.sampling_params import SamplingParams
from nanoflow.tokenizer import Tokenizer

__all__ = ["MOST_WAITING_TOKENS", "Runner", "Serving"]

MOST_WAITING_TOKENS = 2**26
"""Prompt tokens that it is filled up to, at most: 256 MiB."""
MOST_SUBMITTED = 128
"""Requests that are submitted between two iterations: some 5 ms, in which the device works on what was launched."""
IDLE_SECONDS = 0.05
"""How long the loop sleeps at a time while nothing runs."""


class RecordWriter(Protocol):
    """Where records go: the output file, or nowhere."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        ...


class Admission(Protocol):
    """What decides which request is begun next: an engine's scheduler."""

    admitting: bool
    """Whether waiting requests are begun."""
    expects_more: bool
    """Whether more requests will come."""

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        ...

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of them."""
        ...


class Runner(Protocol):
    """What runs requests: an engine, or several behind one queue."""

    @property
    def scheduler(self) -> Admission: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def most_waiting(self) -> int:
        """Sequences that its queue is filled up to."""
        ...

    @property
    def unfinished(self) -> int:
        """Of what was submitted, what is not finished."""
        ...

    @property
    def active(self) -> bool:
        """Whether anything runs: waiting requests do not count."""
        ...

    def submit(
        self, prompt_token_ids: NDArray[np.int32], params: SamplingParams, *, key: Any, place: int, arrived: float
    ) -> None:
        """Queue a request, as `Engine.submit`. Raises InputError."""
        ...

    def step(self) -> Sequence[RequestOutput]:
        """Go on for a moment, and return the requests that have ended in it."""
        ...


class Serving:
    """Runs what a feed gives through an engine.

    Args:
        model: its name, for the records.
        resumed: some requests have been run before; arrival times then count from the first one that is left.
    """

    def __init__(
        self,
        engine: Runner,
        feed: Feed,
        writer: RecordWriter,
        recorder: Recorder,
        progress: RunProgress,
        model: str,
        resumed: bool = False,
    ) -> None:
        self._engine = engine
        self._feed = feed
        self._writer = writer
        self._recorder = recorder
        self._progress = progress
        self._model = model
        self._resumed = resumed
        self._start: float | None = None  # when arrival 0 is, by time.perf_counter; known with the first request
        self._filling = True

    @property
    def complete(self) -> bool:
        """Whether every request has its record."""
        return self._feed.exhausted and not self._engine.unfinished and not self._engine.active

    def finished(self, interrupts: Interrupts) -> bool:
        """Whether there is nothing more to do: all is complete, or a signal came and what ran has ended or must."""
        if interrupts.signal is None:
            return self.complete
        self._engine.scheduler.admitting = False
        return not self._engine.active or interrupts.out_of_time

    def step(self) -> None:
        """One iteration, or a short sleep if there is nothing to run."""
        engine = self._engine
        waits_for_arrival = False
        if engine.scheduler.admitting:
            waits_for_arrival = self._fill()
            # What waits for its arrival is not there yet: prompts need not be paced for it.
            engine.scheduler.expects_more = not self._feed.exhausted and not waits_for_arrival
        if engine.active or engine.unfinished:
            for output in engine.step():
                self._answer(output)
        elif waits_for_arrival:
            time.sleep(IDLE_SECONDS)
        elif not self._feed.exhausted:
            self._feed.wait(IDLE_SECONDS)

    def _fill(self) -> bool:
        """Submit what is ready and has arrived, if there is room; whether the next request has not arrived yet."""
        feed = self._feed
        # In larger portions: each time the queue grows, pacing starts its prediction anew.
        if self._filled() <= 0.5:
            self._filling = True
        now = time.perf_counter()
        idle = not self._engine.active
        submitted = 0
        while self._filling and (idle or submitted < MOST_SUBMITTED) and (item := feed.peek()) is not None:
            if self._filled() >= 1:
                self._filling = False
                break
            if isinstance(item, Prompt):
                arrived = self._arrival(item.request, now)
                if arrived > now:
                    return True
                self._submit(item, arrived)
                submitted += 1
            else:
                self._write_error(item)
            feed.take()
        return False

    def _filled(self) -> float:
        """How far the engine's queue is filled: 1 if nothing more goes into it."""
        scheduler = self._engine.scheduler
        return max(scheduler.waiting / self._engine.most_waiting, scheduler.waiting_tokens / MOST_WAITING_TOKENS)

    def _arrival(self, request: ParsedRequest, now: float) -> float:
        """When a request arrives, by `time.perf_counter`; what names no time is there from the start."""
        arrival = request.arrival or 0.0
        if self._start is None:
            self._start = now - (arrival if self._resumed else 0.0)
        return self._start + arrival

    def _submit(self, prompt: Prompt, arrived: float) -> None:
        request = prompt.request
        try:
            self._engine.submit(prompt.token_ids, request.params, key=request, place=request.line, arrived=arrived)
        except InputError as error:
            self._write_error(request.error(str(error)))

    def _answer(self, output: RequestOutput) -> None:
        request: ParsedRequest = output.key
        if output.error is not None:
            self._write_error(request.error(output.error))
            return
        self._writer.write(
            response_line(
                request,
                output,
                model=self._model,
                created=int(time.time()),
                tokenizer=self._engine.tokenizer,
            )
        )
        self._recorder.add(output)
        self._progress.advance(1, len(output.outputs))

    def _write_error(self, record: ErrorRecord) -> None:
        self._writer.write(error_line(record))
        self._recorder.error()
        self._progress.advance(1)
