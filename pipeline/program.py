"""A plan compiled for a graph: every nano-op of every layer, its lane, and what it waits for.

Contract: `compile_program` unrolls the completed period over all layers (entries that look past either end are
clipped), derives the dependencies, and keeps of them only the waits that nothing else implies. Three things order
steps: the lane (its steps run in order), the joins (where the stage changes, all lanes finish first) and the waits.

Pseudo-code::

    lanes   = period unrolled over the layers
    edges   = lane order + joins + derived dependencies           # a cycle is a deadlock
    steps   = nano-ops in a topological order of edges, sequential order breaking ties
    waits   = for every step, its dependencies in other lanes that are not yet known to be done
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.pipeline.dependencies import NanoOp, derive_dependencies, sequential_order
from nanoflow.pipeline.period import complete_period, render_period
from nanoflow.pipeline.plan import Entry, FrozenMapping, Plan, PlanError, Stage

__all__ = ["NanoOp", "Program", "Step", "compile_program"]


@dataclass(frozen=True)
class Step:
    """One nano-op in its lane."""

    nano_op: NanoOp
    lane: str
    stage: int
    """Index into the plan's period."""
    waits: tuple[int, ...]
    """Steps of other lanes that must be done first, beyond what the lane, the joins and the other waits imply."""


@dataclass(frozen=True, eq=False)
class Program:
    """`plan` on `graph`, which has the plan's sharding.

    `steps` is in an order in which they may be issued: a step comes after its predecessors.
    """

    plan: Plan
    graph: Graph
    steps: tuple[Step, ...]

    @cached_property
    def lanes(self) -> FrozenMapping[tuple[int, ...]]:
        """Every lane's steps, in the order in which the lane runs them."""
        lanes: dict[str, list[int]] = {}
        for index, step in enumerate(self.steps):
            lanes.setdefault(step.lane, []).append(index)
        return FrozenMapping({lane: tuple(steps) for lane, steps in lanes.items()})

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For every step, the steps that must be done before it may start: waits, the lane's previous step, joins."""
        joins = join_steps(self.steps)
        last: dict[str, int] = {}
        result = []
        for index, step in enumerate(self.steps):
            before = set(step.waits) | set(joins.get(index, ()))
            if step.lane in last:
                before.add(last[step.lane])
            last[step.lane] = index
            result.append(tuple(sorted(before)))
        return tuple(result)

    @cached_property
    def collectives(self) -> tuple[int, ...]:
        """The steps in which all ranks of tensor parallelism take part, in the order in which every rank runs them."""
        operation = self.graph.operation
        return tuple(i for i, step in enumerate(self.steps) if isinstance(operation(step.nano_op.op), Collective))

    def name(self, step: int) -> str:
        """A step for messages and traces, such as ``qkv.a layer 3``."""
        return _name(self.steps[step].nano_op, self.plan)


def join_steps(steps: Sequence[Step]) -> dict[int, tuple[int, ...]]:
    """The joins: for each lane's first step after a change of stage, the last step of every lane before the change."""
    joins: dict[int, tuple[int, ...]] = {}
    ends: dict[str, int] = {}
    before: tuple[int, ...] = ()
    for index, step in enumerate(steps):
        if index and step.stage != steps[index - 1].stage:
            before, ends = tuple(ends.values()), {}
        if step.lane not in ends and before:
            joins[index] = before
        ends[step.lane] = index
    return joins


@dataclass(frozen=True)
class _Placed:
    """Where the unrolled period puts a nano-op."""

    lane: str
    stage: int
    segment: int
    """Counts the changes of stage before it."""
    entry: Entry


def compile_program(plan: Plan, graph: Graph) -> Program:
    """Compile `plan` for `graph`, with the plan's sharding (`Plan.graph`).

    Raises PlanError as `complete_period` does, and for a deadlock. Shares, capacities and partitions are not looked at:
    `nanoflow.pipeline.validate.validate` does that.
    """
    graph = plan.graph(graph)
    period = complete_period(plan, graph)
    nano_batches = [nano_batch.name for nano_batch in plan.nano_batches]
    whole = {e.op for stage in period for lane in stage.lanes.values() for e in lane if e.nano_batch is None}
    nano_ops = sequential_order(graph, whole, len(nano_batches))
    dependencies = derive_dependencies(graph, nano_ops, len(nano_batches))
    index_of = {nano_op: index for index, nano_op in enumerate(nano_ops)}
    placed, ordered_by_lane = _unroll(period, graph.layers, nano_batches, index_of)
    joins = _joins(placed, ordered_by_lane)
    previous = {b: a for lane in ordered_by_lane.values() for a, b in pairwise(lane)}

    predecessors = [
        {*dependencies[i], *joins.get(i, ()), *((previous[i],) if i in previous else ())} for i in range(len(nano_ops))
    ]
    order = _topological(predecessors)
    if len(order) < len(nano_ops):
        raise _deadlock(plan, period, nano_ops, placed, dependencies, predecessors, set(order))
    waits = _reduce(order, placed, dependencies, joins, previous)
    issue = {node: index for index, node in enumerate(order)}
    steps = tuple(
        Step(nano_ops[i], placed[i].lane, placed[i].stage, tuple(sorted(issue[w] for w in waits[i]))) for i in order
    )
    return Program(plan, graph, steps)


def _unroll(
    period: tuple[Stage, ...], layers: int, nano_batches: list[str], index_of: dict[NanoOp, int]
) -> tuple[dict[int, _Placed], dict[str, list[int]]]:
    """Place every nano-op, and list each lane's nano-ops in order (as indices in sequential order)."""
    number = {name: n for n, name in enumerate(nano_batches)}
    furthest = max(entry.ahead for stage in period for lane in stage.lanes.values() for entry in lane)
    placed: dict[int, _Placed] = {}
    lanes: dict[str, list[int]] = {}
    segment, last_stage = 0, None
    for base in range(-furthest, layers):
        for stage_index, stage in enumerate(period):
            for lane, entries in stage.lanes.items():
                for entry in entries:
                    layer = base + entry.ahead
                    if not 0 <= layer < layers:
                        continue
                    if stage_index != last_stage:
                        segment, last_stage = segment + 1, stage_index
                    nano_batch = None if entry.nano_batch is None else number[entry.nano_batch]
                    index = index_of[NanoOp(entry.op, nano_batch, layer)]
                    placed[index] = _Placed(lane, stage_index, segment, entry)
                    lanes.setdefault(lane, []).append(index)
    return placed, lanes


def _joins(placed: dict[int, _Placed], lanes: dict[str, list[int]]) -> dict[int, tuple[int, ...]]:
    """For each lane's first nano-op of a segment, the last ones of the segment before."""
    first: dict[int, dict[str, int]] = {}
    last: dict[int, dict[str, int]] = {}
    for lane, indices in lanes.items():
        for index in indices:
            segment = placed[index].segment
            first.setdefault(segment, {}).setdefault(lane, index)
            last.setdefault(segment, {})[lane] = index
    return {
        index: tuple(last[segment - 1].values())
        for segment, starts in first.items()
        if segment - 1 in last
        for index in starts.values()
    }


def _topological(predecessors: Sequence[set[int]]) -> list[int]:
    """A topological order that takes the smallest ready node first; shorter than the input if there is a cycle."""
    successors: list[list[int]] = [[] for _ in predecessors]
    missing = [len(before) for before in predecessors]
    for node, before in enumerate(predecessors):
        for other in before:
            successors[other].append(node)
    ready = [node for node, count in enumerate(missing) if count == 0]
    order = []
    while ready:
        node = heapq.heappop(ready)
        order.append(node)
        for other in successors[node]:
            missing[other] -= 1
            if missing[other] == 0:
                heapq.heappush(ready, other)
    return order


def _reduce(
    order: Sequence[int],
    placed: dict[int, _Placed],
    dependencies: Sequence[tuple[int, ...]],
    joins: dict[int, tuple[int, ...]],
    previous: dict[int, int],
) -> dict[int, list[int]]:
    """The waits that remain when those that the lane, the joins and other waits imply are dropped.

    What is done when a node is done is, in every lane, a stretch from its start. So one number a lane describes it (a
    vector clock), and a dependency is implied if the clock already reaches it.
    """
    lane_number: dict[str, int] = {}
    for node in order:
        lane_number.setdefault(placed[node].lane, len(lane_number))
    clocks: dict[int, list[int]] = {}
    place: dict[int, int] = {}
    waits: dict[int, list[int]] = {}
    for node in order:
        lane = lane_number[placed[node].lane]
        clock = list(clocks[previous[node]]) if node in previous else [0] * len(lane_number)
        place[node] = clock[lane]
        for other in joins.get(node, ()):
            clock = list(map(max, clock, clocks[other]))
        latest: dict[int, int] = {}
        for other in dependencies[node]:
            other_lane = lane_number[placed[other].lane]
            if place[other] >= clock[other_lane] and place[other] >= place.get(latest.get(other_lane, -1), -1):
                latest[other_lane] = other
        kept = [
            other
            for other_lane, other in latest.items()
            if not any(clocks[rival][other_lane] > place[other] for rival in latest.values() if rival != other)
        ]
        for other in kept:
            clock = list(map(max, clock, clocks[other]))
        clock[lane] = place[node] + 1
        clocks[node], waits[node] = clock, kept
    return waits


def _deadlock(
    plan: Plan,
    period: tuple[Stage, ...],
    nano_ops: Sequence[NanoOp],
    placed: dict[int, _Placed],
    dependencies: Sequence[tuple[int, ...]],
    predecessors: Sequence[set[int]],
    done: set[int],
) -> PlanError:
    """The error for a cycle: who waits for whom and why, and the schedule with the cycle's nano-ops marked."""
    node = min(set(range(len(nano_ops))) - done)
    path: list[int] = []
    while node not in path:
        path.append(node)
        node = min(predecessors[node] - done)
    cycle = path[path.index(node) :]
    lines = []
    for waiting, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        if other in dependencies[waiting]:
            why = "must be done with the same rows first"
        elif placed[waiting].lane == placed[other].lane:
            why = f"stands before it in lane {placed[waiting].lane}"
        else:
            why = "is in the stage before"
        lines.append(f"  {_name(nano_ops[waiting], plan)} waits for {_name(nano_ops[other], plan)}, which {why}")
    marked = {placed[node].entry for node in cycle}
    return PlanError(
        "the period deadlocks: change the order in a lane, or use @1 for nano-ops that belong to the next layer\n"
        + "\n".join(lines)
        + f"\n{render_period(period, marked)}"
    )


def _name(nano_op: NanoOp, plan: Plan) -> str:
    nano_batch = None if nano_op.nano_batch is None else plan.nano_batches[nano_op.nano_batch].name
    return f"{Entry(nano_op.op, nano_batch)} layer {nano_op.layer}"
