"""One rank's share of a model's graph: what tensor parallelism makes of every operation.

Contract: `shard_graph` turns the graph of the whole model, fused or not, into that of one of `size` ranks. Each rank
has some heads, some columns of the feed-forward layer and some of the vocabulary, and all of the residual; run side by
side, with collectives where partial results meet, the ranks compute what the whole model does (Shoeybi et al. 2019,
"Megatron-LM", arXiv 1909.08053).

    linear, shard "columns"    outputs / size of each of its blocks (q, k, v; gate, up); its input is whole
    linear, shard "rows"       inputs / size; partial sums, then an all-reduce; the bias is on rank 0 alone
    attention, rope, ...       heads / size query heads; the key/value heads that those attend to
    embedding, norms, add      whole
    head                       vocabulary / size columns, rounded up, zeros behind the last; then an all-gather of the
                               logits

With the layout ``all_gather`` (see `nanoflow.ops.row_sharding`) the linear behind attention is split otherwise:

    attention's output         all-gather of the columns of all ranks' heads
    the linear behind it       outputs / size, the bias too; then an all-gather of its output

Where there are more ranks than key/value heads, each of those is held by size / kv_heads ranks, and so is its cache.
Shares of all ranks have the same shape, so one plan serves them all.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from nanoflow.ops.attention import DecodeAttention, PrefillAttention
from nanoflow.ops.collectives import AllGather, AllReduce, LayerAllGather
from nanoflow.ops.elementwise import Add, SiluMul
from nanoflow.ops.graph import Graph
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.norm import AddNorm, Norm, QKNorm
from nanoflow.ops.operation import Operation, TensorSlice, Weight
from nanoflow.ops.rope import Append, Rope, RopeAppend
from nanoflow.ops.row_sharding import ALL_GATHER, ALL_REDUCE, layout_of

__all__ = ["ShardError", "shard_graph"]

Range = tuple[int, int]
Op = TypeVar("Op", bound=Operation)

HEAD_COLUMNS = 8
"""A rank's columns of the head are a multiple: 16 bytes in 16-bit types, below which GPUs store and multiply slower."""

_BY_HEADS = (QKNorm, Rope, Append, RopeAppend, DecodeAttention, PrefillAttention)


class ShardError(ValueError):
    """A model that cannot be split over so many ranks. The message names `parallel.tensor`, the sizes and the mend."""


def shard_graph(graph: Graph, rank: int, size: int, layout: str = ALL_REDUCE) -> Graph:
    """The share of rank `rank` of `size` of the whole model's `graph`; the graph itself for one rank.

    `layout` is a sharding that has weights of its own, ``all_reduce`` or ``all_gather``; the graph is for that one.
    Raises ShardError if heads, key/value heads or columns do not divide.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not one of 0 to {size - 1}")
    try:
        return _share(graph, rank, size, layout)
    except _Indivisible as error:
        fits = [n for n in range(1, graph.heads + 1) if _fits(graph, n, layout)]
        raise ShardError(
            f"parallel.tensor: {size} ranks cannot share this model: {error}. "
            f"Use {'one of ' if len(fits) > 1 else ''}{', '.join(map(str, fits))}; more GPUs can serve as replicas "
            "(parallel.data)"
        ) from None


class _Indivisible(ValueError):
    """Why."""


def _share(graph: Graph, rank: int, size: int, layout: str) -> Graph:
    """See `shard_graph`. Raises _Indivisible."""
    if size == 1:
        return graph
    heads, kv_heads = graph.heads, graph.kv_heads
    if heads % size:
        raise _Indivisible(f"there are {heads} query heads, which {size} does not divide")
    if kv_heads % size and size % kv_heads:
        raise _Indivisible(f"there are {kv_heads} key/value heads, which {size} neither divides nor is a multiple of")
    return _Sharding(graph, rank, size, layout).graph()


def _fits(graph: Graph, size: int, layout: str) -> bool:
    try:
        _share(graph, 0, size, layout)
    except _Indivisible:
        return False
    return True


class _Sharding:
    """What is being made of one graph for one rank."""

    def __init__(self, graph: Graph, rank: int, size: int, layout: str) -> None:
        if layout != layout_of(layout):
            raise ValueError(f"{layout} has the weights of {layout_of(layout)}")
        self.whole = graph
        self.layout = layout
        self.rank = rank
        self.size = size
        self.heads = graph.heads // size
        self.kv_heads = max(1, graph.kv_heads // size)
        self.first_kv_head = rank * graph.kv_heads // size
        self.columns: dict[str, int] = {}
        """Columns of the values of which a rank has a share."""
        self.qkv = {op.qkv for op in graph.layer if isinstance(op, _BY_HEADS)}
        self.attention = {op.target for op in graph.layer if isinstance(op, (DecodeAttention, PrefillAttention))}
        self.gated = {op.source for op in graph.layer if isinstance(op, SiluMul)}

    def graph(self) -> Graph:
        whole = self.whole
        layer = [share for op in whole.layer for share in self.operation(op)]
        epilogue: list[Operation] = []
        for op in whole.epilogue:
            epilogue += self.head(op) if isinstance(op, Linear) else [op]
        return replace(
            whole,
            values={**whole.values, **self.columns},
            layer=tuple(layer),
            epilogue=tuple(epilogue),
            heads=self.heads,
            kv_heads=self.kv_heads,
            ranks=self.size,
            rank=self.rank,
            sharding=self.layout,
        )

    def operation(self, op: Operation) -> tuple[Operation, ...]:
        """The rank's share of an operation of the layer, with the collective behind it."""
        if isinstance(op, _BY_HEADS):
            return (self.by_heads(op),)
        if isinstance(op, LinearSilu):
            linear = self.columns_of(op.linear, _halves(op.linear))
            return (_changed(op, linear=linear, silu_mul=self.silu_mul(op.silu_mul)),)
        if isinstance(op, SiluMul):
            return (self.silu_mul(op),)
        if isinstance(op, Linear) and op.shard == "columns":
            return (self.columns_of(op, _halves(op) if op.target in self.gated else op.outputs),)
        if isinstance(op, Linear) and op.shard == "rows":
            gathered = self.layout == ALL_GATHER and op.source in self.attention
            return self.behind_gathered(op) if gathered else self.rows_of(op)
        if not isinstance(op, (Linear, Norm, AddNorm, Add)):
            raise TypeError(f"tensor parallelism does not know what {op} becomes on a rank")
        self.needs_whole(op, [access.buffer for access in op.accesses])
        return (op,)

    def by_heads(self, op: Op) -> Op:
        if isinstance(op, (DecodeAttention, PrefillAttention)):
            self.columns[op.target] = self.heads * op.head_dim
        shared = _changed(op, heads=self.heads, kv_heads=self.kv_heads)
        if isinstance(op, RopeAppend) and op.norm is not None:
            shared = _changed(shared, norm=_changed(op.norm, heads=self.heads, kv_heads=self.kv_heads))
        return shared

    def silu_mul(self, op: SiluMul) -> SiluMul:
        self.columns[op.target] = op.columns // self.size
        return _changed(op, columns=op.columns // self.size)

    def columns_of(self, op: Linear, blocks: Sequence[int]) -> Linear:
        """A linear of the outputs that the rank has of each of `blocks`, the columns that lie side by side."""
        self.needs_whole(op, [op.source])
        ranges = self.head_ranges(op) if op.target in self.qkv else self.even_ranges(op, blocks)
        outputs = tuple(end - begin for begin, end in ranges)
        self.columns[op.target] = sum(outputs)
        weights = tuple(_sliced(weight, 0, ranges, sum(outputs)) for weight in op.weights)
        return _changed(op, outputs=outputs, _weights=weights)

    def head_ranges(self, op: Linear) -> tuple[Range, ...]:
        """Output columns of the rank's queries, keys and values."""
        whole, size = self.whole, self.whole.head_dim
        if sum(op.outputs) != (whole.heads + 2 * whole.kv_heads) * size:
            raise ValueError(f"{op.name} has {sum(op.outputs)} columns: not those of queries, keys and values")
        key = whole.heads + self.first_kv_head
        blocks = (
            (self.rank * self.heads, self.heads),
            (key, self.kv_heads),
            (key + whole.kv_heads, self.kv_heads),
        )
        return tuple((first * size, (first + count) * size) for first, count in blocks)

    def even_ranges(self, op: Linear, blocks: Sequence[int]) -> tuple[Range, ...]:
        ranges, start = [], 0
        for columns in blocks:
            share = self.divided(op, columns, "output columns")
            ranges.append((start + self.rank * share, start + (self.rank + 1) * share))
            start += columns
        return tuple(ranges)

    def rows_of(self, op: Linear) -> tuple[Operation, ...]:
        """A linear of the rank's inputs, and the sum over the ranks."""
        share = self.divided(op, op.inputs, "input columns")
        if self.columns.get(op.source) != share:
            raise ValueError(f"{op.name} is split by rows, and {op.source} is not split into its inputs")
        columns = (self.rank * share, (self.rank + 1) * share)
        weights = [_sliced(weight, 1, (columns,), share) for weight in op.weights if len(weight.shape) == 2]
        if self.rank == 0:
            weights += [weight for weight in op.weights if len(weight.shape) == 1]
        linear = _changed(op, inputs=share, _weights=tuple(weights))
        return linear, AllReduce(f"{op.name}_all_reduce", op.target, sum(op.outputs), self.size)

    def behind_gathered(self, op: Linear) -> tuple[Operation, ...]:
        """All columns of a linear's input, the linear of the rank's outputs, and all columns of its output."""
        source, target, outputs = op.source, op.target, sum(op.outputs)
        if self.columns.get(source) != self.divided(op, op.inputs, "input columns"):
            raise ValueError(f"{op.name} is behind attention, and {source} does not have the columns of its heads")
        before = self.gather(f"{source}_all_gather", source, f"{source}_all", op.inputs)
        share = self.divided(op, outputs, "output columns")
        self.columns[f"{target}_share"] = share
        rows = (self.rank * share, (self.rank + 1) * share)
        weights = tuple(_sliced(weight, 0, (rows,), share) for weight in op.weights)
        linear = _changed(op, source=before.target, target=f"{target}_share", outputs=(share,), _weights=weights)
        return before, linear, self.gather(f"{op.name}_all_gather", linear.target, target, outputs)

    def gather(self, name: str, source: str, target: str, columns: int) -> LayerAllGather:
        """All ranks' columns of `source`, side by side in `target`."""
        gathered, share = f"{source}_gathered", self.columns[source]
        self.columns[gathered] = self.size * share
        if target not in self.whole.values:
            self.columns[target] = columns
        return LayerAllGather(name, source, gathered, target, share, self.size)

    def head(self, op: Linear) -> list[Operation]:
        """The head over the rank's vocabulary, and the logits of all ranks side by side."""
        columns = sum(op.outputs)
        share = -(-columns // (self.size * HEAD_COLUMNS)) * HEAD_COLUMNS
        rows = (min(self.rank * share, columns), min((self.rank + 1) * share, columns))
        source, gathered = f"{op.target}_share", f"{op.target}_gathered"
        self.columns |= {source: share, gathered: self.size * share}
        weights = tuple(_sliced(weight, 0, (rows,), share) for weight in op.weights)
        linear = _changed(op, target=source, outputs=(share,), _weights=weights)
        name = f"{op.name}_all_gather"
        return [linear, AllGather(name, source, gathered, op.target, share, columns, self.size)]

    def divided(self, op: Linear, columns: int, what: str) -> int:
        if columns % self.size:
            raise _Indivisible(f"the {columns} {what} of {op.name} do not divide by {self.size}")
        return columns // self.size

    def needs_whole(self, op: Operation, buffers: Sequence[str]) -> None:
        cut = [buffer for buffer in buffers if buffer in self.columns]
        if cut:
            raise ValueError(
                f"{op.name} needs all columns of {cut[0]}, of which a rank has a share: give the linear that makes it "
                'no shard, or the one behind it shard="rows"'
            )


def _halves(op: Linear) -> tuple[int, int]:
    """Gate and up, whether the checkpoint has them in one tensor or in two."""
    columns = sum(op.outputs)
    return columns // 2, columns // 2


def _sliced(weight: Weight, dim: int, ranges: tuple[Range, ...], length: int) -> Weight:
    """`weight` with `ranges` of its dimension `dim` alone, `length` in all."""
    shape = (*weight.shape[:dim], length, *weight.shape[dim + 1 :])
    return replace(weight, shape=shape, slice=TensorSlice(weight.shape, dim, ranges))


def _changed(op: Op, **attributes: object) -> Op:
    """A copy of an operation with other attributes, which it must have already."""
    assert attributes.keys() <= vars(op).keys()
    changed = copy.copy(op)
    vars(changed).update(attributes)
    return changed
