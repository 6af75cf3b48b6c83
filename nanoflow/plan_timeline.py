"""The timeline of a plan, estimated: one layer in steady state, each nano-op as long as its ceilings demand.

Pseudo-code::

    for every nano-op of the program, in its order:
        length = max(FLOPs / ceiling FLOP/s, bytes / ceiling bytes/s)     # of its share of the mean iteration
        start  = the latest end among what it waits for and what its lane ran before
    keep what overlaps the middle layer

Nano-ops side by side do not slow each other here, and launching costs nothing: it is what the plan could be at best.
"""

from dataclasses import dataclass

from nanoflow.ops.operation import Work
from nanoflow.pipeline.plan import NanoBatch
from nanoflow.pipeline.program import Program
from nanoflow.search.cost_model import Ceilings

__all__ = ["TimelineEntry", "estimate_timeline"]


@dataclass(frozen=True)
class TimelineEntry:
    """One nano-op of the layer shown, in microseconds from the layer's start."""

    name: str
    """As plans write it: ``qkv.a``; ``@1`` if it belongs to the next layer, ``@-1`` to the one before."""
    lane: str
    resource: str
    start: float
    end: float


def estimate_timeline(program: Program, work: Work, ceilings: Ceilings, itemsize: int) -> list[TimelineEntry]:
    """What runs while the middle layer does.

    Args:
        work: of the mean iteration.
        itemsize: bytes of an element of weights and activations.
    """
    graph, plan = program.graph, program.plan
    lengths: dict[tuple[str, int | None], float] = {}
    for step in program.steps:
        key = (step.nano_op.op, step.nano_op.nano_batch)
        if key not in lengths:
            part = work if key[1] is None else _share(work, plan.nano_batches[key[1]])
            cost = graph.operation(key[0]).cost(part, itemsize)
            lengths[key] = max(cost.flops / ceilings.flops, cost.bytes / ceilings.bytes_per_second)
    starts: list[float] = []
    ends: list[float] = []
    for step, before in zip(program.steps, program.predecessors, strict=True):
        starts.append(max((ends[index] for index in before), default=0.0))
        ends.append(starts[-1] + lengths[step.nano_op.op, step.nano_op.nano_batch])
    middle = graph.layers // 2
    own = [index for index, step in enumerate(program.steps) if step.nano_op.layer == middle]
    first, last = min(starts[index] for index in own), max(ends[index] for index in own)
    entries = []
    for index, step in enumerate(program.steps):
        if ends[index] > starts[index] and ends[index] > first and starts[index] < last:
            op = step.nano_op
            nano_batch = f".{plan.nano_batches[op.nano_batch].name}" if op.nano_batch is not None else ""
            layer = f"@{op.layer - middle}" if op.layer != middle else ""
            entries.append(
                TimelineEntry(
                    f"{op.op}{nano_batch}{layer}",
                    step.lane,
                    graph.operation(op.op).resource,
                    round((max(starts[index], first) - first) * 1e6, 3),
                    round((min(ends[index], last) - first) * 1e6, 3),
                )
            )
    return entries


def _share(work: Work, nano_batch: NanoBatch) -> Work:
    """The nano-batch's part of an iteration, by its shares of decode rows and of prefill rows."""
    decode, prefill = float(nano_batch.decode), float(nano_batch.prefill)
    return Work(
        decode_rows=round(work.decode_rows * decode),
        prefill_rows=round(work.prefill_rows * prefill),
        decode_context=round(work.decode_context * decode),
        prefill_context=round(work.prefill_context * prefill),
        prefill_pairs=round(work.prefill_pairs * prefill),
    )
