"""The timeline of a plan, estimated: what it could be at best on a device with given ceilings.

Pseudo-code::

    while nano-ops are left:
        start every lane's next nano-op whose predecessors are done
        n     = the lane's SMs; lanes that are not confined share the device evenly among those that run
        speed = min(n / N of the FLOP/s ceiling, what n SMs read of memory, the link) over what the nano-op needs
        where all together would move more bytes than memory gives: even shares, what one leaves over to the others
        go on to the moment at which the first of them ends; speeds change there

Launching costs nothing here and power limits nothing.
"""

from collections.abc import Mapping, Sequence

from nanoflow.ops.operation import Cost, Work
from nanoflow.pipeline.plan import NanoBatch, Plan
from nanoflow.pipeline.program import Program
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.timeline import Load, Segment, Timeline, spans_of, step_costs

__all__ = ["bandwidth_on", "estimate_timeline", "shared_works"]


def bandwidth_on(sms: float, device_sms: int, ceiling: float) -> float:
    """Bytes/s that `sms` of a device's `device_sms` SMs read, if all of them read `ceiling`.

    Few SMs have too few loads in flight: the rate grows with them and then saturates.
    With x = 3.235 * sms / device_sms::

        rate = ceiling * x / (1 + x ** 5.5) ** (1 / 5.5)

    fitted to decode attention on an H100 (132 SMs): 1,170, 1,730, 2,240, 2,620 and 3,000 GB/s on 16, 24, 32, 40 and all
    SMs, which it meets within 1.5%. A measured profile of the device may take its place.
    """

    def saturating(share: float) -> float:
        x = 3.235 * share
        return float(x / (1 + x**5.5) ** (1 / 5.5))

    return ceiling * min(1.0, saturating(sms / device_sms) / saturating(1.0))


def shared_works(plan: Plan, work: Work) -> tuple[Work, ...]:
    """`work` of a whole iteration among the nano-batches, by their shares of decode rows and of prefill rows."""

    def part(nano_batch: NanoBatch) -> Work:
        decode, prefill = float(nano_batch.decode), float(nano_batch.prefill)
        return Work(
            decode_rows=round(work.decode_rows * decode),
            prefill_rows=round(work.prefill_rows * prefill),
            decode_context=round(work.decode_context * decode),
            prefill_context=round(work.prefill_context * prefill),
            prefill_pairs=round(work.prefill_pairs * prefill),
        )

    return tuple(map(part, plan.nano_batches))


def estimate_timeline(
    program: Program, works: Sequence[Work], ceilings: Ceilings, itemsize: int, device_sms: int
) -> Timeline:
    """The timeline by the pseudo-code above; arguments as of `nanoflow.search.timeline.measured_timeline`."""
    costs = step_costs(program, works, itemsize)
    plan, steps = program.plan, program.steps
    queues = {lane: list(reversed(indices)) for lane, indices in program.lanes.items()}
    times: list[tuple[float, float]] = [(0.0, 0.0)] * len(steps)
    done = bytearray(len(steps))
    running: dict[int, float] = {}  # step -> what is left of it, from 1 to 0
    segments: list[Segment] = []
    clock = 0.0
    while True:
        _start(program, queues, done, running, costs, times, clock)
        if not running:
            break
        confined = {step: plan.lane_sms(steps[step].stage, steps[step].lane) for step in running}
        free = sum(sms is None for sms in confined.values())
        sms = {step: device_sms / free if own is None else float(own) for step, own in confined.items()}
        speeds = _speeds({step: costs[step] for step in running}, sms, ceilings, device_sms)
        length = min(left / speeds[step] for step, left in running.items())
        loads = [
            Load(steps[step].lane, sms[step], costs[step].flops * speeds[step], costs[step].bytes * speeds[step])
            for step in running
        ]
        segments.append(Segment(clock, clock + length, tuple(loads)))
        clock += length
        for step in list(running):
            if running[step] <= length * speeds[step] * (1 + 1e-12):
                del running[step]
                done[step] = 1
                times[step] = (times[step][0], clock)
            else:
                running[step] -= length * speeds[step]
    return Timeline(spans_of(program, costs, times), tuple(segments), clock, "estimated", device_sms, plan.lanes)


def _start(
    program: Program,
    queues: Mapping[str, list[int]],
    done: bytearray,
    running: dict[int, float],
    costs: Sequence[Cost],
    times: list[tuple[float, float]],
    clock: float,
) -> None:
    """Start what may start at `clock`; what has nothing to do ends at once."""
    moved = True
    while moved:
        moved = False
        for queue in queues.values():
            # A lane's next step has the one before among its predecessors, so a lane never runs two.
            while queue and all(done[before] for before in program.predecessors[queue[-1]]):
                step, moved = queue.pop(), True
                times[step] = (clock, clock)
                if costs[step] == Cost():
                    done[step] = 1
                else:
                    running[step] = 1.0


def _speeds(
    costs: Mapping[int, Cost], sms: Mapping[int, float], ceilings: Ceilings, device_sms: int
) -> dict[int, float]:
    """How much of each running step is done in a second."""
    speeds: dict[int, float] = {}
    for step, cost in costs.items():
        needed = [
            cost.flops / (ceilings.flops * sms[step] / device_sms),
            cost.bytes / bandwidth_on(sms[step], device_sms, ceilings.bytes_per_second),
            cost.wire_bytes / ceilings.link_bytes_per_second if ceilings.link_bytes_per_second else 0.0,
        ]
        # A cost that no known ceiling limits (the wire's, where the link was not measured) takes next to no time.
        speeds[step] = 1 / max(*needed, 1e-12)
    room, left = ceilings.bytes_per_second, len(speeds)
    for step in sorted(speeds, key=lambda step: costs[step].bytes * speeds[step]):
        moved = costs[step].bytes * speeds[step]
        granted = min(moved, room / left)
        if granted < moved:
            speeds[step] = granted / costs[step].bytes
        room, left = room - granted, left - 1
    return speeds
