"""The physical buffers that a plan's nano-ops work in.

Every value of the graph has one buffer that all layers and all nano-batches share: a nano-batch works on its own rows
of it. Scratch memory is one buffer a lane. That is why there are hazards across layers, which
`nanoflow.pipeline.dependencies` derives.
"""

from dataclasses import dataclass

from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import KV, SCRATCH
from nanoflow.pipeline.period import complete_period
from nanoflow.pipeline.plan import Plan

__all__ = ["BufferSpec", "assign_buffers", "assign_scratch"]


@dataclass(frozen=True)
class BufferSpec:
    """Shape of a buffer: [rows, columns], in elements of the run's dtype."""

    columns: int
    rows: int


def assign_buffers(graph: Graph, plan: Plan, sampled_rows: int | None = None) -> dict[str, BufferSpec]:
    """The buffer of every value.

    Values that only the epilogue touches (gathered rows, logits) have `sampled_rows` rows: as many as the executor
    samples at a time. Left out, it is the plan's rows. Raises ValueError if an operation accesses an unknown value.
    """
    touched = {op.name: {a.buffer for a in op.accesses} - {KV, SCRATCH} for op in graph.prologue + graph.layer}
    sampled = {op.name: {a.buffer for a in op.accesses} - {KV, SCRATCH} for op in graph.epilogue}
    for name, buffers in (touched | sampled).items():
        unknown = sorted(buffers - set(graph.values))
        if unknown:
            raise ValueError(f"operation {name} accesses {unknown[0]!r}, which is no value of the graph")
    dense = set().union(*touched.values()) if touched else set()
    only_sampled = set().union(*sampled.values()) - dense if sampled else set()
    rows_of_sampled = plan.rows if sampled_rows is None else sampled_rows
    return {
        value: BufferSpec(columns, rows_of_sampled if value in only_sampled else plan.rows)
        for value, columns in graph.values.items()
    }


def assign_scratch(graph: Graph, plan: Plan, device_sms: int = 0) -> dict[str, int]:
    """Bytes of scratch memory of every lane: the most that one of its nano-ops needs.

    `device_sms` is the number of SMs for lanes that are not confined (0 on a CPU). Raises PlanError for a
    period that `complete_period` refuses.
    """
    rows = {nano_batch.name: nano_batch.rows for nano_batch in plan.nano_batches}
    scratch = dict.fromkeys(plan.lanes, 0)
    graph = plan.graph(graph)
    for index, stage in enumerate(complete_period(plan, graph)):
        for lane, entries in stage.lanes.items():
            sms = plan.lane_sms(index, lane)
            for entry in entries:
                entry_rows = plan.rows if entry.nano_batch is None else rows[entry.nano_batch]
                needed = graph.operation(entry.op).scratch_bytes(entry_rows, device_sms if sms is None else sms)
                scratch[lane] = max(scratch[lane], needed)
    return scratch
