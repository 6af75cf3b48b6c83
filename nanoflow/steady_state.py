"""What an engine had done after each of its iterations, and which of them are the steady state.

Contract: the steady state goes from the first iteration in which the KV cache is in full use (`FULL` of the most pages
that it comes to while sequences wait, or a sequence in every slot) to the last one after which a sequence waits. Before
it, the KV cache fills up; after it, nothing can take the place of what ends. A run that never has `LEAST_ITERATIONS` of
these has no steady state: all of its requests run at once.
"""

import time
from array import array
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nanoflow.engine import Engine
from nanoflow.ops.operation import Cost
from nanoflow.power import EnergyMeter
from nanoflow.recording import IterationRecord
from nanoflow.search.cost_model import Ceilings, bounds
from nanoflow.summing_up import idle_share

__all__ = ["EngineLog", "Stretch", "steady_state"]

FULL = 0.97
LEAST_ITERATIONS = 16
ENERGY_SECONDS = 0.1
"""Least time between two looks at the energy counter, which moves every some tens of milliseconds."""


@dataclass(frozen=True)
class Stretch:
    """What was done from the end of one iteration to the end of a later one. Zeros where nothing was."""

    first_iteration: int
    """Its number in the run, from 0."""
    iterations: int
    seconds: float
    busy_seconds: float
    host_seconds: float
    """In which iterations were formed and launched."""
    idle_seconds: float
    """Of the device, between iterations; 0 if the executor does not tell."""
    rows: int
    """Of the dense batches, padding left out. What is prefilled again after a preemption counts again."""
    padding_rows: int
    output_tokens: int
    flops: float
    """By the operations' own accounts, as are the bytes."""
    bytes: float
    wire_bytes: float
    joules: float | None
    """Of the whole card; None where it cannot be measured."""

    @property
    def figures(self) -> dict[str, float | None]:
        """What is told of it. A row is a token; rates of the operations are over the time in which the device ran."""
        busy, seconds, iterations = self.busy_seconds, self.seconds, self.iterations
        return {
            "iterations": iterations,
            "seconds": seconds,
            "total_tokens_per_second": _over(self.rows, seconds),
            "output_tokens_per_second": _over(self.output_tokens, seconds),
            "iteration_ms": _over(1e3 * seconds, iterations),
            "host_ms": _over(1e3 * self.host_seconds, iterations),
            "mean_rows": _over(self.rows, iterations),
            "padding_share": _over(self.padding_rows, self.rows + self.padding_rows),
            "executor_busy_share": _over(busy, seconds),
            "device_idle_share": idle_share(busy, self.idle_seconds),
            "tflops": _over(self.flops / 1e12, busy),
            "gbytes_per_second": _over(self.bytes / 1e9, busy),
            "watts": None if self.joules is None else _over(self.joules, seconds),
            "joules_per_token": None if self.joules is None else _over(self.joules, self.rows),
        }

    def reached(self, ceilings: Ceilings) -> dict[str, float]:
        """Share reached of each bound that is known: the time that it allows for this work, over the time taken."""
        cost = Cost(flops=self.flops, bytes=self.bytes, wire_bytes=self.wire_bytes)
        return bounds(cost, ceilings, self.joules).reached(self.seconds)


class EngineLog:
    """Keeps the engine's totals after each iteration: 96 bytes each. An observer of the engine.

    Args:
        engine: has run nothing yet.
        meter: of the device's energy.
        started: the run's start by `time.perf_counter`; now if left out.
    """

    def __init__(self, engine: Engine, meter: EnergyMeter, started: float | None = None) -> None:
        self._engine = engine
        self._meter = meter
        self._width = len(self._totals(0.0, 0.0))
        started = time.perf_counter() if started is None else started
        self._values = array("d", self._totals(started, 0.0))
        self._output_tokens = 0
        self._kv_pages = array("q")
        self._waiting = array("q")
        self._slots_full = array("b")
        self._energy = array("d")  # time and counter in turn
        self._look(started)

    def observe(self, record: IterationRecord) -> None:
        """Note the totals after an iteration."""
        self._output_tokens += record.output_tokens
        self._values.extend(self._totals(record.time, self._output_tokens))
        self._kv_pages.append(record.kv_pages)
        self._waiting.append(record.waiting)
        self._slots_full.append(record.running >= self._engine.scheduler.max_running)
        if self._energy and record.time - self._energy[-2] >= ENERGY_SECONDS:
            self._look(record.time)

    def whole(self) -> Stretch:
        """All of it, from the start on."""
        return self._stretch(0, len(self._waiting))

    def steady(self) -> Stretch | None:
        """The steady state; None if there is none."""
        found = steady_state(*(np.array(column) for column in (self._kv_pages, self._waiting, self._slots_full)))
        return None if found is None else self._stretch(*found)

    def course(self, pieces: int = 60) -> list[Stretch]:
        """The whole in at most so many stretches of about as many iterations each."""
        ends = np.unique(np.linspace(0, len(self._waiting), pieces + 1).round().astype(int)).tolist()
        return [self._stretch(first, end) for first, end in pairwise(ends)]

    def _totals(self, now: float, output_tokens: float) -> tuple[float, ...]:
        stats = self._engine.stats
        done = (stats.busy_seconds, stats.host_seconds, stats.idle_seconds, stats.rows, stats.padding_rows)
        cost = (stats.cost.flops, stats.cost.bytes, stats.cost.wire_bytes)
        return now, output_tokens, *done, *cost

    def _look(self, now: float) -> None:
        joules = self._meter.joules()
        if joules is not None:
            self._energy.extend((now, joules))

    def _stretch(self, first: int, end: int) -> Stretch:
        """Iterations `first` to `end`, that one left out; row i of the totals is before iteration i."""
        rows = np.array(self._values).reshape(-1, self._width)
        before, after = rows[first], rows[end]
        seconds, output_tokens, busy, host, idle, done, padding, flops, moved, wire = (after - before).tolist()
        if self._energy and end == len(self._waiting) and self._energy[-2] < after[0]:
            self._look(time.perf_counter())
        joules = None
        if len(self._energy) > 2:
            times, counter = np.array(self._energy).reshape(-1, 2).T
            joules = float(np.diff(np.interp([before[0], after[0]], times, counter))[0])
        return Stretch(
            first_iteration=first,
            iterations=end - first,
            seconds=seconds,
            busy_seconds=busy,
            host_seconds=host,
            idle_seconds=idle,
            rows=int(done),
            padding_rows=int(padding),
            output_tokens=int(output_tokens),
            flops=flops,
            bytes=moved,
            wire_bytes=wire,
            joules=joules,
        )


def steady_state(
    kv_pages: NDArray[np.integer], waiting: NDArray[np.integer], slots_full: NDArray[np.integer]
) -> tuple[int, int] | None:
    """(first iteration of the steady state, one past its last); None if there is none.

    Args:
        kv_pages: [iterations] pages in use after each.
        waiting: [iterations] sequences that wait for admission then.
        slots_full: [iterations] whether every slot has a sequence then.
    """
    waits = np.flatnonzero(waiting)
    if not len(waits):
        return None
    end = int(waits[-1]) + 1
    full = (kv_pages[:end] >= FULL * kv_pages[:end].max()) | (slots_full[:end] != 0)
    first = int(np.argmax(full))
    return (first, end) if end - first >= LEAST_ITERATIONS else None


def _over(amount: float, per: float) -> float:
    return amount / per if per else 0.0
