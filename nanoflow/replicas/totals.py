"""Figures of several replicas, added up for the report."""

from collections import Counter
from collections.abc import Sequence

from nanoflow.engine import EngineStats
from nanoflow.ops.operation import Cost, Work
from nanoflow.pipeline.plan_text import format_plan
from nanoflow.pipeline.program import Program

__all__ = ["add_stats", "all_programs"]


def all_programs(replicas: Sequence[Sequence[Program]]) -> tuple[Program, ...]:
    """The programs of all replicas, each plan once; of those of one replica the last, for what is left over, is last.

    Replicas choose for themselves, and a plan may win on one GPU and not on another.
    """
    first = {format_plan(program.plan): program for programs in replicas for program in programs[:-1]}
    last = {format_plan(programs[-1].plan): programs[-1] for programs in replicas}
    return tuple((first | {text: program for text, program in last.items() if text not in first}).values())


def add_stats(
    stats: Sequence[EngineStats], programs: Sequence[Sequence[Program]], together: Sequence[Program]
) -> EngineStats:
    """The sum of what replicas did.

    Args:
        programs: of each replica, in the order that its `program_iterations` count by.
        together: what the sum's count by, as `all_programs` gives them.
    """
    place = {format_plan(program.plan): number for number, program in enumerate(together)}
    total = EngineStats(work=Work(), cost=Cost())
    for one, own in zip(stats, programs, strict=True):
        total.iterations += one.iterations
        total.program_iterations += Counter(
            {place[format_plan(own[number].plan)]: count for number, count in one.program_iterations.items()}
        )
        total.planned_iterations += one.planned_iterations
        total.rows += one.rows
        total.padding_rows += one.padding_rows
        total.busy_seconds += one.busy_seconds
        total.host_seconds += one.host_seconds
        total.idle_seconds += one.idle_seconds
        total.work = total.work + one.work
        total.cost = total.cost + one.cost
        total.largest_batch = max(total.largest_batch, one.largest_batch)
    return total
