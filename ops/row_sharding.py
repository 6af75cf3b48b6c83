"""Shardings: how the ranks share what comes behind the products that leave partial sums.

``all_reduce``: every rank adds up all partial sums, and has the whole residual. ``reduce_scatter``: of each nano-batch
a rank has a share of the residual's rows, adds up those, and runs what works on each row alone on them; the ranks put
the normed rows together for the next product. Both compute the same, with the same weights::

    all_reduce       o | all-reduce of all rows | add_norm of all rows              | gate_up
    reduce_scatter   o | reduce-scatter         | add_norm of the rank's rows | all-gather | gate_up

``fused_reduce_scatter`` is the latter with what stands between two products in one operation
(`nanoflow.ops.fused_rows`).

``all_gather`` is the NanoFlow paper's (arXiv 2408.12757): ``o`` is split by output columns, so the columns of all
ranks' heads are gathered before it, and its output's behind it. It has other weights, and so a layout of its own, which
all programs of an executor have: `shard_graph` makes its graphs.

Contract: `with_sharding` derives a rank's graph for ``reduce_scatter`` from the one with all-reduces that `shard_graph`
gives, and from that the one for ``fused_reduce_scatter``.

    embedding                      whole: all rows on each rank
    all-reduce of a linear         `<linear>_reduce_scatter`
    norm, add_norm of the residual on the rank's rows, then `<norm>_all_gather`
    add to the residual            on the rank's rows
    epilogue                       the sampled rows come together first: `sampled_all_reduce`

    fused: <linear>_reduce_scatter, add_norm, <norm>_all_gather     `<linear>_add_norm`
           <linear>_reduce_scatter, add                             `<linear>_add`
           <norm>, <norm>_all_gather                                `<norm>_gather`
"""

from dataclasses import replace

from nanoflow.ops.collectives import AllReduce
from nanoflow.ops.elementwise import Add
from nanoflow.ops.fused_rows import FusedRows
from nanoflow.ops.graph import RESIDUAL, Graph
from nanoflow.ops.norm import AddNorm, Norm
from nanoflow.ops.operation import Operation
from nanoflow.ops.own_rows import OwnRows
from nanoflow.ops.row_collectives import ReduceScatter, RowsAllGather, SampledSum

__all__ = [
    "ALL_GATHER",
    "ALL_REDUCE",
    "FUSED",
    "REDUCE_SCATTER",
    "SCATTERED",
    "SHARDINGS",
    "layout_of",
    "shardings_of",
    "with_sharding",
]

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER = "all_reduce", "reduce_scatter", "all_gather"
FUSED = "fused_reduce_scatter"
SHARDINGS = (ALL_REDUCE, REDUCE_SCATTER, FUSED, ALL_GATHER)
SCATTERED = (REDUCE_SCATTER, FUSED)
"""Those in which a rank has a share of the residual's rows."""


def layout_of(sharding: str) -> str:
    """The sharding whose graph `shard_graph` makes for it: shardings of one layout have the same weights."""
    return ALL_GATHER if sharding == ALL_GATHER else ALL_REDUCE


def shardings_of(graph: Graph) -> tuple[str, ...]:
    """Those that `with_sharding` can make of `graph`, its own first."""
    found = [graph.sharding]
    for sharding in SHARDINGS:
        try:
            with_sharding(graph, sharding)
        except ValueError:
            continue
        found.append(sharding)
    return tuple(dict.fromkeys(found))


def with_sharding(graph: Graph, sharding: str) -> Graph:
    """The graph of `graph`'s rank for `sharding`: the same object for the same graph, `graph` itself if it has it.

    Raises ValueError if there is one rank, if `graph` has other weights or not the layout's own sharding, or if an
    operation of the layer needs all rows of the residual.
    """
    if graph.sharding == sharding:
        return graph
    if graph.ranks == 1:
        raise ValueError(
            f"{sharding} is for ranks that share the model, and there is one: leave it out, or set parallel.tensor "
            "(plan check: --tensor)"
        )
    if graph.sharding != ALL_REDUCE or sharding not in SCATTERED:
        raise ValueError(
            f"{sharding} needs weights that are laid out otherwise than for {graph.sharding}, which the other plans of "
            "the run have: give it alone, as a plan file"
        )
    return graph.derived(sharding, _scattered if sharding == REDUCE_SCATTER else _fused)


def _scattered(graph: Graph) -> Graph:
    scattered = {RESIDUAL}  # values of which a rank has its own rows
    layer: list[Operation] = []
    for op in graph.layer:
        if isinstance(op, AllReduce):
            scattered.add(op.buffer)
            name = f"{op.name.removesuffix('_all_reduce')}_reduce_scatter"
            layer.append(ReduceScatter(name, op.buffer, op.columns, op.ranks))
        elif not scattered & {access.buffer for access in op.accesses}:
            layer.append(op)
        elif isinstance(op, (Norm, AddNorm)):
            norm = op.norm if isinstance(op, AddNorm) else op
            layer.append(OwnRows(op, graph.rank, graph.ranks))
            layer.append(RowsAllGather(f"{op.name}_all_gather", norm.target, norm.columns, graph.ranks))
        elif isinstance(op, Add):
            layer.append(OwnRows(op, graph.rank, graph.ranks))
        elif any(access.buffer in scattered and not access.write for access in op.accesses):
            raise ValueError(f"{op.name} needs all rows of the residual, or of a sum over ranks, before a norm")
        else:  # it writes, whole, what is added up next
            layer.append(op)
    sampled = next(op for op in graph.epilogue if isinstance(op, Norm))
    together = SampledSum("sampled_all_reduce", sampled.source, sampled.columns, graph.ranks)
    return replace(graph, layer=tuple(layer), epilogue=(together, *graph.epilogue), sharding=REDUCE_SCATTER)


def _fused(graph: Graph) -> Graph:
    scattered = with_sharding(graph, REDUCE_SCATTER)
    layer: list[Operation] = []
    left = list(scattered.layer)
    while left:
        scatter = left[0] if isinstance(left[0], ReduceScatter) else None
        own, behind = (*left[scatter is not None :], None, None)[:2]
        gather = behind if isinstance(behind, RowsAllGather) else None
        if isinstance(own, OwnRows) and _adds(own) == (scatter and scatter.buffer):
            name = (
                f"{own.name}_gather"
                if scatter is None
                else f"{scatter.name.removesuffix('_reduce_scatter')}_{own.name}"
            )
            fused = FusedRows(name, scatter, own, gather)
            layer.append(fused)
            del left[: len(fused.parts)]
        else:
            layer.append(left.pop(0))
    return replace(scattered, layer=tuple(layer), sharding=FUSED)


def _adds(own: OwnRows) -> str | None:
    """The value that an operation on a rank's rows adds to the residual, if it does."""
    return own.op.branch if isinstance(own.op, (Add, AddNorm)) else None
