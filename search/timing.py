"""Timing calls against each other, hot and in steady state: on a GPU as CUDA graphs, on a CPU one by one.

Calls are captured and replayed, one candidate after the other in slices (A B A B ...), so that the clock and the power
limit treat all of them alike; or two of them at once on streams of their own, each again and again, to see what they
leave of each other's speed. On a machine without a GPU candidates still take turns, without graphs or watts.
"""

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from nanoflow.ops.operation import device_sms
from nanoflow.pipeline.partitions import Partition, PartitionError

__all__ = ["Candidate", "EnergyCounter", "Replays", "Timing", "capture", "on_sms", "time_interleaved", "time_together"]

SLICE_SECONDS = 0.25
"""One candidate's turn: some steps of the card's energy counter (each some tens of milliseconds)."""
SAMPLE_SECONDS = 1e-3
"""Least time of one timed replay: a graph holds as many calls as that takes."""
MAX_CALLS = 200
"""Calls in one graph at most."""
QUEUED = 8
"""Replays that are launched ahead, so that launching costs nothing."""
LOOK_SECONDS = 2e-3
"""Between two looks at the energy counter."""

Candidate = Callable[[], object] | Sequence[Callable[[], object]]
EnergyCounter = Callable[[], float | None]
"""Joules that a device has used so far; None if it does not tell."""


@contextmanager
def on_sms(sms: int | None, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """The current stream has `sms` SMs of a GPU and no others, which stay idle; None for all of them, and on a CPU.

    They are those that a plan of two lanes would give: a part of less than half of the device is its last. On an H100
    the last 28 SMs read 6% more than the first.

    Raises PartitionError if the device does not give a part of that size.
    """
    if device.type != "cuda" or sms in (None, device_sms(device)):
        yield None
        return
    others = device_sms(device) - sms
    try:
        partition = Partition((others, sms), device) if sms < others else Partition((sms,), device)
    except PartitionError:  # the others are no part
        partition = Partition((sms,), device)
    stream = partition.streams[-1]
    try:
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):  # which gives none of its own accord
            yield stream
        torch.cuda.synchronize(device)
    finally:
        partition.close()


@dataclass(frozen=True)
class Timing:
    """Milliseconds, watts and joules of one call."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    watts: float | None
    """Mean power of the whole card while the candidate ran; None if it is not known."""
    joules: float | None
    """Energy of the whole card for one call."""
    calls: int
    """Calls that were timed."""


def time_interleaved(
    candidates: Mapping[str, Candidate],
    seconds: float = 0.5,
    *,
    warmup_seconds: float = 0.3,
    slice_seconds: float = SLICE_SECONDS,
    device: str | torch.device = "cuda",
    stream: torch.cuda.Stream | None = None,
    joules: EnergyCounter | None = None,
) -> dict[str, Timing]:
    """Time candidates against each other, `seconds` of replays each, after `warmup_seconds` of them all in turn.

    They take turns of about `slice_seconds`: shorter ones compare better, but tell no energy.

    A candidate is a call, or several calls that do the same on different inputs, which then take turns (for inputs that
    would otherwise stay in the L2 cache). It must be launchable in a CUDA graph: no synchronisation, the same buffers
    each time. It is called a few times before capture, so it may compile and tune on its first call.

    Args:
        stream: to capture and replay on, of a part of the SMs (see `on_sms`); a plain one by default.
        joules: the device's energy counter; without, no watts are told.
    """
    device = torch.device(device)
    replays = {name: capture(fn, device, stream) for name, fn in candidates.items()}
    ends = time.perf_counter() + warmup_seconds
    while True:
        for replay in replays.values():
            replay.run_for(min(0.05, warmup_seconds))
        if time.perf_counter() >= ends:
            break
    rounds = max(2, math.ceil(seconds / slice_seconds))
    for _ in range(rounds):
        for replay in replays.values():
            replay.run_for(seconds / rounds, record=True, joules=joules)
    timings = {name: replay.timing() for name, replay in replays.items()}
    del replays
    gc.collect()
    return timings


def time_together(first: "Replays", second: "Replays", seconds: float, times: int | None = None) -> tuple[float, float]:
    """Milliseconds of a call of each while both run, again and again, each on a stream of its own; on a GPU.

    Both are kept busy until the time is up, and only what ran wholly while both did counts. With `times`, until the
    second has run so often, whatever that takes: other processes take part in it, and must run it as often.
    """
    both = first, second
    waiting: tuple[deque[_Pair], deque[_Pair]] = deque(), deque()
    done: tuple[list[_Pair], list[_Pair]] = [], []
    first.wait()
    base = _event()
    base.record()
    for each in both:
        assert each.stream is not None
        each.stream.wait_event(base)
    ends = time.perf_counter() + seconds
    launched = [0, 0]
    while time.perf_counter() < ends if times is None else launched[1] < times or waiting[1]:
        for place, (each, queue, over) in enumerate(zip(both, waiting, done, strict=True)):
            while queue and queue[0][1].query():  # type: ignore[no-untyped-call]
                over.append(queue.popleft())
            while len(queue) < QUEUED and not (place and times is not None and launched[1] >= times):
                each.freshen(launched[place])
                queue.append(each.launch())
                launched[place] += 1
    first.wait()
    spans = []
    for queue, over in zip(waiting, done, strict=True):
        spans.append([tuple(base.elapsed_time(event) for event in pair) for pair in (*over, *queue)])
    begin, end = max(each[0][0] for each in spans), min(each[-1][1] for each in spans)
    begin += 0.1 * (end - begin)  # the first moments are those of a card that has just been idle
    found = []
    for each, own in zip(both, spans, strict=True):
        inside = [stop - start for start, stop in own if begin <= start and stop <= end]
        found.append(statistics.median(inside or [stop - start for start, stop in own]) / each.calls)
    return found[0], found[1]


class Replays:
    """Some calls that run as one, and what their runs have taken.

    Attributes:
        calls: in one run.
        stream: that they run on; None: the current one.
    """

    def __init__(
        self,
        replay: Callable[[], object],
        calls: int,
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.calls, self.stream = calls, stream
        self.fresh: Callable[[], object] | None = None
        """What makes the inputs anew, for calls that change them; its own time counts as nobody's."""
        self.fresh_every = 1
        """Replays, after which they are."""
        self._replay, self._device, self._on_gpu = replay, device, device.type == "cuda"
        self._samples: list[float] = []
        self._energy: list[float] = []
        self._energy_seconds = 0.0
        self._counted = 0

    def run_for(self, seconds: float, record: bool = False, joules: EnergyCounter | None = None) -> None:
        """Replay for about `seconds`."""
        begun = time.perf_counter()
        self._run(lambda done: time.perf_counter() - begun < seconds or not done, record, joules)

    def run_times(self, times: int, record: bool = False, joules: EnergyCounter | None = None) -> float:
        """Replay so often, for calls in which other processes take part: they must do it as often. Gives the
        milliseconds of a call."""
        return statistics.median(self._run(lambda done: done < times, record, joules))

    def _run(self, goes_on: Callable[[int], bool], record: bool, joules: EnergyCounter | None) -> list[float]:
        """Replay while `goes_on`, which is told how often it was done; the queue is kept some replays deep, so that
        launching costs nothing."""
        samples: list[float] = []
        self.wait()
        meter = _Steps(joules) if joules is not None and record else None
        waiting: deque[_Pair] = deque()
        done = 0
        while goes_on(done):
            self.freshen(done)
            done += 1
            if not self._on_gpu:
                started = time.perf_counter()
                self._replay()
                samples.append((time.perf_counter() - started) * 1e3 / self.calls)
                continue
            waiting.append(self.launch())
            if len(waiting) > QUEUED:
                samples.append(self._milliseconds(waiting.popleft()))
            if meter is not None:
                meter.look()
        samples += [self._milliseconds(pair) for pair in waiting]
        self.wait()
        if record:
            self._samples += samples
            self._counted += len(samples) * self.calls
            used = meter.used() if meter is not None else None
            if used is not None:
                self._energy.append(used[0])
                self._energy_seconds += used[1]
        return samples

    def freshen(self, done: int) -> None:
        """Make the inputs anew, if that is due after so many replays."""
        if self.fresh is not None and done % self.fresh_every == 0:
            with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                self.fresh()

    def launch(self) -> "_Pair":
        """One run between two events, on its stream of a GPU."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            pair = _event(), _event()
            pair[0].record()
            self._replay()
            pair[1].record()
        return pair

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def timing(self) -> Timing:
        """Of all runs that were recorded."""
        ordered = sorted(self._samples)
        watts = sum(self._energy) / self._energy_seconds if self._energy else None
        median = statistics.median(ordered)
        return Timing(
            median_ms=median,
            p10_ms=ordered[int(0.1 * (len(ordered) - 1))],
            p90_ms=ordered[int(0.9 * (len(ordered) - 1))],
            watts=watts,
            # Of the time of the calls themselves: the moments between replays belong to nobody.
            joules=watts * median * 1e-3 if watts is not None else None,
            calls=self._counted,
        )

    def _milliseconds(self, pair: "_Pair") -> float:
        pair[1].synchronize()
        return float(pair[0].elapsed_time(pair[1])) / self.calls


_Pair = tuple[torch.cuda.Event, torch.cuda.Event]


class _Steps:
    """Energy between two steps of a device's counter, which moves only every some tens of milliseconds."""

    def __init__(self, joules: EnergyCounter) -> None:
        self._joules = joules
        self._steps: list[tuple[float, float]] = []
        self._looked = time.perf_counter()
        self._last = joules()

    def look(self) -> None:
        """Note a step of the counter; looks at most every `LOOK_SECONDS`."""
        now = time.perf_counter()
        if self._last is None or now - self._looked < LOOK_SECONDS:
            return
        self._looked, joules = now, self._joules()
        if joules is not None and joules != self._last:
            self._steps.append((now, joules))
            self._last = joules

    def used(self) -> tuple[float, float] | None:
        """Joules and seconds from the first step to the last; None if fewer than two were seen."""
        if len(self._steps) < 2:
            return None
        (began, first), (ended, last) = self._steps[0], self._steps[-1]
        return last - first, ended - began


def capture(
    candidate: Candidate, device: torch.device, stream: torch.cuda.Stream | None = None, *, turns: int | None = None
) -> Replays:
    """The candidate's calls as a graph of about `SAMPLE_SECONDS` or more; on a CPU the calls themselves.

    With `turns`, so many of each call, whatever they take: for calls in which other processes take part, which must be
    as many there.
    """
    calls = [candidate] if callable(candidate) else list(candidate)
    if device.type != "cuda":

        def replay() -> None:
            for call in calls:
                call()

        replay()
        return Replays(replay, len(calls), device)
    side = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            for call in calls:
                call()
        torch.cuda.synchronize(device)
        turns = turns or _turns(calls)
    graph = torch.cuda.CUDAGraph()
    # In this thread's mode alone: others look after the ranks' libraries meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(turns):
            for call in calls:
                call()
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        graph.replay()
    torch.cuda.synchronize(device)
    return Replays(graph.replay, turns * len(calls), device, stream)


def _turns(calls: Sequence[Callable[[], object]]) -> int:
    """How many rounds of the calls make a graph that is long enough; on the current stream."""
    started, ended = _event(), _event()
    started.record()
    for call in calls:
        call()
    ended.record()
    ended.synchronize()
    turn = max(started.elapsed_time(ended) * 1e-3, 1e-6)
    turns: int = max(1, min(MAX_CALLS // len(calls), math.ceil(SAMPLE_SECONDS / turn)))
    # Of launches that are slower than the kernel, the first measurement is too long: a graph of ten turns tells.
    if turns < 10 and turn < 10 * SAMPLE_SECONDS and len(calls) * 10 <= MAX_CALLS:
        return 10
    return turns


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
