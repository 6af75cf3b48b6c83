"""A program bound to a device: its weights, buffers, KV cache and kernels, and how each of its pieces is run.

An iteration is `begin`, then every step, then `head` over the rows to sample. Which step comes when, on which stream,
and whether it is launched or replayed is the executor's matter.
"""

from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np
import torch

from nanoflow.ops.batch import TOKEN_ON_DEVICE
from nanoflow.ops.device_batch import BatchPart, DeviceBatch
from nanoflow.ops.graph import RESIDUAL
from nanoflow.ops.operation import Kernel, NanoContext, Operation
from nanoflow.pipeline.buffers import assign_buffers
from nanoflow.pipeline.executor import KVLayout, OpWeights, Weights
from nanoflow.pipeline.plan import PlanError
from nanoflow.pipeline.program import Program

__all__ = ["BoundProgram"]


@dataclass(frozen=True)
class _RowsOnly:
    """The part of an operation that only looks at rows: the sampled ones, gathered."""

    rows: slice


class BoundProgram:
    """`program` on `device`. Buffers and KV cache are allocated here, once, zeroed.

    Args:
        weights: of all layers and of what stands before and after them, on `device`.
        kv: size of the paged KV cache (on a CPU the pages cost memory only once written).
        dtype: of activations and KV cache.
        sampled_rows: the most rows that `head` takes at a time.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        kv: KVLayout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        sampled_rows: int,
    ) -> None:
        graph = program.graph
        self.program = program
        self.weights = weights
        self.device = device
        self.kv_layout = kv
        self.sampled_rows = sampled_rows
        self.buffers = {
            name: torch.zeros(spec.rows, spec.columns, dtype=dtype, device=device)
            for name, spec in assign_buffers(graph, program.plan, sampled_rows).items()
        }
        page = (2, graph.kv_heads, kv.page_size, graph.head_dim)
        self.kv = [_zeros((kv.pages, *page), dtype, device) for _ in range(graph.layers)]
        named = program.plan.kernels
        self._kernels = {op.name: _kernel(op, named.get(op.name), device, dtype) for op in graph.layer}
        self._outer_kernels = {
            op.name: _kernel(op, named.get(op.name), device, dtype) for op in graph.prologue + graph.epilogue
        }

    def begin(self, batch: DeviceBatch, last_tokens: torch.Tensor) -> None:
        """Take the tokens that only the device knows from `last_tokens` [slots], and embed all rows."""
        on_device = batch.token_ids_T == TOKEN_ON_DEVICE
        batch.token_ids_T = torch.where(on_device, last_tokens[batch.slots_T], batch.token_ids_T)
        for op in self.program.graph.prologue:
            self._outer_kernels[op.name](self._context(batch, batch.whole, op, 0, self.weights.outer))

    def step(self, batch: DeviceBatch, index: int) -> None:
        """Run one step of the program, if its nano-batch has rows for it."""
        nano_op = self.program.steps[index].nano_op
        op = self.program.graph.operation(nano_op.op)
        part = batch.part(nano_op.nano_batch)
        if part.has_rows(op.row_class):
            context = self._context(batch, part, op, nano_op.layer, self.weights.layers[nano_op.layer])
            self._kernels[op.name](context)

    def head(self, batch: DeviceBatch, rows: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of the dense batch's rows `rows` [S]: gathered, final norm, head. The next call overwrites
        them."""
        sampled, logits = self.buffers["sampled"], self.buffers["logits"]
        count = len(rows)
        torch.index_select(self.buffers[RESIDUAL], 0, rows, out=sampled[:count])
        part = cast(BatchPart, _RowsOnly(slice(0, count)))
        for op in self.program.graph.epilogue:
            self._outer_kernels[op.name](self._context(batch, part, op, 0, self.weights.outer))
        return logits[:count]

    def _context(
        self, batch: DeviceBatch, part: BatchPart, op: Operation, layer: int, weights: OpWeights
    ) -> NanoContext:
        return NanoContext(batch, part, layer, self.buffers, weights.get(op.name, {}), self.kv[layer])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of `shape`. On a CPU only what is written takes memory: calloc's pages are the system's own zeros."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _kernel(op: Operation, named: str | None, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel that the plan names for `op`, or the one that the device prefers."""
    name = named or op.preferred_kernel(device, dtype)
    if name not in op.kernels:
        raise PlanError(f"kernels.{op.name}: {name!r} is unknown; {op.name} has {', '.join(op.kernels)}")
    return op.kernels[name]
