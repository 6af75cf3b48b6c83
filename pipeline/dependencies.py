"""Which nano-op must come after which, derived from the operations' declared accesses and from nothing else.

Two accesses conflict if at least one writes, they name the same buffer (a layer's KV cache is a buffer of its own,
while activation buffers are shared by all layers), their nano-batches meet and their row classes meet. Conflicting
accesses keep the order of the sequential program: layer, then operation, then nano-batch. That covers read after write,
write after read and write after write, inside a layer and across layers.

Each buffer is cut into cells (nano-batch, row kind), small enough that an access covers whole cells. Per cell it is
enough to remember the last writer and the readers since: older conflicts follow by transitivity.
Scratch memory has no cells: it is one buffer a lane, and the lane's own order keeps its users apart.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import KV, SCRATCH, Access, Operation, RowClass

__all__ = ["NanoOp", "derive_dependencies", "producer", "sequential_order"]


@dataclass(frozen=True)
class NanoOp:
    """Operation `op` of layer `layer` on nano-batch `nano_batch` (its index in the plan), or on all rows for None."""

    op: str
    nano_batch: int | None
    layer: int


_KINDS = {RowClass.ALL: ("decode", "prefill", "padding"), RowClass.DECODE: ("decode",), RowClass.PREFILL: ("prefill",)}

Cell = tuple[str, int, str]


def sequential_order(graph: Graph, whole: Iterable[str], nano_batches: int) -> list[NanoOp]:
    """Every nano-op of the model in sequential order; the operations named in `whole` are not split."""
    unsplit = set(whole)
    parts: list[tuple[str, int | None]] = []
    for op in graph.layer:
        parts.extend((op.name, n) for n in ([None] if op.name in unsplit else range(nano_batches)))
    return [NanoOp(name, n, layer) for layer in range(graph.layers) for name, n in parts]


def derive_dependencies(graph: Graph, nano_ops: Sequence[NanoOp], nano_batches: int) -> list[tuple[int, ...]]:
    """For each of `nano_ops`, which must be in sequential order, the indices of the earlier ones it must wait for.

    The closure of the result is the order of all conflicting pairs; pairs that follow by transitivity may be left out.
    """
    cells: dict[tuple[str, int | None], tuple[list[Cell], list[Cell]]] = {}
    writer: dict[tuple[Cell, int], int] = {}
    readers: dict[tuple[Cell, int], list[int]] = {}
    result: list[tuple[int, ...]] = []
    for index, nano_op in enumerate(nano_ops):
        key = nano_op.op, nano_op.nano_batch
        if key not in cells:
            cells[key] = _cells(graph.operation(nano_op.op), nano_op.nano_batch, nano_batches)
        reads, writes = cells[key]
        found: set[int] = set()
        for cell in reads:
            place = cell, nano_op.layer if cell[0] == KV else -1
            if place in writer:
                found.add(writer[place])
        for cell in writes:
            place = cell, nano_op.layer if cell[0] == KV else -1
            if place in writer:
                found.add(writer[place])
            found.update(readers.pop(place, ()))
            writer[place] = index
        for cell in reads:
            # After the writes: an operation that updates in place is the cell's writer, which says enough.
            place = cell, nano_op.layer if cell[0] == KV else -1
            if writer.get(place) != index:
                readers.setdefault(place, []).append(index)
        result.append(tuple(sorted(found)))
    return result


def _cells(op: Operation, nano_batch: int | None, nano_batches: int) -> tuple[list[Cell], list[Cell]]:
    """The cells that one nano-op reads, and those that it writes."""
    reads: dict[Cell, None] = {}
    writes: dict[Cell, None] = {}
    for access in op.accesses:
        if access.buffer == SCRATCH:
            continue
        if nano_batch is None:
            covered = range(nano_batches)
        else:
            covered = range(0 if access.prefix else nano_batch, nano_batch + 1)
        target = writes if access.write else reads
        target.update({(access.buffer, n, kind): None for n in covered for kind in _KINDS[access.rows]})
    return list(reads), list(writes)


def producer(graph: Graph, op: Operation) -> tuple[Operation, int] | None:
    """The latest operation that writes something `op` reads, and how many layers before `op`'s own it runs (0 or 1).

    None if no operation of a layer writes anything that `op` reads, other than `op` itself.
    """
    index = next(i for i, other in enumerate(graph.layer) if other is op)
    reads = [access for access in op.accesses if not access.write and access.buffer != SCRATCH]
    for other in reversed(graph.layer[:index]):
        if _writes_any(other, reads):
            return other, 0
    reads = [access for access in reads if access.buffer != KV]  # the last layer's KV cache is another buffer
    for other in reversed(graph.layer[index + 1 :]):
        if _writes_any(other, reads):
            return other, 1
    return None


def _writes_any(op: Operation, reads: Sequence[Access]) -> bool:
    return any(
        written.write and written.buffer == read.buffer and written.rows.meets(read.rows)
        for written in op.accesses
        for read in reads
    )
