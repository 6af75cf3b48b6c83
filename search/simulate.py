"""What an iteration's layers take under a plan, simulated on any rates.

Pseudo-code::

    while nano-ops are left:
        start every lane's next nano-op whose predecessors are done
        speed = what the nano-op does alone on its lane's SMs, times the share that it keeps beside the others
        go on to the moment at which the first of them ends; speeds change there

Power, with S seconds if nothing limited it, the joules that go with the work, D, the watts that are drawn whatever
runs, W, and the limit P. A card holds its limit by lowering its clock; at a share c of it, and a lower voltage::

    seconds = S / c
    joules  = D * c ** CLOCK_ENERGY + W * S / c

so that where D + W * S is more than P * S joules, c follows from joules = P * S / c::

    seconds under the limit = S * (D / ((P - W) * S)) ** (1 / (1 + CLOCK_ENERGY))

All of an iteration is stretched alike: GPUs hold their limit over many iterations, not within one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoflow.ops.attention import LANE_PROGRAMS, OTHER_PROGRAMS
from nanoflow.ops.collectives import Collective
from nanoflow.ops.operation import Cost, Work
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import Program, Step
from nanoflow.search.rates import Rates, Running, shared_sms
from nanoflow.search.timeline import Load, Segment, Timeline, spans_of, step_costs

__all__ = ["Simulation", "seconds_under_limit", "simulate"]

CLOCK_ENERGY = 0.5
"""How the joules of a piece of work fall with the clock. With it, the plans of benchmarks/results/lanes.json come
within 2.4% of what they took on an H100 on average, and the ratios of those that won within 3.3% (`python -m
benchmarks.prediction`); with 0, as if a lower clock saved none, 6.5% and 10.8%."""


@dataclass(frozen=True)
class Simulation:
    """All layers of an iteration. What stands before and behind them is the same under every plan, and left out."""

    timeline: Timeline
    limited_seconds: float
    """Under the power limit, by the formula above; where no limit or no joules are known, the timeline's seconds."""
    joules: float | None
    """In `limited_seconds`; None where the rates know none."""
    work_joules: float | None = None
    """That go with the work at the full clock: D of the formula; None where the rates know none."""

    @property
    def seconds(self) -> float:
        """If power limited nothing."""
        return self.timeline.seconds


def simulate(program: Program, works: Sequence[Work], rates: Rates) -> Simulation:
    """Run `program` on paper.

    Args:
        works: of each nano-batch (`nanoflow.search.mix.mix_works`).

    Raises ValueError if there are not as many works as nano-batches, or if the power limit is not above what the device
    draws whatever runs.
    """
    costs = step_costs(program, works, rates.itemsize)
    running = _running(program, works)
    timeline = _timeline(program, running, costs, rates)
    if rates.idle_watts is None:
        return Simulation(timeline, timeline.seconds, None)
    joules: dict[tuple[str, int | None], float] = {}
    total = 0.0
    for step, cost in enumerate(costs):
        nano_op, each = program.steps[step].nano_op, running[step]
        key = nano_op.op, nano_op.nano_batch
        if key not in joules:
            joules[key] = 0.0 if cost == Cost() else rates.joules(each.op, each.work, each.sms)
        total += joules[key]
    seconds = seconds_under_limit(timeline.seconds, total, rates)
    free = total + rates.idle_watts * timeline.seconds
    used = free if seconds == timeline.seconds or rates.limit_watts is None else rates.limit_watts * seconds
    return Simulation(timeline, seconds, used, total)


def seconds_under_limit(seconds: float, work_joules: float, rates: Rates) -> float:
    """What takes `seconds` and `work_joules` at the full clock, under the power limit; by the module's formula.

    Raises ValueError if the limit is not above what the device draws whatever runs.
    """
    watts, limit = rates.idle_watts, rates.limit_watts
    if watts is None or limit is None:
        return seconds
    if limit <= watts:
        raise ValueError(
            f"a power limit of {limit:g} W is not above the {watts:g} W that are drawn whatever runs; give rates that "
            "belong to one device"
        )
    too_much = work_joules / ((limit - watts) * seconds) if seconds else 1.0
    return float(seconds * max(1.0, too_much) ** (1 / (1 + CLOCK_ENERGY)))


def _running(program: Program, works: Sequence[Work]) -> list[Running]:
    total = sum(works, Work())
    return [
        Running(
            program.graph.operation(step.nano_op.op),
            total if step.nano_op.nano_batch is None else works[step.nano_op.nano_batch],
            _working_sms(program.plan, step),
            _form(program, step),
        )
        for step in program.steps
    ]


def _form(program: Program, step: Step) -> str:
    """Of a collective, the kernel that the plan names."""
    name = step.nano_op.op
    named = isinstance(program.graph.operation(name), Collective)
    return program.plan.kernel(name, step.nano_op.nano_batch) if named else ""


def _working_sms(plan: Plan, step: Step) -> int | None:
    """SMs of a step's lane; of decode attention with another number of programs on each, the SMs on which as much is
    under way with the usual ones: more programs than those have half the buffers each."""
    sms, kernel = plan.lane_sms(step.stage, step.lane), plan.kernel(step.nano_op.op, step.nano_op.nano_batch)
    programs = OTHER_PROGRAMS.get(kernel)
    if sms is None or programs is None:
        return sms
    usual = LANE_PROGRAMS if programs < LANE_PROGRAMS else 2 * LANE_PROGRAMS
    return max(1, round(sms * programs / usual))


def _timeline(program: Program, at_work: Sequence[Running], costs: Sequence[Cost], rates: Rates) -> Timeline:
    """By the pseudo-code above."""
    steps, device_sms = program.steps, rates.device_sms
    queues = {lane: list(reversed(indices)) for lane, indices in program.lanes.items()}
    times: list[tuple[float, float]] = [(0.0, 0.0)] * len(steps)
    done = bytearray(len(steps))
    running: dict[int, float] = {}  # step -> what is left of it, from 1 to 0
    segments: list[Segment] = []
    known: dict[tuple[Running, ...], dict[Running, float]] = {}  # layers are alike: few sets of them ever run together
    clock = 0.0
    while True:
        _start(program, queues, done, running, costs, times, clock)
        if not running:
            break
        together = tuple(at_work[step] for step in running)
        if together not in known:
            known[together] = _speeds(together, rates)
        speeds = {step: known[together][at_work[step]] for step in running}
        free = shared_sms(device_sms, [each.taken for each in together])
        length = min(left / speeds[step] for step, left in running.items())
        loads = []
        for step in running:
            own, taken = program.plan.lane_sms(steps[step].stage, steps[step].lane), at_work[step].taken
            if own is None or isinstance(at_work[step].op, Collective):
                own = taken
            loads.append(Load.of(steps[step].lane, free if own is None else float(own), costs[step] * speeds[step]))
        segments.append(Segment(clock, clock + length, tuple(loads)))
        clock += length
        for step in list(running):
            if running[step] <= length * speeds[step] * (1 + 1e-12):
                del running[step]
                done[step] = 1
                times[step] = (times[step][0], clock)
            else:
                running[step] -= length * speeds[step]
    spans = spans_of(program, costs, times)
    return Timeline(spans, tuple(segments), clock, "estimated", device_sms, program.plan.lanes)


def _speeds(together: Sequence[Running], rates: Rates) -> dict[Running, float]:
    """How much of each is done in a second while all run."""
    return {
        each: rates.kept(each, [*together[:place], *together[place + 1 :]])
        / rates.seconds(each.op, each.work, each.sms, each.kernel)
        for place, each in enumerate(together)
    }


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
