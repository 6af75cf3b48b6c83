"""Numbers of a run as it goes on, in bounded memory: a million requests take 48 MB, the rest does not grow.

The engine tells its observers of every iteration it collects; the runner tells the `Recorder` of every finished request
and of every error record. `nanoflow.summing_up.make_report` reads the totals when the run is over.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nanoflow.outputs import RequestOutput
from nanoflow.timeline import Amounts, Timeline, amounts

__all__ = ["Course", "IterationRecord", "LogHistogram", "Recorder", "RequestNumbers"]

Floats = NDArray[np.float64]

IDLE_SECONDS = 0.01
"""A longer pause between two iterations is shown as one; a shorter one is the host's and counts to the iteration."""


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """One collected iteration, as observers see it."""

    time: float
    """When its tokens were seen, by `time.perf_counter`."""
    seconds: float
    """Time that the executor spent on it."""
    decode_rows: int
    prefill_rows: int
    padding_rows: int
    running: int
    """Sequences that hold KV pages, after this iteration's stops."""
    waiting: int
    """Sequences that wait for admission, those preempted included."""
    kv_pages: int
    """KV pages in use."""
    kv_capacity: int
    """KV pages that can be in use."""
    preemptions: int
    """Preemptions since the record before."""
    output_tokens: int
    """Tokens that sequences received; one that came after a stop does not count."""
    token_gaps: Mapping[float, int] = field(default_factory=dict)
    """Seconds between a token and the one before it of its sequence -> how many tokens; first tokens do not count."""


@dataclass(frozen=True, slots=True)
class RequestNumbers:
    """A finished request. Times in seconds."""

    prompt_tokens: int
    output_tokens: int
    """Of all its completions."""
    longest: int
    """Output tokens of its longest completion."""
    arrived: float
    """By `time.perf_counter`."""
    first_token: float
    """From the arrival to the first token."""
    duration: float
    """From the arrival to the end."""

    @classmethod
    def of(cls, output: RequestOutput) -> "RequestNumbers":
        timing = output.timing
        lengths = [len(completion.token_ids) for completion in output.outputs]
        return cls(
            len(output.prompt_token_ids),
            sum(lengths),
            max(lengths),
            timing.submitted,
            timing.first_token - timing.submitted,
            timing.finished - timing.submitted,
        )

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first; None if there is but one."""
        return (self.duration - self.first_token) / (self.longest - 1) if self.longest > 1 else None


class LogHistogram:
    """Counts of positive values in bins that grow by 2%, so that any quantile is right within 1%.

    Values outside 1 microsecond .. 10 million seconds count in the outermost bins.
    """

    LOW, GROWTH, BINS = 1e-6, 1.02, 1512

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, np.int64)
        self.total = 0.0
        self._scale = 1 / math.log(self.GROWTH)
        self._offset = math.log(self.LOW) * self._scale

    def add(self, value: float, count: int = 1) -> None:
        """Count `value`, `count` times."""
        self.total += value * count
        place = int(math.log(max(value, self.LOW)) * self._scale - self._offset)
        self.counts[min(place, self.BINS - 1)] += count

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    def quantiles(self, shares: NDArray[np.float64]) -> Floats:
        """The values below which the given shares (0 to 1) of all values lie; at least one value must be there."""
        ends = np.cumsum(self.counts)
        bins = np.searchsorted(ends, np.maximum(shares * ends[-1], 1e-9), side="left")
        values: Floats = self.LOW * self.GROWTH ** (np.minimum(bins, self.BINS - 1) + 0.5)
        return values


class _Column:
    """Numbers of one kind, one a request; grows by doubling."""

    def __init__(self, dtype: type[np.number]) -> None:
        self._values = np.zeros(1024, dtype)
        self._count = 0

    def append(self, value: float) -> None:
        if self._count == len(self._values):
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
        self._values[self._count] = value
        self._count += 1

    @property
    def values(self) -> NDArray[np.number]:
        return self._values[: self._count]


class Course:
    """Makes of one engine's iterations stretches of time that follow each other without a gap."""

    def __init__(self, last: float = 0.0) -> None:
        self.last = last
        """The end of the newest stretch, in seconds since the run's start."""
        self._state = (0, 0, 0)

    def stretches(self, end: float, record: IterationRecord) -> Iterator[tuple[float, float, Amounts]]:
        """(start, end, amounts) of the iteration seen at `end`, and of the pause before it if there was one."""
        now = max(end, self.last)
        began = min(max(self.last, now - record.seconds), now)
        if began - self.last > IDLE_SECONDS:
            running, waiting, kv_pages = self._state
            idle = began - self.last
            states = (running * idle, waiting * idle, kv_pages * idle)
            yield self.last, began, np.array((idle, *(0,) * 10, *states))
        else:
            began = self.last
        length = now - began
        values = (
            length,
            min(record.seconds, length),
            1,
            record.decode_rows,
            record.prefill_rows,
            record.padding_rows,
            record.output_tokens,
            record.preemptions,
            0,
            0,
            0,
            record.running * length,
            record.waiting * length,
            record.kv_pages * length,
        )
        self.last = now
        self._state = (record.running, record.waiting, record.kv_pages)
        yield began, now, np.array(values)


class Recorder:
    """Numbers of finished requests and of iterations.

    Not thread-safe. `observe` is for the observers of an engine; what is done between iterations needs no call.

    Args:
        started: the run's start by `time.perf_counter`; now if left out.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = time.perf_counter() if started is None else started
        self.errors = 0
        """Error records so far."""
        self.timeline = Timeline()
        self.token_gaps = LogHistogram()
        """Seconds between successive tokens of a sequence, one value a token after the first."""
        self.iteration_seconds = LogHistogram()
        self.request_sinks: list[Callable[[RequestNumbers], None]] = []
        """Called with each finished request."""
        self.error_sinks: list[Callable[[], None]] = []
        """Called for each error record."""
        self.time_sinks: list[Callable[[float, float, Amounts], None]] = []
        """Called with (start, end, amounts) as `Timeline.add` is; successive calls never go back in time."""
        self._columns = {
            "prompt_tokens": _Column(np.int64),
            "output_tokens": _Column(np.int64),
            "longest": _Column(np.int64),
            "arrived": _Column(np.float64),
            "first_token": _Column(np.float64),
            "duration": _Column(np.float64),
        }
        self._course = Course()

    @property
    def completed(self) -> int:
        """Requests finished so far."""
        return len(self._columns["duration"].values)

    @property
    def last(self) -> float:
        """The end of what the timeline holds, seconds since the start."""
        return self._course.last

    def account(self, end: float, values: Amounts) -> None:
        """Record what was done from `last` to `end`, of whoever did it: `note` does not go with it."""
        self._spread(self.last, end, values)
        self._course.last = end

    def add(self, output: RequestOutput) -> None:
        """Record a finished request; keeps numbers, not the output."""
        numbers = RequestNumbers.of(output)
        for name, column in self._columns.items():
            column.append(getattr(numbers, name))
        self._spread(self.last, self.last, amounts(completed=1))
        for sink in self.request_sinks:
            sink(numbers)

    def error(self) -> None:
        """Count an error record."""
        self.errors += 1
        self._spread(self.last, self.last, amounts(errors=1))
        for sink in self.error_sinks:
            sink()

    def observe(self, record: IterationRecord) -> None:
        """Record an iteration; an observer of the engine."""
        for start, end, values in self._course.stretches(record.time - self.started, record):
            self._spread(start, end, values)
        self.note(record)

    def note(self, record: IterationRecord) -> None:
        """Record what an iteration tells beside its course over time: its length, and the gaps between tokens."""
        for gap, tokens in record.token_gaps.items():
            self.token_gaps.add(gap, tokens)
        self.iteration_seconds.add(record.seconds)

    def column(self, name: str) -> NDArray[np.number]:
        """[requests finished] one of the fields of `RequestNumbers`, in order of finishing."""
        return self._columns[name].values

    def per_token(self) -> Floats:
        """Seconds a token after the first, of each request that has more than one."""
        several = self.column("longest") > 1
        after_first = (self.column("duration") - self.column("first_token"))[several]
        return np.asarray(after_first / (self.column("longest")[several] - 1), np.float64)

    def normalised(self) -> Floats:
        """Seconds from arrival to end over the output tokens of the longest completion, of each request."""
        return np.asarray(self.column("duration") / np.maximum(self.column("longest"), 1), np.float64)

    def within(self, first_token: float, per_token: float) -> int:
        """Finished requests whose first token came within `first_token` seconds, the others within `per_token` each.

        A request of a single token has no time per token; its first one decides.
        """
        rest = np.maximum(self.column("longest") - 1, 1)
        each = (self.column("duration") - self.column("first_token")) / rest
        return int(np.count_nonzero((self.column("first_token") <= first_token) & (each <= per_token)))

    def _spread(self, start: float, end: float, values: Amounts) -> None:
        self.timeline.add(start, end, values)
        for sink in self.time_sinks:
            sink(start, end, values)
