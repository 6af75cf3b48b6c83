"""The timeline of one iteration's layers under a plan: measured by an executor's marks, or estimated.

Contract: a `Timeline` is frozen data that pictures, traces and reports are made of. It knows where every nano-op ran,
from when to when, and, moment by moment, how many SMs worked, how many FLOP/s and how many bytes/s they did, in memory
and on the wire. What was measured is made into one here, estimates are made by `nanoflow.search.simulate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from nanoflow.ops.collectives import Collective
from nanoflow.ops.operation import Cost, Work
from nanoflow.pipeline.period import complete_period
from nanoflow.pipeline.program import Program, Step
from nanoflow.search.rates import collective_sms, shared_sms

__all__ = [
    "Load",
    "Segment",
    "Span",
    "Timeline",
    "measured_timeline",
    "spans_of",
    "step_costs",
]

Source = Literal["estimated", "measured"]


@dataclass(frozen=True)
class Span:
    """One nano-op on the timeline. A nano-op without rows has no length."""

    step: int
    """Its place in `Program.steps`."""
    name: str
    """As plans write it, the layer apart: ``qkv.a``."""
    op: str
    nano_batch: str | None
    """None: all rows at once."""
    layer: int
    repetition: int
    """Which repetition of the plan's period it belongs to: its layer less how far the period looks ahead for it."""
    stage: int
    lane: str
    partition: str
    sms: int | None
    """SMs of its lane; None: the lane is not confined."""
    resource: str
    start: float
    """Seconds, as `end`."""
    end: float
    flops: float
    bytes: float
    waits: tuple[int, ...]
    """Steps of other lanes that it waits for."""
    wire_bytes: float = 0.0
    taken: int | None = None
    """SMs that a collective takes, which may be fewer than its lane has; None: it is no collective."""

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def label(self, layer: int) -> str:
        """The name as a plan writes it in a period whose own layer is `layer`: ``qkv.a@1``."""
        return f"{self.name}{f'@{self.layer - layer}' if self.layer != layer else ''}"


@dataclass(frozen=True)
class Load:
    """What one lane does during a segment."""

    lane: str
    sms: float
    flops_per_second: float
    bytes_per_second: float
    wire_bytes_per_second: float = 0.0

    @classmethod
    def of(cls, lane: str, sms: float, cost: Cost) -> "Load":
        """What does `cost` in a second."""
        return cls(lane, sms, cost.flops, cost.bytes, cost.wire_bytes)


@dataclass(frozen=True)
class Segment:
    """A stretch of time in which the same nano-ops run; lanes that do nothing have no load."""

    start: float
    end: float
    loads: tuple[Load, ...]


@dataclass(frozen=True)
class Timeline:
    """Nano-ops in the order of `Program.steps`, and what the device does from moment to moment."""

    spans: tuple[Span, ...]
    segments: tuple[Segment, ...]
    """One after the other, in time; moments at which nothing runs belong to none."""
    seconds: float
    source: Source
    device_sms: int
    lanes: tuple[str, ...]
    """Of the plan, in its order."""
    layer: int = 0
    """The layer that a stretch cut out of an iteration shows; 0 for the whole."""

    @property
    def has_wire(self) -> bool:
        """Whether anything is sent to other ranks."""
        return any(span.wire_bytes for span in self.spans)

    def busy(self) -> dict[str, float]:
        """For each lane, the share of the time in which it runs something."""
        used = dict.fromkeys(self.lanes, 0.0)
        for segment in self.segments:
            for load in segment.loads:
                used[load.lane] += segment.end - segment.start
        return {lane: seconds / self.seconds if self.seconds else 0.0 for lane, seconds in used.items()}

    def cut(self, start: float, end: float, layer: int) -> "Timeline":
        """The stretch from `start` to `end`, its times counted from `start`. Spans that reach over its edges keep
        their whole length: they begin before 0, or end after `seconds`."""
        spans = [
            replace(span, start=span.start - start, end=span.end - start)
            for span in self.spans
            if span.end > span.start and span.end > start and span.start < end
        ]
        segments = [
            Segment(max(segment.start, start) - start, min(segment.end, end) - start, segment.loads)
            for segment in self.segments
            if segment.end > start and segment.start < end
        ]
        return replace(self, spans=tuple(spans), segments=tuple(segments), seconds=max(0.0, end - start), layer=layer)

    def layers(self, first: int, last: int) -> "Timeline":
        """The stretch in which layers `first` to `last` (both included) run, and whatever runs beside them."""
        own = [span for span in self.spans if first <= span.layer <= last]
        if not own:
            raise ValueError(f"no nano-op of layers {first} to {last} is on the timeline")
        return self.cut(min(span.start for span in own), max(span.end for span in own), first)

    def period(self, layer: int | None = None) -> "Timeline":
        """One repetition of the plan's period in steady state: from the moment at which its first nano-op starts to the
        moment at which that of the next repetition does. `layer`: which one; by default the middle of those that are
        whole."""
        if not self.seconds:
            return replace(self, spans=())
        last = max(span.layer for span in self.spans)
        furthest = max(span.layer - span.repetition for span in self.spans)
        layer = max(0, last - furthest) // 2 if layer is None else layer
        own = [span for span in self.spans if span.repetition == layer and span.end > span.start]
        if not own:
            raise ValueError(f"no repetition {layer} of the period is on the timeline; the last is {last}")
        stages = sorted({span.stage for span in own})
        # Between stages all lanes meet, so the first stage begins for all of them at once. In a period of one stage
        # each lane goes on as it can, and one of them must tell where to cut.
        lanes = self.lanes if len(stages) > 1 else [next(lane for lane in self.lanes if _of(own, stages[0], lane))]

        def begin(repetition: int) -> float | None:
            spans = [span for span in self.spans if span.repetition == repetition and span.end > span.start]
            return min((span.start for lane in lanes for span in _of(spans, stages[0], lane)), default=None)

        start, end = begin(layer), begin(layer + 1)
        assert start is not None  # of `own`
        return self.cut(start, max(span.end for span in own) if end is None else end, layer)


def measured_timeline(
    program: Program, times: Sequence[tuple[float, float]], works: Sequence[Work], itemsize: int, device_sms: int
) -> Timeline:
    """The timeline that was measured.

    Args:
        times: start and end of each of the program's steps, in seconds.
        works: of each nano-batch.
        itemsize: bytes of an element of weights and activations.
        device_sms: SMs of the device; 1 where there are none.

    Rates are means over each nano-op. Raises ValueError if there are not as many times as steps.
    """
    if len(times) != len(program.steps):
        raise ValueError(f"{len(times)} measured times do not belong to a program of {len(program.steps)} steps")
    spans = spans_of(program, step_costs(program, works, itemsize), times)
    return Timeline(
        spans,
        _measured_segments(spans, device_sms),
        max((span.end for span in spans), default=0.0),
        "measured",
        device_sms,
        program.plan.lanes,
    )


def step_costs(program: Program, works: Sequence[Work], itemsize: int) -> list[Cost]:
    """Of every step. An operation that has no rows of its class to work on is skipped, and costs nothing."""
    count = len(program.plan.nano_batches)
    if len(works) != count:
        raise ValueError(f"{len(works)} works do not belong to a plan of {count} nano-batches")
    total = sum(works, Work())
    kept: dict[tuple[str, int | None], Cost] = {}
    result = []
    for step in program.steps:
        key = step.nano_op.op, step.nano_op.nano_batch
        if key not in kept:
            work = total if key[1] is None else works[key[1]]
            op = program.graph.operation(key[0])
            if isinstance(op, Collective):
                kept[key] = op.cost_with(program.plan.kernel(*key), work, itemsize)
            else:
                kept[key] = op.cost(work, itemsize)
        result.append(kept[key])
    return result


def spans_of(program: Program, costs: Sequence[Cost], times: Sequence[tuple[float, float]]) -> tuple[Span, ...]:
    """Every step of `program` with its cost, and its start and end in seconds."""
    plan, graph = program.plan, program.graph
    ahead = {
        (entry.op, entry.nano_batch): entry.ahead
        for stage in complete_period(plan, graph)
        for entries in stage.lanes.values()
        for entry in entries
    }
    spans = []
    for index, (step, cost, (start, end)) in enumerate(zip(program.steps, costs, times, strict=True)):
        op, number = step.nano_op.op, step.nano_op.nano_batch
        nano_batch = None if number is None else plan.nano_batches[number].name
        spans.append(
            Span(
                step=index,
                name=op if nano_batch is None else f"{op}.{nano_batch}",
                op=op,
                nano_batch=nano_batch,
                layer=step.nano_op.layer,
                repetition=step.nano_op.layer - ahead[op, nano_batch],
                stage=step.stage,
                lane=step.lane,
                partition=plan.period[step.stage].partition,
                sms=plan.lane_sms(step.stage, step.lane),
                resource=graph.operation(op).resource,
                start=start,
                end=end,
                flops=cost.flops,
                bytes=cost.bytes,
                waits=step.waits,
                wire_bytes=cost.wire_bytes,
                taken=_taken(program, step),
            )
        )
    return tuple(spans)


def _taken(program: Program, step: Step) -> int | None:
    if not isinstance(program.graph.operation(step.nano_op.op), Collective):
        return None
    kernel = program.plan.kernel(step.nano_op.op, step.nano_op.nano_batch)
    return collective_sms(kernel, program.plan.lane_sms(step.stage, step.lane))


def _of(spans: Sequence[Span], stage: int, lane: str) -> list[Span]:
    return [span for span in spans if span.stage == stage and span.lane == lane]


def _measured_segments(spans: Sequence[Span], device_sms: int) -> tuple[Segment, ...]:
    long = [span for span in spans if span.end > span.start]
    moments = sorted({moment for span in long for moment in (span.start, span.end)})
    begin: dict[float, list[Span]] = {}
    for span in long:
        begin.setdefault(span.start, []).append(span)
    running: list[Span] = []
    segments = []
    for start, end in pairwise(moments):
        running = [span for span in running if span.end > start] + begin.get(start, [])
        if not running:
            continue
        taken = [span.sms if span.taken is None else span.taken for span in running]
        free = shared_sms(device_sms, taken)
        loads = [
            Load.of(
                span.lane,
                free if sms is None else float(sms),
                Cost(span.flops, span.bytes, span.wire_bytes) * (1 / span.seconds),
            )
            for span, sms in zip(running, taken, strict=True)
        ]
        segments.append(Segment(start, end, tuple(loads)))
    return tuple(segments)
