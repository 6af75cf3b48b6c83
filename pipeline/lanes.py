"""The lanes of a program on a GPU: which stream each step is launched on, and which events order the streams.

Contract: a step starts only when all its predecessors (`Program.predecessors`: waits, joins, the lane's own order) are
done, and nothing else holds it back but the order of launches on its stream. Streams belong to parts of partitions: a
lane changes its stream where a stage changes its partition.

Pseudo-code of `launch_order`::

    for every step, in the program's order:
        stream = that of the part that its lane has in its stage
        waits  = for every other stream, the latest predecessor on it, unless something waited for before implies it
    the main stream, on which an iteration begins and ends, is let go by all others at the end
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nanoflow.pipeline.partitions import Partition, unavailable
from nanoflow.pipeline.program import Program

__all__ = ["BEGIN", "Lanes", "Launch", "LaunchOrder", "launch_order"]

log = logging.getLogger(__name__)

BEGIN = -1
"""Stands for the begin of an iteration where a step to wait for is meant."""

Place = tuple[tuple[int, ...], int]
"""The SMs of all parts of a partition, none where nothing is confined, and which part it is."""

MAIN: Place = ((), 0)
"""The first lane on the whole device: the stream that an iteration begins and ends on."""


@dataclass(frozen=True)
class Launch:
    """One step on its stream."""

    step: int
    stream: int
    """Index into `LaunchOrder.places`."""
    waits: tuple[int, ...]
    """Steps on other streams, or `BEGIN`, that the stream waits for before it."""
    records: bool
    """Whether another stream waits for it."""


@dataclass(frozen=True)
class LaunchOrder:
    """All steps of a program in the order of their launches."""

    places: tuple[Place, ...]
    """What each stream stands for; the first, the main stream, is the one that an iteration begins and ends on."""
    launches: tuple[Launch, ...]
    ends: tuple[int, ...]
    """Steps that the main stream waits for at the end."""


def launch_order(program: Program) -> LaunchOrder:
    """Streams and waits of `program`; see the module's text."""
    plan = program.plan
    numbers: dict[Place, int] = {MAIN: 0}
    clocks: list[dict[int, int]] = []  # of each step: the latest step of every stream that is done when it is
    last: dict[int, int] = {}
    streams: list[int] = []
    found: list[list[int]] = []
    for index, (step, predecessors) in enumerate(zip(program.steps, program.predecessors, strict=True)):
        stream = numbers.setdefault(plan.place(step.stage, step.lane), len(numbers))
        streams.append(stream)
        clock = dict(clocks[last[stream]]) if stream in last else {}
        waits = []
        for before in sorted(predecessors, reverse=True):
            if streams[before] != stream and clock.get(streams[before], BEGIN) < before:
                waits.append(before)
                _merge(clock, clocks[before])
        if stream and stream not in last and not waits:
            waits.append(BEGIN)
        clock[stream] = index
        clocks.append(clock)
        last[stream] = index
        found.append(sorted(waits))
    known = dict(clocks[last[0]]) if 0 in last else {}
    ends = []
    for end in sorted(last.values(), reverse=True):
        if known.get(streams[end], BEGIN) < end:
            ends.append(end)
            _merge(known, clocks[end])
    waited_for = {step for waits in found for step in waits} | set(ends)
    launches = tuple(
        Launch(index, stream, tuple(waits), index in waited_for)
        for index, (stream, waits) in enumerate(zip(streams, found, strict=True))
    )
    return LaunchOrder(tuple(numbers), launches, tuple(ends))


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, done in other.items():
        clock[stream] = max(clock.get(stream, BEGIN), done)


class Lanes:
    """The streams of some programs' lanes, and how a program's steps are launched on them.

    A lane without a part of the SMs has a plain stream, of higher priority the later it stands in its stage: compute
    comes first there, and would take all SMs.

    Attributes:
        partitions: by the SMs of their parts, all that the programs' plans confine lanes to; none if SMs cannot be set
            apart, which is said once.

    Raises:
        PartitionError: the device cannot be split as a plan says.
    """

    def __init__(self, programs: Sequence[Program], device: torch.device) -> None:
        self.orders = tuple(launch_order(program) for program in programs)
        self.partitions = _partitions(programs, device)
        self._streams: dict[Place, torch.cuda.Stream] = {}
        if device.type == "cuda":
            for place in sorted({place for order in self.orders for place in order.places[1:]}):
                self._streams[place] = _stream(place, self.partitions, device)

    @property
    def confined(self) -> bool:
        """Whether lanes have the SMs that their plan gives them, and no others."""
        return bool(self.partitions)

    def close(self) -> None:
        """Give the partitions back; nothing may be running on them, and their graphs must be gone."""
        for partition in self.partitions.values():
            partition.close()
        self.partitions = {}

    def launch(self, program: int, run: Callable[[int], None]) -> None:
        """Call `run` for every step of a program, each with its stream current; all of it begins after what the
        current stream has now, and the current stream waits for all of it."""
        order = self.orders[program]
        if len(order.places) == 1 or not self._streams:  # the order of launches is one that all waits allow
            for launch in order.launches:
                run(launch.step)
            return
        main = torch.cuda.current_stream()
        streams = [main, *(self._streams[place] for place in order.places[1:])]
        events = {BEGIN: main.record_event()}
        for launch in order.launches:
            stream = streams[launch.stream]
            with torch.cuda.stream(stream):
                for step in launch.waits:
                    stream.wait_event(events[step])
                run(launch.step)
                if launch.records:
                    events[launch.step] = stream.record_event()
        for step in order.ends:
            main.wait_event(events[step])


def _partitions(programs: Sequence[Program], device: torch.device) -> dict[tuple[int, ...], Partition]:
    """The partitions that the programs' lanes have, by the SMs of their parts; none if SMs cannot be set apart."""
    plans = [program.plan for program in programs]
    wanted = {plan.place(index, lane)[0] for plan in plans for index, s in enumerate(plan.period) for lane in s.lanes}
    wanted.discard(())
    if not wanted or device.type != "cuda":
        return {}
    reason = unavailable(device)
    if reason:
        log.warning("lanes share all SMs, on streams with priorities: SMs cannot be set apart (%s)", reason)
        return {}
    return {parts: Partition(parts, device) for parts in sorted(wanted)}


def _stream(place: Place, partitions: Mapping[tuple[int, ...], Partition], device: torch.device) -> torch.cuda.Stream:
    parts, part = place
    if parts in partitions:
        return partitions[parts].streams[part]
    return torch.cuda.Stream(device, priority=-part)  # type: ignore[no-untyped-call]
