"""The reference executor: runs any valid plan, on a CPU or a GPU, in a random order among all allowed.

Contract: whatever the plan and whatever the order drawn, the tokens are those of the sequential plan. A plan whose
derived waits are too weak gives wrong tokens here sooner or later, on any machine.

Pseudo-code of one iteration::

    copy the batch's metadata to the device; take the tokens that only the device knows
    embed all rows
    while steps are left:
        pick one lane at random among those whose next step has all its predecessors done
        run that step's kernel on its nano-batch's rows, in the plan's buffers
    gather the rows to sample; final norm, head, sample

The loop of the engine is `launch` / `collect`: iterations run on one worker thread, in the order launched, while the
caller forms the next batch and handles the last one's tokens.
"""

import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import cast

import numpy as np
import torch

from nanoflow.ops.batch import TOKEN_ON_DEVICE, DenseBatch, SamplingBatch, StepOutput
from nanoflow.ops.device_batch import BatchPart, DeviceBatch
from nanoflow.ops.graph import RESIDUAL
from nanoflow.ops.operation import Kernel, NanoContext, Operation
from nanoflow.ops.sampling import Sampler, StepTensors
from nanoflow.pipeline.buffers import assign_buffers
from nanoflow.pipeline.executor import KVLayout, OpWeights, Weights
from nanoflow.pipeline.plan import PlanError
from nanoflow.pipeline.program import Program

__all__ = ["ReferenceExecutor"]

SAMPLED_ROWS = 256
"""Rows whose logits are held at a time."""

NOTHING_SAMPLED = StepTensors(torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class RowsOnly:
    """The part of an operation that only looks at rows: the sampled ones, gathered."""

    rows: slice


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


class ReferenceExecutor:
    """Runs a program with each op's reference maths or the kernel that the plan names.

    Args:
        program: the compiled plan; its buffers are allocated once, here.
        weights: of all layers and of what stands before and after them, on `device`.
        kv: size of the paged KV cache, allocated here, zeroed (on a CPU the pages cost memory only once written).
        slots: requests that may run at once; the device keeps one last token for each.
        dtype: of activations and KV cache.
        seed: of the order drawn at each iteration. A plan with a single lane has only one order.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        kv: KVLayout,
        *,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        graph = program.graph
        self.program = program
        self.weights = weights
        self.device = device
        self.kv_layout = kv
        self.buffers = {
            name: torch.zeros(spec.rows, spec.columns, dtype=dtype, device=device)
            for name, spec in assign_buffers(graph, program.plan, SAMPLED_ROWS).items()
        }
        page = (2, graph.kv_heads, kv.page_size, graph.head_dim)
        self.kv = [_zeros((kv.pages, *page), dtype, device) for _ in range(graph.layers)]
        self.sampler = Sampler(graph.vocab_size, slots, device)
        named = program.plan.kernels
        self._kernels = {op.name: _kernel(op, named.get(op.name), device, dtype) for op in graph.layer}
        self._outer_kernels = {
            op.name: _kernel(op, named.get(op.name), device, dtype) for op in graph.prologue + graph.epilogue
        }
        self._random = random.Random(seed)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reference-executor")
        self._in_flight: deque[Future[StepOutput]] = deque()

    def launch(self, batch: DenseBatch) -> None:
        """Queue an iteration; see `Executor.launch`."""
        self._in_flight.append(self._worker.submit(self._run, batch))

    def collect(self) -> StepOutput:
        """Wait for the oldest iteration launched; see `Executor.collect`."""
        return self._in_flight.popleft().result()

    def close(self) -> None:
        """Wait for what runs, drop what was not collected, and end the worker thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._in_flight.clear()

    @torch.inference_mode()
    def _run(self, host: DenseBatch) -> StepOutput:
        started = time.perf_counter()
        batch = DeviceBatch(host, self.device, self.kv_layout.page_size)
        on_device = batch.token_ids_T == TOKEN_ON_DEVICE
        batch.token_ids_T = torch.where(on_device, self.sampler.last_tokens[batch.slots_T], batch.token_ids_T)
        for op in self.program.graph.prologue:
            self._outer_kernels[op.name](self._context(batch, batch.whole, op, 0, self.weights.outer))
        for index in self._draw_order() if len(self.program.lanes) > 1 else range(len(self.program.steps)):
            nano_op = self.program.steps[index].nano_op
            op = self.program.graph.operation(nano_op.op)
            part = batch.part(nano_op.nano_batch)
            if part.has_rows(op.row_class):
                context = self._context(batch, part, op, nano_op.layer, self.weights.layers[nano_op.layer])
                self._kernels[op.name](context)
        tokens = NOTHING_SAMPLED if host.sampling is None else self._sample(batch, host.sampling)
        output = tokens.to_host()
        return replace(output, seconds=time.perf_counter() - started)

    def _sample(self, batch: DeviceBatch, sampling: SamplingBatch) -> StepTensors:
        """Final norm, head and sampling of the rows that need a token, some at a time so that logits stay small."""
        rows = torch.from_numpy(sampling.rows).to(self.device, torch.int64)
        sampled, logits = self.buffers["sampled"], self.buffers["logits"]

        def head(entries: slice) -> torch.Tensor:
            count = entries.stop - entries.start
            torch.index_select(self.buffers[RESIDUAL], 0, rows[entries], out=sampled[:count])
            part = cast(BatchPart, RowsOnly(slice(0, count)))
            for op in self.program.graph.epilogue:
                self._outer_kernels[op.name](self._context(batch, part, op, 0, self.weights.outer))
            return logits[:count]

        return self.sampler.sample_chunks(sampling, head, SAMPLED_ROWS)

    def _context(
        self, batch: DeviceBatch, part: BatchPart, op: Operation, layer: int, weights: OpWeights
    ) -> NanoContext:
        return NanoContext(batch, part, layer, self.buffers, weights.get(op.name, {}), self.kv[layer])

    def _draw_order(self) -> Iterator[int]:
        """Indices of all steps: a random order among those that lanes and predecessors allow."""
        program = self.program
        queues = {lane: deque(steps) for lane, steps in program.lanes.items() if steps}
        done = bytearray(len(program.steps))
        while queues:
            ready = [
                lane for lane, queue in queues.items() if all(done[before] for before in program.predecessors[queue[0]])
            ]
            if not ready:  # compile_program refuses plans that can get here
                raise RuntimeError(f"deadlock: no lane can go on, next are {[queue[0] for queue in queues.values()]}")
            lane = self._random.choice(ready)
            step = queues[lane].popleft()
            if not queues[lane]:
                del queues[lane]
            yield step
            done[step] = 1
