"""Programs bound to a device: their weights, buffers, KV cache and kernels, and how each of their pieces is run.

An iteration is `begin`, then every step of the program that its batch is laid out for, then `head` over the rows to
sample. Which step comes when, on which stream, and whether it is launched or replayed is the executor's matter.

All programs are of one model and share weights, KV cache and buffers: they run one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np
import torch

from nanoflow.ops.batch import TOKEN_ON_DEVICE
from nanoflow.ops.collectives import CTAS, Collective
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.device_batch import BatchPart, DeviceBatch
from nanoflow.ops.graph import RESIDUAL, Graph
from nanoflow.ops.operation import Kernel, NanoContext, Operation
from nanoflow.ops.peer_memory import PeerMemory, PeerMemoryError
from nanoflow.pipeline.buffers import assign_buffers
from nanoflow.pipeline.executor import KVLayout, OpWeights, Weights
from nanoflow.pipeline.plan import Plan, PlanError
from nanoflow.pipeline.program import Program, Step

__all__ = ["BoundPrograms", "make_caches"]


_Key = tuple[int, str, int | None]
"""Program, operation, and SMs of the lane."""


@dataclass(frozen=True)
class _RowsOnly:
    """The part of an operation that only looks at rows: the sampled ones, gathered."""

    rows: slice


class BoundPrograms:
    """`programs` on `device`. Buffers and KV cache are allocated here, once, zeroed.

    Args:
        weights: of all layers and of what stands before and after them, on `device`.
        kv: size of the paged KV cache (on a CPU the pages cost memory only once written).
        dtype: of activations and KV cache.
        sampled_rows: the most rows that `head` takes at a time.
        confined: whether lanes have the SMs that their plan gives them, and no others; kernels are launched for those.
        caches: the KV cache of each layer, where it is there already (`make_caches`); None: allocated here.
        communicator: to the other ranks, where the graph is that of one of several. Of the lanes that hold
            collectives, each but the first gets a twin of it, and one for each number of thread blocks that its kernels
            name; for each form that meets in peer memory, it gets memory of its own.

    Raises ValueError if there are more or fewer ranks than the graph was split for, PlanError if a kernel that a plan
    names does not exist or cannot run here.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        weights: Weights,
        kv: KVLayout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        sampled_rows: int,
        confined: bool = False,
        caches: Sequence[torch.Tensor] | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        graph = programs[0].graph
        ranks = 1 if communicator is None else communicator.size
        if ranks != graph.ranks:
            raise ValueError(f"the graph was split for {graph.ranks} ranks, and the communicator joins {ranks}")
        self.graph = graph
        self.programs = tuple(programs)
        self.weights = weights
        self.device = device
        self.kv_layout = kv
        self.sampled_rows = sampled_rows
        self._confined = confined
        specs = [assign_buffers(graph, program.plan, sampled_rows) for program in programs]
        self.buffers = {
            name: torch.zeros(
                max(spec[name].rows for spec in specs), specs[0][name].columns, dtype=dtype, device=device
            )
            for name in specs[0]
        }
        self.communicator = communicator
        self.kv = make_caches(graph, kv, dtype, device) if caches is None else list(caches)
        outer = (*graph.prologue, *graph.epilogue)
        self._outer_kernels = {op.name: op.kernels[_kernel(op, programs[0].plan, device, dtype, None)] for op in outer}
        self._kernels: dict[_Key, Kernel] = {}
        self._names: dict[_Key, str] = {}
        self._prepared: list[list[Step]] = []
        for number, program in enumerate(programs):
            first: dict[tuple[str, int | None], Step] = {}
            for step in program.steps:
                first.setdefault((step.nano_op.op, step.nano_op.nano_batch), step)
            self._prepared.append(list(first.values()))
            for step in first.values():
                op, sms = graph.operation(step.nano_op.op), self.sms(number, step)
                name = _kernel(op, program.plan, device, dtype, sms)
                self._names[number, op.name, sms], self._kernels[number, op.name, sms] = name, op.kernels[name]
        self._communicators = {} if communicator is None else self._twins(communicator)
        self._peers = {} if communicator is None else self._peer_memory(communicator, dtype)

    def close(self) -> None:
        """Give back what the ranks have in common of their memory; nothing runs any more, and graphs are gone."""
        for memory in dict.fromkeys(self._peers.values()):
            memory.close()
        self._peers.clear()

    def sms(self, program: int, step: Step) -> int | None:
        """SMs that a step of a program has; None if its lane is not confined."""
        return self.programs[program].plan.lane_sms(step.stage, step.lane) if self._confined else None

    def begin(self, batch: DeviceBatch, last_tokens: torch.Tensor) -> None:
        """Take the tokens that only the device knows from `last_tokens` [slots], embed all rows, and make what the
        layers share."""
        on_device = batch.token_ids_T == TOKEN_ON_DEVICE
        batch.token_ids_T = torch.where(on_device, last_tokens[batch.slots_T], batch.token_ids_T)
        number = batch.host.program
        for op in self.graph.prologue:
            self._outer_kernels[op.name](self._outer_context(batch, batch.whole, op))
        for step in self._prepared[number]:
            op, context = self._context(batch, step)
            if context.part.has_rows(op.row_class):
                op.prepare(context, self._names[number, op.name, context.sms])

    def step(self, batch: DeviceBatch, index: int) -> None:
        """Run one step of the batch's program, if its nano-batch has rows for it."""
        number = batch.host.program
        op, context = self._context(batch, self.programs[number].steps[index])
        if context.part.has_rows(op.row_class):
            self._kernels[number, op.name, context.sms](context)

    def head(self, batch: DeviceBatch, rows: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of the dense batch's rows `rows` [S]: gathered, final norm, head. The next call overwrites
        them."""
        sampled, logits = self.buffers["sampled"], self.buffers["logits"]
        count = len(rows)
        torch.index_select(self.buffers[RESIDUAL], 0, rows, out=sampled[:count])
        part = cast(BatchPart, _RowsOnly(slice(0, count)))
        for op in self.graph.epilogue:
            self._outer_kernels[op.name](self._outer_context(batch, part, op))
        return logits[:count]

    def _outer_context(self, batch: DeviceBatch, part: BatchPart, op: Operation) -> NanoContext:
        weights = self.weights.outer.get(op.name, {})
        return NanoContext(batch, part, 0, self.buffers, weights, self.kv[0], communicator=self.communicator)

    def _context(self, batch: DeviceBatch, step: Step) -> tuple[Operation, NanoContext]:
        nano_op = step.nano_op
        weights: OpWeights = self.weights.layers[nano_op.layer]
        context = NanoContext(
            batch,
            batch.part(nano_op.nano_batch),
            nano_op.layer,
            self.buffers,
            weights.get(nano_op.op, {}),
            self.kv[nano_op.layer],
            self.sms(batch.host.program, step),
            step.lane,
            self._communicators.get((batch.host.program, nano_op.op, step.lane)),
            self._peers.get((batch.host.program, nano_op.op, step.lane)),
        )
        return self.graph.operation(nano_op.op), context

    def _twins(self, communicator: Communicator) -> dict[tuple[int, str, str], Communicator]:
        """What collectives reach the other ranks with, by program, operation and lane.

        Two lanes have two: one communicator's operations would wait for each other. All are made here, in an order that
        follows from the programs and so is the same on every rank.
        """
        made: dict[tuple[str, int | None], Communicator] = {}
        found = {}
        for number, program in enumerate(self.programs):
            for index in program.collectives:
                step = program.steps[index]
                name = step.nano_op.op
                if self._room(number, step, 1):
                    continue
                ctas = CTAS.get(self._names[number, name, self.sms(number, step)])
                if (step.lane, ctas) not in made:
                    twin = step.lane if ctas is None else f"{step.lane}-{ctas}"
                    # The first lane's can be that of the head, which runs when all lanes are done.
                    first = not made and ctas is None
                    made[step.lane, ctas] = communicator if first else communicator.twin(twin, ctas)
                found[number, name, step.lane] = made[step.lane, ctas]
        return found

    def _peer_memory(self, communicator: Communicator, dtype: torch.dtype) -> dict[tuple[int, str, str], PeerMemory]:
        """Where the collectives of forms that need it meet, by program, operation and lane.

        A lane has one for each form: the flags of one form do not guard another's data. The programs share them.
        """
        users: dict[tuple[str, str], list[tuple[int, str, int]]] = {}
        for number, program in enumerate(self.programs):
            for index in program.collectives:
                step = program.steps[index]
                room = self._room(number, step, dtype.itemsize)
                if room:
                    form = self._names[number, step.nano_op.op, self.sms(number, step)]
                    users.setdefault((step.lane, form), []).append((number, step.nano_op.op, room))
        found = {}
        for (lane, form), uses in users.items():
            try:
                memory = communicator.peer_memory(f"{lane}-{form}", max(room for _, _, room in uses))
            except PeerMemoryError as error:
                name = uses[0][1]
                can = [kernel for kernel in self.graph.operation(name).kernels if not self._needs_peers(name, kernel)]
                raise PlanError(
                    f"kernels.{name}: {form!r} cannot run here: {error}; what can: {', '.join(can)}"
                ) from error
            found.update({(number, name, lane): memory for number, name, _ in uses})
        return found

    def _room(self, number: int, step: Step, itemsize: int) -> int:
        """Bytes of peer memory that a step of program `number` needs; 0 if its kernel uses none."""
        nano_op, plan = step.nano_op, self.programs[number].plan
        op = self.graph.operation(nano_op.op)
        assert isinstance(op, Collective)
        rows = plan.rows if nano_op.nano_batch is None else plan.nano_batches[nano_op.nano_batch].rows
        return op.peer_room(self._names[number, op.name, self.sms(number, step)], rows, itemsize)

    def _needs_peers(self, name: str, kernel: str) -> bool:
        op = self.graph.operation(name)
        return isinstance(op, Collective) and op.peer_room(kernel, 1, 1) > 0


def make_caches(graph: Graph, kv: KVLayout, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """The KV cache of each layer of `graph`, zeroed: [pages, keys and values, heads, tokens of a page, head size]."""
    shape = (kv.pages, 2, graph.kv_heads, kv.page_size, graph.head_dim)
    return [_zeros(shape, dtype, device) for _ in range(graph.layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of `shape`. On a CPU only what is written takes memory: calloc's pages are the system's own zeros."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _kernel(op: Operation, plan: Plan, device: torch.device, dtype: torch.dtype, sms: int | None) -> str:
    """The kernel that the plan names for `op`, or the one that the device prefers."""
    name = plan.kernels.get(op.name) or op.preferred_kernel(device, dtype, sms)
    if name not in op.kernels:
        raise PlanError(f"kernels.{op.name}: {name!r} is unknown; {op.name} has {', '.join(op.kernels)}")
    return name
