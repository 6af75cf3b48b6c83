"""The period of a plan, completed: every nano-op of the layer in its lane, those that the plan leaves out included.

An operation that the plan does not name follows its producer: wherever the period runs the producer, it runs the
follower directly after, on the same nano-batch. Followers of one nano-op keep program order among themselves.
"""

from difflib import get_close_matches

from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Operation
from nanoflow.ops.row_sharding import ALL_GATHER, ALL_REDUCE, FUSED, REDUCE_SCATTER
from nanoflow.pipeline.dependencies import producer
from nanoflow.pipeline.grid import Block, Cell, Name, plain, render_order
from nanoflow.pipeline.plan import Entry, FrozenMapping, Plan, PlanError, Stage

__all__ = ["complete_period", "ranks_hint", "render_period"]

GRID_WIDTH = 112
"""Columns of the schedules in messages."""


def complete_period(plan: Plan, graph: Graph) -> tuple[Stage, ...]:
    """`plan.period` with every operation of the layer placed, each exactly once or once a nano-batch.

    `graph` is any that `plan.graph` takes. Raises PlanError as that does, for an unknown operation or nano-batch, for
    rows that are missed or run twice, and for an operation that is neither named nor follows one that is.
    """
    graph = plan.graph(graph)
    _check_entries(plan, graph)
    named = {entry.op for stage in plan.period for entries in stage.lanes.values() for entry in entries}
    position = {op.name: index for index, op in enumerate(graph.layer)}
    leader = {op.name: _leader(op, graph, named, plan) for op in graph.layer if op.name not in named}
    followers: dict[str, list[tuple[int, int, str]]] = {}
    for name, (leading, ahead) in leader.items():
        followers.setdefault(leading, []).append((ahead, position[name], name))
    for group in followers.values():
        group.sort()

    def complete(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        result: list[Entry] = []
        for entry in entries:
            result.append(entry)
            for ahead, _, name in followers.get(entry.op, ()):
                result.append(Entry(name, entry.nano_batch, entry.ahead + ahead))
        return tuple(result)

    return tuple(
        Stage(stage.partition, FrozenMapping({lane: complete(entries) for lane, entries in stage.lanes.items()}))
        for stage in plan.period
    )


def _leader(op: Operation, graph: Graph, named: set[str], plan: Plan) -> tuple[str, int]:
    """The named operation that `op` follows through its producers, and how many layers before `op`'s own it runs."""
    current, layers, seen = op, 0, {op.name}
    while current.name not in named:
        found = producer(graph, current)
        if found is None or (found[0].name not in named and found[0].name in seen):
            raise PlanError(
                f"the period does not name {op.name}, and no nano-op that it names produces what {op.name} reads: "
                f"name {op.name} in a lane\n{render_period(plan.period)}"
            )
        current, layers = found[0], layers + found[1]
        seen.add(current.name)
    return current.name, layers


def _check_entries(plan: Plan, graph: Graph) -> None:
    """Every named operation exists and covers every row once."""
    operations = [op.name for op in graph.layer]
    nano_batches = [nano_batch.name for nano_batch in plan.nano_batches]
    runs: dict[str, list[Entry]] = {}
    for index, stage in enumerate(plan.period):
        for lane, entries in stage.lanes.items():
            for place, entry in enumerate(entries):
                where = f"period[{index}].{stage.partition}.{lane}[{place}]: {entry}"
                if entry.op not in operations:
                    hint = ranks_hint(entry.op, graph) or _hint(entry.op, operations)
                    raise _marked(plan, {entry}, f"{where}: unknown operation {entry.op!r}{hint}")
                if entry.nano_batch is not None and entry.nano_batch not in nano_batches:
                    raise _marked(
                        plan,
                        {entry},
                        f"{where}: unknown nano-batch {entry.nano_batch!r}{_hint(entry.nano_batch, nano_batches)}",
                    )
                if entry.ahead < 0:
                    raise _marked(plan, {entry}, f"{where}: a nano-op cannot run for a layer behind; use @0 or more")
                runs.setdefault(entry.op, []).append(entry)
    for op, entries_of_op in runs.items():
        parts = [entry.nano_batch for entry in entries_of_op]
        twice = next((entry for entry in entries_of_op if parts.count(entry.nano_batch) > 1), None)
        if twice is None and None in parts and len(parts) > 1:
            twice = next(entry for entry in entries_of_op if entry.nano_batch is not None)
        if twice is not None:
            same = {entry for entry in entries_of_op if entry.nano_batch in (twice.nano_batch, None)}
            raise _marked(plan, same, f"the period runs {op} twice on the rows of {twice}: remove one of the two")
        missing = [name for name in nano_batches if name not in parts]
        if None not in parts and missing:
            raise _marked(
                plan,
                set(entries_of_op),
                f"the period misses {op} on the rows of nano-batch {missing[0]}: add {op}.{missing[0]} to a lane",
            )


def _marked(plan: Plan, entries: set[Entry], message: str) -> PlanError:
    return PlanError(f"{message}\n{render_period(plan.period, entries)}")


KINDS = {
    "_all_reduce": ALL_REDUCE, "_reduce_scatter": REDUCE_SCATTER, "_all_gather": ALL_GATHER,
    "_add_norm": FUSED, "_gather": FUSED, "_add": FUSED,
}  # fmt: skip
"""Shardings that have operations with such names, behind a product's, a norm's or a value's; norms of
`REDUCE_SCATTER` have all-gathers too."""


def ranks_hint(name: str, graph: Graph) -> str:
    """The mend where a plan names operation `name`, which a model has with other ranks or another sharding; else
    nothing."""
    if not name.endswith(tuple(KINDS)):
        return ""
    if graph.ranks > 1:
        other = _sharding_with(name, graph)
        return f"; it is there with `sharding: {other}`, and the plan has {graph.sharding}" if other else ""
    return "; it is there where ranks share the model: set parallel.tensor (plan check: --tensor)"


def _sharding_with(name: str, graph: Graph) -> str | None:
    """Another sharding than that of `graph` whose layer has the collective `name`."""
    suffix = next(suffix for suffix in KINDS if name.endswith(suffix))
    behind, sharding = name.removesuffix(suffix), KINDS[suffix]
    fused = [op for op in graph.layer if graph.sharding == FUSED and op.resource == "network"]
    found = [op for op in graph.layer if op.name == behind]
    found += [op for op in fused if op.name.endswith(f"_{behind}") or op.name == f"{behind}_gather"]
    if not found and behind not in graph.values:
        return None
    if suffix == "_all_gather" and found and found[0].resource != "compute":
        sharding = REDUCE_SCATTER
    return sharding if sharding != graph.sharding else None


def _hint(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def render_period(period: tuple[Stage, ...], marked: set[Entry] | frozenset[Entry] = frozenset()) -> str:
    """The schedule as a text grid without times, with the entries of `marked` between ``>>`` and ``<<``."""
    blocks = [
        Block(
            stage.partition,
            {
                lane: [
                    Cell(Name(entry.op, str(entry).removeprefix(entry.op)), marked=entry in marked) for entry in entries
                ]
                for lane, entries in stage.lanes.items()
            },
        )
        for stage in period
    ]
    return plain(render_order(blocks, GRID_WIDTH))
