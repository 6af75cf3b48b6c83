"""Profiling on all ranks that share a model: each measures the same cases, and what rank 0 finds is the profile's.

A card's power is what it draws itself, and a link's speed is what both ends make of it: so all ranks do all of it, and
a collective counts as the slowest of them had it (`nanoflow.profiling.rank_bench`).

    rank 0                                          rank r (`serve_cases`)
    Profiling                               ---->   meet; measure the link        (in place of `Load`)
    Cases                                   ---->   lay out memory for them
    a case                                  ---->   measure it
                                            <----   READY                         then the next case, or the line's end
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from nanoflow.loading import Model
from nanoflow.ops.communicator import Communicator
from nanoflow.parallel.group import TensorGroup
from nanoflow.parallel.messages import READY
from nanoflow.parallel.processes import Line
from nanoflow.power import EnergyMeter
from nanoflow.profiling.device_bench import DeviceBench, few_layers
from nanoflow.profiling.rank_bench import among_ranks, collectives_in
from nanoflow.search.profile import Point
from nanoflow.search.profiler import Case, PairCase, SoloCase, Unmeasurable

__all__ = ["Cases", "GroupBench", "serve_cases"]

Found = TypeVar("Found")


@dataclass(frozen=True)
class Cases:
    """All that will be measured, though perhaps not all of it: what memory is laid out for."""

    cases: tuple[Case, ...]
    page_size: int
    """Tokens of a KV page."""


class GroupBench:
    """A `nanoflow.search.profiler.Bench` of all ranks, as rank 0 has it.

    Raises OutOfMemoryError if weights and buffers do not fit, ParallelError.
    """

    def __init__(self, group: TensorGroup, model: Model, cases: Sequence[Case], page_size: int) -> None:
        group.tell(Cases(tuple(cases), page_size))
        self._group = group
        self._collectives = collectives_in(model.graph)
        joules = EnergyMeter(model.device).joules
        with group.blamed():
            self.own = DeviceBench(few_layers(model), cases, page_size, joules, communicator=group.communicator)

    def solo(self, case: SoloCase) -> list[Point]:
        """See `Bench.solo`. Raises Unmeasurable, ParallelError."""
        return self._on_all(case, lambda: self.own.solo(case))

    def pair(self, case: PairCase) -> tuple[float, float]:
        """See `Bench.pair`. Raises Unmeasurable, ParallelError."""
        return self._on_all(case, lambda: self.own.pair(case))

    def close(self) -> None:
        """Give back what was laid out; where a rank was lost, the process's end does."""
        if not self._group.lost:
            self.own.close()
            self._group.communicator.close()

    def _on_all(self, case: Case, measure: Callable[[], Found]) -> Found:
        """`measure` here, while the other ranks do the same."""
        group, problem = self._group, None
        with _held_back():
            group.tell(case)
            together = among_ranks(case, self._collectives)
            # Of a rank that is gone a GPU would never hear; what a rank does alone may take long, compiling.
            with group.blamed(), group.awaited() if together else nullcontext():
                try:
                    found = measure()
                except Unmeasurable as error:
                    problem = error
            group.hear(READY)
        if problem is not None:
            raise problem
        return found


def serve_cases(line: Line, model: Model, communicator: Communicator) -> None:
    """Any other rank: measure what rank 0 says until `line` ends."""
    order: Cases = line.recv()
    joules = EnergyMeter(model.device).joules
    bench = DeviceBench(few_layers(model), order.cases, order.page_size, joules, communicator=communicator)
    while True:
        try:
            case: Case = line.recv()
        except (EOFError, OSError):
            bench.close()
            communicator.close()
            return
        with suppress(Unmeasurable):
            if isinstance(case, SoloCase):
                bench.solo(case)
            else:
                bench.pair(case)
        line.send(READY)


@contextmanager
def _held_back() -> Iterator[None]:
    """Ctrl-C comes when it is over: the other ranks would wait for this one in the middle of it. A second one comes at
    once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
