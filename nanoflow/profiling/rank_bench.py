"""Measuring collectives, alone and beside what a rank does by itself: on all ranks at once, as often on each.

Contract: how often a collective runs is agreed upon before it does, and so is whether it runs at all: a rank that is
faster, or that finds something amiss, must not leave the others in it. What is told of a collective, and of what ran
beside one, is the slowest rank's, the same on all ranks.

A sum over ranks in place makes its buffer N times as much with every call. So buffers begin next to the smallest number
that their type has, as random as any, and are made anew before they reach the largest: zeros, or infinities, would
draw less power and let products beside them run faster.
"""

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from nanoflow.ops.collectives import CTAS, Collective
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import KV, SCRATCH, NanoContext
from nanoflow.ops.peer_memory import PeerMemory, PeerMemoryError
from nanoflow.ops.row_sharding import SHARDINGS, with_sharding
from nanoflow.pipeline.partitions import Partition, PartitionError
from nanoflow.search.profile import At, Point
from nanoflow.search.profiler import Case, PairCase, SoloCase, Unmeasurable
from nanoflow.search.timing import EnergyCounter, Replays, Timing, capture, on_sms, time_together

__all__ = ["RankBench", "Team", "among_ranks", "collectives_in"]

IN_A_ROW = 8
"""Calls of a collective in one graph."""
TRIAL = 3
"""Replays before those that count, which tell how many these are."""
LEAST_REPLAYS = 3
SPARE = 8
"""Doublings at either end of a type's range that are not used: random numbers are spread."""


def collectives_in(graph: Graph) -> dict[str, Collective]:
    """By name, the collectives of a rank's graph: of a layer in every sharding, and of what comes behind the layers."""
    if graph.ranks == 1:
        return {}
    ops = [*graph.layer, *graph.epilogue]
    for sharding in SHARDINGS:
        try:
            ops += with_sharding(graph, sharding).layer
        except ValueError:  # the model's layers cannot be shared so
            continue
    return {op.name: op for op in ops if isinstance(op, Collective)}


def among_ranks(case: Case, collectives: Mapping[str, Collective]) -> bool:
    """Whether all ranks must take part in a case."""
    return (case.op if isinstance(case, SoloCase) else case.other) in collectives


class Team:
    """What ranks agree upon."""

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self._communicator, self._device = communicator, device

    def most(self, values: Sequence[float]) -> list[float]:
        """Of each value the largest that a rank has. Raises CommunicatorError."""
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        all_ranks = own.new_empty(self._communicator.size, len(values))
        self._communicator.all_gather(own, all_ranks)
        return cast("list[float]", all_ranks.amax(0).tolist())

    def go_on(self, problem: str | None) -> None:
        """Come together. Raises Unmeasurable on all ranks if one of them has a problem."""
        if self.most([problem is not None])[0]:
            raise Unmeasurable(problem or "another rank cannot")


@dataclass(frozen=True)
class _Means:
    """What a form of a collective reaches the other ranks with."""

    communicator: Communicator | None
    peers: PeerMemory | None
    places: PeerMemory | None


class RankBench:
    """Measures the cases that all ranks take part in; every rank makes one, and calls it with the same cases.

    Args:
        collectives: by name, see `collectives_in`.
        cases: all that will be measured.
        buffers: physical buffers by value, with room for all cases.
        joules: reads this rank's device's energy counter.

    Raises CommunicatorError.
    """

    def __init__(
        self,
        communicator: Communicator,
        collectives: Mapping[str, Collective],
        cases: Iterable[Case],
        buffers: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        joules: EnergyCounter,
    ) -> None:
        self.team = Team(communicator, device)
        self.missing: dict[str, str] = {}
        """Forms that cannot run here, and why; the same on all ranks."""
        self._communicator, self._collectives = communicator, collectives
        self._device, self._dtype, self._joules = device, dtype, joules
        self._buffers = dict(buffers)
        self._memories: dict[str, PeerMemory] = {}
        self._communicators: dict[str, Communicator] = {}
        rows: dict[tuple[str, str], int] = {}
        for case in cases:
            if not among_ranks(case, collectives):
                continue
            if isinstance(case, SoloCase):
                form, most = (case.op, case.kernel), max(at[0] for at in case.at)
            else:
                form, most = (case.other, case.other_kernel), case.other_at[0]
            rows[form] = max(most, rows.get(form, 0))
        self._means = {form: self._meet(*form, most) for form, most in rows.items() if form[1] not in self.missing}

    def can(self, case: Case) -> bool:
        """Whether the form that a case is of runs here."""
        return (case.kernel if isinstance(case, SoloCase) else case.other_kernel) not in self.missing

    def close(self) -> None:
        """Give back what the ranks have in common of their memory; nothing runs any more."""
        for memory in self._memories.values():
            memory.close()
        self._memories.clear()
        self._means.clear()
        self._buffers.clear()

    def solo(self, case: SoloCase, seconds: Callable[[At], float]) -> list[Point]:
        """The points of a collective, its sizes in turns of half of `seconds`. Raises Unmeasurable, on all ranks."""
        team, device = self.team, self._device
        with ExitStack() as stack:
            stream, problem = None, None
            try:
                stream = stack.enter_context(on_sms(case.sms, device))
            except (PartitionError, torch.OutOfMemoryError) as error:
                problem = str(error).splitlines()[0]
            team.go_on(problem)
            replays = [self._replays(case.op, case.kernel, at[0], case.sms, stream) for at in case.at]
            try:
                timings = self._in_turns(replays, [seconds(at) / 2 for at in case.at], energy=case.sms is None)
            finally:
                replays.clear()  # graphs must be gone before the stream's part is
                _settle(device)
            medians = team.most([timing.median_ms for timing in timings])
        return [Point(at, ms / 1e3, t.joules) for at, ms, t in zip(case.at, medians, timings, strict=True)]

    def pair(
        self, case: PairCase, calls: Callable[[], Sequence[Callable[[], None]]], seconds: float
    ) -> tuple[float, float]:
        """Shares of their solo speeds that something of a rank's own and a collective keep beside each other.

        `calls` gives those of the first. Raises Unmeasurable, on all ranks.
        """
        team, device = self.team, self._device
        with ExitStack() as stack:
            graphs: list[Replays] = []
            problem = None
            try:
                streams = stack.enter_context(_streams(case, device))
                graphs.append(capture(calls(), device, streams[0]))
            except (PartitionError, torch.OutOfMemoryError, Unmeasurable) as error:
                problem = str(error).splitlines()[0]
            try:
                team.go_on(problem)
                graphs.append(
                    self._replays(case.other, case.other_kernel, case.other_at[0], case.other_sms, streams[1])
                )
                mine = self._beside(graphs, seconds)
            finally:
                graphs.clear()
                _settle(device)
            first, second, first_beside, second_beside = team.most(mine)
        return min(1.0, first / first_beside), min(1.0, second / second_beside)

    def _in_turns(self, replays: Sequence[Replays], seconds: Sequence[float], *, energy: bool) -> list[Timing]:
        """Two turns of each, of so many seconds."""
        trial = self.team.most([each.run_times(TRIAL) for each in replays])
        times = [_times(length, each, ms) for length, each, ms in zip(seconds, replays, trial, strict=True)]
        for _ in range(2):
            for each, count in zip(replays, times, strict=True):
                each.run_times(count, record=True, joules=self._joules if energy else None)
        return [each.timing() for each in replays]

    def _beside(self, graphs: Sequence[Replays], seconds: float) -> tuple[float, float, float, float]:
        """Milliseconds of a call of each of two, alone, and while the other runs; the second is all ranks'."""
        own, shared = graphs
        (milliseconds,) = self.team.most([shared.run_times(TRIAL)])

        def alone(record: bool) -> None:
            own.run_for(seconds / 4, record)
            self.team.go_on(None)  # the ranks begin together
            shared.run_times(_times(seconds / 4, shared, milliseconds), record)

        alone(False)
        alone(True)
        self.team.go_on(None)
        together = time_together(own, shared, seconds, _times(seconds, shared, milliseconds))
        alone(True)
        return (own.timing().median_ms, shared.timing().median_ms, *together)

    def _replays(self, name: str, kernel: str, rows: int, sms: int | None, stream: torch.cuda.Stream | None) -> Replays:
        """The collective, some times in a row; every rank makes the same."""
        op = self._collectives[name]
        chosen = kernel or op.preferred_kernel(self._device, self._dtype, sms)
        means = self._means[name, kernel]
        weights = {w.name: torch.ones(w.shape, dtype=self._dtype, device=self._device) for w in op.weights}
        # Nothing of a batch matters to a collective but its rows.
        part, nothing = _Rows(slice(0, rows), (slice(0, rows),)), None
        context = NanoContext(
            nothing, part, 0, self._buffers, weights, nothing, sms, "network",  # type: ignore[arg-type]
            means.communicator, means.peers, means.places,
        )  # fmt: skip
        run = op.kernels[chosen]
        written = [access.buffer for access in op.accesses if access.write and access.buffer not in (SCRATCH, KV)]
        limits = torch.finfo(self._dtype)
        smallest = limits.tiny * 2.0**SPARE

        def fresh() -> None:
            for buffer in written:
                self._buffers[buffer][:rows].normal_(std=smallest)

        def call() -> None:
            run(context)

        fresh()
        replays = capture([call] * (IN_A_ROW if self._device.type == "cuda" else 1), self._device, stream, turns=1)
        doublings = math.log2(limits.max) - math.log2(limits.tiny) - 2 * SPARE
        replays.fresh = fresh
        replays.fresh_every = max(1, int(doublings / (replays.calls * math.ceil(math.log2(op.ranks)))))
        return replays

    def _meet(self, name: str, kernel: str, rows: int) -> _Means:
        """Make what a form needs; every rank makes the same, in the same order."""
        op = self._collectives[name]
        chosen = kernel or op.preferred_kernel(self._device, self._dtype)
        room = op.peer_room(chosen, rows, self._dtype.itemsize)
        if room is None:
            key = f"profile-{CTAS.get(chosen, 'all')}"
            if key not in self._communicators:
                self._communicators[key] = self._communicator.twin(key, CTAS.get(chosen))
            return _Means(self._communicators[key], None, None)
        try:
            peers = self._memory(f"profile-{name}-{kernel}", room)
            value = op.peer_buffer(chosen)
            if value is None:
                return _Means(None, peers, None)
            buffer = self._buffers[value]
            places = self._memory(f"profile-buffer-{value}", buffer.numel() * buffer.element_size())
            data = places.data(self._communicator.rank, 0, buffer.numel(), self._dtype)
            self._buffers[value] = data.view(buffer.shape)
            return _Means(None, peers, places)
        except PeerMemoryError as error:
            self.missing[kernel] = str(error)
            return _Means(None, None, None)

    def _memory(self, name: str, room: int) -> PeerMemory:
        if name not in self._memories:
            self._memories[name] = self._communicator.peer_memory(name, room)
        return self._memories[name]


@dataclass(frozen=True)
class _Rows:
    """What a collective sees of a nano-batch."""

    rows: slice
    nano_batch_rows: tuple[slice, ...]


def _times(seconds: float, replays: Replays, milliseconds: float) -> int:
    """Replays in about `seconds`, of calls of so many milliseconds."""
    return max(LEAST_REPLAYS, math.ceil(seconds * 1e3 / (milliseconds * replays.calls)))


@contextmanager
def _streams(case: PairCase, device: torch.device) -> Iterator[Sequence[torch.cuda.Stream]]:
    """For the two of a pair, each on its part of the SMs, or on plain streams. Raises PartitionError."""
    sms = [budget for budget in (case.sms, case.other_sms) if budget is not None]
    if not sms:  # as a plan's lanes have them that are not confined: the later lane goes first
        yield [torch.cuda.Stream(device, priority=-n) for n in (0, 1)]  # type: ignore[no-untyped-call]
        return
    partition = Partition(sms, device)
    try:
        yield list(partition.streams)
    finally:
        partition.close()


def _settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
