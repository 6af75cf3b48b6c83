"""Programs bound to a device: their weights, buffers, KV cache and kernels, and how each of their pieces is run.

An iteration is `begin`, then every step of the program that its batch is laid out for, then `head` over the rows to
sample. Which step comes when, on which stream, and whether it is launched or replayed is the executor's matter.

All programs are of one model and share weights, KV cache and buffers: they run one after the other. Their graphs may
have different shardings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from nanoflow.ops.batch import TOKEN_ON_DEVICE, DenseBatch
from nanoflow.ops.collectives import CTAS, Collective
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.device_batch import BatchPart, DeviceBatch, RowsOnly
from nanoflow.ops.graph import RESIDUAL, Graph
from nanoflow.ops.operation import Kernel, NanoContext, Operation, interpreting
from nanoflow.ops.peer_memory import PeerMemory, PeerMemoryError
from nanoflow.ops.row_sharding import SCATTERED
from nanoflow.ops.row_shares import own_rows
from nanoflow.pipeline.buffers import BufferSpec, assign_buffers
from nanoflow.pipeline.executor import KVLayout, OpWeights, Weights
from nanoflow.pipeline.plan import Plan, PlanError
from nanoflow.pipeline.program import Program, Step

__all__ = ["BoundPrograms", "make_caches"]


_Key = tuple[int, str, int | None, int | None]
"""Program, operation, nano-batch (None: all rows), and SMs of the lane."""
_Place = tuple[int, str, int | None, str]
"""Program, operation, nano-batch, and lane."""


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
        self.heads = tuple(_same_head(programs))
        self.weights = weights
        self.device = device
        self.kv_layout = kv
        self.sampled_rows = sampled_rows
        self.communicator = communicator
        self._confined = confined
        self._outer_kernels: dict[tuple[int, str], Kernel] = {}
        self._kernels: dict[_Key, Kernel] = {}
        self._names: dict[_Key, str] = {}
        self._prepared: list[list[Step]] = []
        for number, program in enumerate(programs):
            for op in (*program.graph.prologue, *program.graph.epilogue):
                name = _kernel(op, None, programs[self.heads[number]].plan, device, dtype, None)
                self._outer_kernels[number, op.name] = op.kernels[name]
            first: dict[tuple[str, int | None], Step] = {}
            for step in program.steps:
                first.setdefault((step.nano_op.op, step.nano_op.nano_batch), step)
            self._prepared.append(list(first.values()))
            for step in first.values():
                op, key = program.graph.operation(step.nano_op.op), self._key(number, step)
                name = _kernel(op, step.nano_op.nano_batch, program.plan, device, dtype, key[-1])
                self._names[key], self._kernels[key] = name, op.kernels[name]
        self._communicators = {} if communicator is None else self._twins(communicator)
        self._peers: dict[_Place, PeerMemory] = {}
        """Where collectives meet."""
        self._places: dict[str, PeerMemory] = {}
        """Buffers that all ranks reach, by the value."""
        self.buffers: dict[str, torch.Tensor] = {}
        specs = _specs(programs, sampled_rows)
        try:
            if communicator is not None:
                self._meet(communicator, dtype)
                self._share_buffers(communicator, specs, dtype)
            for name, spec in specs.items():
                if name not in self.buffers:
                    self.buffers[name] = torch.zeros(spec.rows, spec.columns, dtype=dtype, device=device)
            self.kv = make_caches(graph, kv, dtype, device) if caches is None else list(caches)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give back what the ranks have in common of their memory; nothing runs any more, and graphs are gone."""
        for name in self._places:
            self.buffers.pop(name, None)
        for memory in dict.fromkeys((*self._peers.values(), *self._places.values())):
            memory.close()
        self._peers.clear()
        self._places.clear()

    def sms(self, program: int, step: Step) -> int | None:
        """SMs that a step of a program has; None if its lane is not confined."""
        return self.programs[program].plan.lane_sms(step.stage, step.lane) if self._confined else None

    def begin(self, batch: DeviceBatch, last_tokens: torch.Tensor) -> None:
        """Take the tokens that only the device knows from `last_tokens` [slots], embed all rows, and make what the
        layers share."""
        on_device = batch.token_ids_T == TOKEN_ON_DEVICE
        batch.token_ids_T = torch.where(on_device, last_tokens[batch.slots_T], batch.token_ids_T)
        number = batch.host.program
        for op in self.programs[number].graph.prologue:
            self._outer_kernels[number, op.name](self._outer_context(batch, batch.whole, op))
        for step in self._prepared[number]:
            op, context = self._context(batch, step)
            if context.part.has_rows(op.row_class):
                op.prepare(context, self._names[self._key(number, step)])

    def step(self, batch: DeviceBatch, index: int) -> None:
        """Run one step of the batch's program, if its nano-batch has rows for it."""
        number = batch.host.program
        step = self.programs[number].steps[index]
        op, context = self._context(batch, step)
        if context.part.has_rows(op.row_class):
            self._kernels[self._key(number, step)](context)

    def own(self, host: DenseBatch) -> NDArray[np.bool_]:
        """[T] whether a row of the residual is this rank's behind the last layer: all are, unless ranks divide them."""
        graph = self.programs[host.program].graph
        if graph.sharding not in SCATTERED:
            return np.ones(host.rows, np.bool_)
        return own_rows(host.nano_batches, graph.rank, graph.ranks)

    def sampled(self, batch: DeviceBatch) -> torch.Tensor:
        """[S] int64, the rows to sample as `head` takes them; a static tensor goes on beyond them.

        Where ranks have divided the residual's rows, a row of zeros stands for what is another rank's.
        """
        if self.programs[batch.host.program].graph.sharding not in SCATTERED:
            return batch.sampled_rows_S
        nothing = len(self.buffers[RESIDUAL]) - 1

        def make(part: BatchPart) -> NDArray[np.int64]:
            host = part.batch.host
            if host.sampling is None:
                return np.zeros(0, np.int64)
            rows = host.sampling.rows.astype(np.int64)
            return np.where(self.own(host)[rows], rows, nothing)

        return batch.whole.from_host("own_sampled_rows", make, (batch.host.rows,))

    def head(self, batch: DeviceBatch, rows: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of `rows` [S] as `sampled` gives them: gathered, final norm, head. The next call overwrites
        them."""
        number = batch.host.program
        sampled, logits = self.buffers["sampled"], self.buffers["logits"]
        count = len(rows)
        torch.index_select(self.buffers[RESIDUAL], 0, rows, out=sampled[:count])
        part = cast(BatchPart, RowsOnly(slice(0, count)))
        for op in self.programs[number].graph.epilogue:
            self._outer_kernels[number, op.name](self._outer_context(batch, part, op))
        return logits[:count]

    def _outer_context(self, batch: DeviceBatch, part: BatchPart, op: Operation) -> NanoContext:
        weights = self.weights.outer.get(op.name, {})
        return NanoContext(batch, part, 0, self.buffers, weights, self.kv[0], communicator=self.communicator)

    def _context(self, batch: DeviceBatch, step: Step) -> tuple[Operation, NanoContext]:
        nano_op, number = step.nano_op, batch.host.program
        op = self.programs[number].graph.operation(nano_op.op)
        weights: OpWeights = self.weights.layers[nano_op.layer]
        key, place = self._key(number, step), _place(number, step)
        shared = op.peer_buffer(self._names[key]) if isinstance(op, Collective) else None
        context = NanoContext(
            batch,
            batch.part(nano_op.nano_batch),
            nano_op.layer,
            self.buffers,
            weights.get(op.weights_of, {}),
            self.kv[nano_op.layer],
            key[-1],
            step.lane,
            self._communicators.get(place),
            self._peers.get(place),
            None if shared is None else self._places[shared],
        )
        return op, context

    def _key(self, number: int, step: Step) -> _Key:
        return number, step.nano_op.op, step.nano_op.nano_batch, self.sms(number, step)

    def _twins(self, communicator: Communicator) -> dict[_Place, Communicator]:
        """What collectives reach the other ranks with.

        Two lanes have two: one communicator's operations would wait for each other. All are made here, in an order that
        follows from the programs and so is the same on every rank.
        """
        made: dict[tuple[str, int | None], Communicator] = {}
        found = {}
        for number, program in enumerate(self.programs):
            for index in program.collectives:
                step = program.steps[index]
                if self._room(number, step, 1) is not None:
                    continue
                ctas = CTAS.get(self._names[self._key(number, step)])
                if (step.lane, ctas) not in made:
                    twin = step.lane if ctas is None else f"{step.lane}-{ctas}"
                    # The first lane's can be that of the head, which runs when all lanes are done.
                    first = not made and ctas is None
                    made[step.lane, ctas] = communicator if first else communicator.twin(twin, ctas)
                found[_place(number, step)] = made[step.lane, ctas]
        return found

    def _meet(self, communicator: Communicator, dtype: torch.dtype) -> None:
        """Make what the collectives of forms that need it meet in.

        A lane has one for each form: the flags of one form do not guard another's data. The programs share them.
        """
        users: dict[str, list[tuple[int, Step, int]]] = {}
        for number, program in enumerate(self.programs):
            for index in program.collectives:
                step = program.steps[index]
                room = self._room(number, step, dtype.itemsize)
                if room is not None:
                    op, form = self._collective(number, step)
                    name = f"{step.lane}-{form}{op.peer_suffix}"
                    users.setdefault(name, []).append((number, step, room))
        for name, uses in users.items():
            memory = self._peer_memory(communicator, name, max(room for *_, room in uses), *uses[0][:2])
            self._peers.update({_place(number, step): memory for number, step, _ in uses})

    def _share_buffers(self, communicator: Communicator, specs: Mapping[str, BufferSpec], dtype: torch.dtype) -> None:
        """Make the buffers that all ranks reach."""
        for number, program in enumerate(self.programs):
            for index in program.collectives:
                step = program.steps[index]
                op, form = self._collective(number, step)
                value = op.peer_buffer(form)
                if value is not None and value not in self._places:
                    rows, columns = specs[value].rows, specs[value].columns
                    size = rows * columns * dtype.itemsize
                    memory = self._peer_memory(communicator, f"buffer-{value}", size, number, step)
                    self._places[value] = memory
                    self.buffers[value] = memory.data(communicator.rank, 0, rows * columns, dtype).view(rows, columns)

    def _peer_memory(self, communicator: Communicator, name: str, room: int, number: int, step: Step) -> PeerMemory:
        """Memory that a step of program `number` asks for. Raises PlanError where it cannot be had."""
        try:
            return communicator.peer_memory(name, room)
        except PeerMemoryError as error:
            collective, form = self._collective(number, step)
            key = self.programs[number].plan.kernel_key(collective.name, step.nano_op.nano_batch)
            can = [kernel for kernel in collective.kernels if collective.peer_room(kernel, 1, 1) is None]
            raise PlanError(f"kernels.{key}: {form!r} cannot run here: {error}; what can: {', '.join(can)}") from error

    def _collective(self, number: int, step: Step) -> tuple[Collective, str]:
        """A collective of program `number`, and its kernel."""
        op = self.programs[number].graph.operation(step.nano_op.op)
        assert isinstance(op, Collective)
        return op, self._names[self._key(number, step)]

    def _room(self, number: int, step: Step, itemsize: int) -> int | None:
        """Bytes of peer memory that a step of program `number` needs; None if its kernel uses none."""
        plan, nano_batch = self.programs[number].plan, step.nano_op.nano_batch
        op, form = self._collective(number, step)
        return op.peer_room(form, plan.rows if nano_batch is None else plan.nano_batches[nano_batch].rows, itemsize)


def _same_head(programs: Sequence[Program]) -> Iterator[int]:
    """For each program the first one whose head is the same, which it is for one sharding."""
    first: dict[str, int] = {}
    for number, program in enumerate(programs):
        yield first.setdefault(program.graph.sharding, number)


def _specs(programs: Sequence[Program], sampled_rows: int) -> dict[str, BufferSpec]:
    """Buffers with room for each of the programs; behind the residual's rows one of zeros, which nothing writes, where
    a program divides them among ranks."""
    found: dict[str, BufferSpec] = {}
    for program in programs:
        for name, spec in assign_buffers(program.graph, program.plan, sampled_rows).items():
            rows = max(spec.rows, found[name].rows) if name in found else spec.rows
            found[name] = BufferSpec(spec.columns, rows)
    if any(program.graph.sharding in SCATTERED for program in programs):
        found[RESIDUAL] = replace(found[RESIDUAL], rows=found[RESIDUAL].rows + 1)
    return found


def make_caches(graph: Graph, kv: KVLayout, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """The KV cache of each layer of `graph`, zeroed: [pages, keys and values, heads, tokens of a page, head size]."""
    shape = (kv.pages, 2, graph.kv_heads, kv.page_size, graph.head_dim)
    return [_zeros(shape, dtype, device) for _ in range(graph.layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of `shape`. On a CPU only what is written takes memory: calloc's pages are the system's own zeros."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _place(number: int, step: Step) -> _Place:
    return number, step.nano_op.op, step.nano_op.nano_batch, step.lane


def _kernel(
    op: Operation, nano_batch: int | None, plan: Plan, device: torch.device, dtype: torch.dtype, sms: int | None
) -> str:
    """The kernel that the plan names for `op` on a nano-batch, or the one that the device prefers."""
    name = plan.kernel(op.name, nano_batch)
    if not name:
        return op.preferred_kernel(device, dtype, sms)
    key = plan.kernel_key(op.name, nano_batch)
    if name not in op.kernels:
        raise PlanError(f"kernels.{key}: {name!r} is unknown; {op.name} has {', '.join(op.kernels)}")
    if device.type == "cpu" and name not in op.cpu_kernels and not interpreting():
        can = ", ".join(op.cpu_kernels)
        raise PlanError(f"kernels.{key}: {name!r} cannot run on {device}: it needs a GPU; what can: {can}")
    return name
