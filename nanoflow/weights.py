"""A model's parameters in the layout that its operations want, loaded from a checkpoint or made up.

Each weight is allocated once in its final dtype, on its final device, and the checkpoint's tensors are streamed into
its slices. Packing may make another copy; the unpacked one is dropped before the next weight is begun, so memory peaks
little above the model's own size.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from nanoflow.checkpoints.base import Checkpoint, Region
from nanoflow.devices import memory_shortage
from nanoflow.errors import CheckpointError
from nanoflow.memory import free_bytes
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Operation, TensorSlice, Weight

__all__ = ["ModelWeights", "load_weights", "required_bytes"]

_STD = 0.02


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """All parameters, packed. An operation's weights are by operation name, then by `Weight.name`."""

    layers: list[dict[str, dict[str, torch.Tensor]]]
    outer: dict[str, dict[str, torch.Tensor]]
    """Of the operations before and after the layers."""

    @property
    def bytes(self) -> int:
        """Memory in use, shared tensors counted once (tensors of an opaque layout by their elements)."""
        sizes: dict[int, int] = {}
        for ops in (*self.layers, self.outer):
            for weights in ops.values():
                sizes.update({id(w): w.numel() * w.element_size() for w in weights.values()})
        return sum(sizes.values())


@dataclass(frozen=True)
class _Item:
    """One weight to load, and where its tensors are in the checkpoint."""

    layer: int | None
    op: Operation
    weight: Weight
    parts: tuple[str, ...]


def required_bytes(graph: Graph, dtype: torch.dtype) -> int:
    """Memory that the model's weights take, in bytes.

    A tensor that two operations name is counted twice, since one of them may pack it (as the head does with tied
    embeddings on a CPU).
    """
    return sum(prod(item.weight.shape) for item in _items(graph)) * dtype.itemsize


def load_weights(
    graph: Graph,
    checkpoint: Checkpoint | None,
    dtype: torch.dtype,
    device: torch.device | str,
    mode: Literal["load", "random"] = "load",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ModelWeights:
    """The weights of `graph` in `dtype` on `device`.

    With mode "load" they come from `checkpoint`; every name and shape is checked before anything is read. With mode
    "random" they are normal with a standard deviation of 0.02, and 1 for the weights of norms; they depend on `seed`,
    the parameter's name and the kind of device, not on the order of loading, and optional weights are left out.
    `progress` is told bytes done and bytes in all. Raises CheckpointError for a missing tensor or a wrong shape,
    OutOfMemoryError if the device has not enough memory.
    """
    device = torch.device(device)
    items = list(_items(graph))
    if mode == "load":
        if checkpoint is None:
            raise ValueError("a checkpoint is needed to load weights")
        items = [item for item in items if _present(item, checkpoint)]
    else:
        items = [item for item in items if not item.weight.optional]
    _check_memory(graph, dtype, device)

    weights = ModelWeights([{} for _ in range(graph.layers)], {})
    memory = _Memory(dtype, device)
    # Tensors that packing left as they are can serve again under another operation (tied embeddings).
    unpacked: dict[tuple[tuple[str, ...], TensorSlice | None], torch.Tensor] = {}
    total, done = sum(prod(item.weight.shape) for item in items) * dtype.itemsize, 0
    for item in items:
        tensor = unpacked.get((item.parts, item.weight.slice))
        if tensor is None:
            tensor = memory.allocate(item)
            if mode == "load":
                assert checkpoint is not None
                _read(item, checkpoint, tensor)
            else:
                _randomise(item, tensor, seed)
        packed = memory.keep(item, tensor, item.op.pack(item.weight.name, tensor))
        if packed is tensor and item.layer is None:
            unpacked[item.parts, item.weight.slice] = tensor
        del tensor
        place = weights.outer if item.layer is None else weights.layers[item.layer]
        place.setdefault(item.op.name, {})[item.weight.name] = packed
        done += prod(item.weight.shape) * dtype.itemsize
        if progress is not None:
            progress(done, total)
    return weights


class _Memory:
    """Where weights are read to. Those of layers that packing copies are read to one workspace, over and over.

    A block of its own for each would leave holes between the packed ones that nothing fills: a tenth of a small model.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._empty = torch.empty(0, dtype=dtype, device=device)
        self._workspace = self._empty
        self._copied: set[tuple[str, str]] = set()
        """Operation and weight whose packing is known, from an earlier layer, to make a copy."""

    def allocate(self, item: _Item) -> torch.Tensor:
        """Room for the weight, in its final dtype, on its final device."""
        if item.layer is None:
            self._workspace = self._empty
        elif (item.op.name, item.weight.name) in self._copied:
            size = prod(item.weight.shape)
            if size > len(self._workspace):
                self._workspace = self._empty
                self._workspace = self._empty.new_empty(size)
            return self._workspace[:size].view(item.weight.shape)
        return self._empty.new_empty(item.weight.shape)

    def keep(self, item: _Item, tensor: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """The packed weight, on memory that is its own."""
        if _shares_memory(tensor, packed):
            return packed.clone() if _shares_memory(self._workspace, packed) else packed
        self._copied.add((item.op.name, item.weight.name))
        return packed


def _shares_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.layout != torch.strided or second.layout != torch.strided or not first.numel():
        return False  # an opaque layout is always a copy
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _items(graph: Graph) -> Iterator[_Item]:
    for op in graph.prologue:
        yield from (_Item(None, op, weight, weight.parts) for weight in op.weights)
    for layer in range(graph.layers):
        for op in graph.layer:
            for weight in op.weights:
                yield _Item(layer, op, weight, tuple(f"model.layers.{layer}.{part}" for part in weight.parts))
    for op in graph.epilogue:
        yield from (_Item(None, op, weight, weight.parts) for weight in op.weights)


def _present(item: _Item, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has the weight in the right shape; raises CheckpointError unless that may be missing."""
    missing = [part for part in item.parts if part not in checkpoint.tensors]
    if item.weight.optional and len(missing) == len(item.parts):
        return False
    if missing:
        which = f" of shape {list(item.weight.whole)}" if len(item.parts) == 1 else ""
        raise CheckpointError(
            f"{checkpoint.path}: tensor {missing[0]!r}{which} is missing. Use a complete checkpoint, whose weights "
            "belong to its configuration."
        )
    shapes = [checkpoint.tensors[part] for part in item.parts]
    expected = item.weight.whole
    if len(shapes) == 1 and shapes[0] != expected:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {item.parts[0]!r} has shape {list(shapes[0])}, the configuration asks for "
            f"{list(expected)}. The weights do not belong to this configuration."
        )
    for part, shape in zip(item.parts, shapes, strict=True):
        if len(shape) != len(expected) or shape[1:] != expected[1:]:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {part!r} has shape {list(shape)}, the configuration asks for "
                f"{['rows', *expected[1:]]}. The weights do not belong to this configuration."
            )
    rows = [shape[0] for shape in shapes]
    if sum(rows) != expected[0]:
        listed = ", ".join(f"{part!r} ({count})" for part, count in zip(item.parts, rows, strict=True))
        raise CheckpointError(
            f"{checkpoint.path}: the tensors {listed} have {sum(rows)} rows together, the configuration asks for "
            f"{expected[0]}. The weights do not belong to this configuration."
        )
    return True


def _read(item: _Item, checkpoint: Checkpoint, tensor: torch.Tensor) -> None:
    """Fill `tensor` with the parts one below the other, or with its slice of them, the only bytes then read."""
    taken = item.weight.slice
    if taken is not None and taken.dim == 0:
        _read_rows(item, checkpoint, tensor, taken)
        return
    region = None if taken is None else Region(taken.dim, *_only_range(taken))
    start = 0
    for part in item.parts:
        rows = checkpoint.tensors[part][0]
        checkpoint.read(part, tensor[start : start + rows], region)
        start += rows


def _read_rows(item: _Item, checkpoint: Checkpoint, tensor: torch.Tensor, taken: TensorSlice) -> None:
    filled = 0
    for begin, end in taken.ranges:
        start = 0
        for part in item.parts:
            rows = checkpoint.tensors[part][0]
            first, last = max(begin - start, 0), min(end - start, rows)
            if first < last:
                checkpoint.read(part, tensor[filled : filled + last - first], Region(0, first, last))
                filled += last - first
            start += rows
    tensor[filled:].zero_()


def _only_range(taken: TensorSlice) -> tuple[int, int]:
    """Of columns one stretch is taken: several would lie scattered in every row."""
    (found,) = taken.ranges
    return found


def _randomise(item: _Item, tensor: torch.Tensor, seed: int) -> None:
    """Fill with numbers that follow from the seed and the weight's own name, so that the order does not matter.

    A slice is taken from the whole, which is made first: the ranks together have the numbers of a single one.
    """
    if tensor.dim() == 1 and item.parts[0].endswith("norm.weight"):
        tensor.fill_(1.0)
        return
    digest = hashlib.sha256(f"{seed}:{','.join(item.parts)}".encode()).digest()
    generator = torch.Generator(device=tensor.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    taken = item.weight.slice
    if taken is None:
        tensor.normal_(0.0, _STD, generator=generator)
        return
    whole = tensor.new_empty(taken.shape).normal_(0.0, _STD, generator=generator)
    tensor.zero_()
    filled = 0
    for begin, end in taken.ranges:
        tensor.narrow(taken.dim, filled, end - begin).copy_(whole.narrow(taken.dim, begin, end - begin))
        filled += end - begin


def _check_memory(graph: Graph, dtype: torch.dtype, device: torch.device) -> None:
    need, have = required_bytes(graph, dtype), free_bytes(device)
    if need > have:
        raise memory_shortage(need, have, dtype, device, graph.ranks)
