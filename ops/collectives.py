"""Collectives: operations in which all ranks of tensor parallelism take part.

`AllReduce` adds up the partial sums that a linear split by input rows leaves on each rank; `AllGather` puts the columns
of a linear split by output columns side by side, where they are needed whole (the logits).

The slow reference gathers what all ranks have and adds it in float32 or wider, in rank order: every rank computes the
same bits. Kernels of a library add in their own order, also the same on all ranks. Forms that meet in memory which all
ranks reach (`nanoflow.ops.peer_all_reduce`, `peer_columns`) give the reference's bits. NCCL is what a GPU runs if a
plan names nothing else: docs/parallel.md says which form is faster where.

Formulas, for N ranks and a buffer of B bytes (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for
clusters of workstations"): a ring all-reduce is a reduce-scatter and an all-gather, in each of which a rank sends
(N - 1) / N of the buffer, so 2 (N - 1) / N * B bytes leave each rank, and a two-shot all-reduce sends as much (a
one-shot one (N - 1) * B: as much for two ranks). An all-gather sends (N - 1) / N of what is gathered. Two all-reduces
a layer give the paper's 4 (N - 1) / N * rows * hidden size * element size.

Shape legend: N ranks, T rows, S sampled rows, E columns, C columns of a rank's share, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch

from nanoflow.ops.communicator import Communicator
from nanoflow.ops.operation import SCRATCH, Access, Cost, Kernel, NanoContext, Operation, Work
from nanoflow.ops.peer_all_reduce import PEER_FORMS, peer_all_reduce, peer_room
from nanoflow.ops.peer_columns import COLUMN_FORMS, gather_columns
from nanoflow.ops.peer_memory import PeerMemory, data_begin
from nanoflow.ops.peer_rows import PUSH

__all__ = [
    "CTAS",
    "AllGather",
    "AllReduce",
    "Collective",
    "CollectiveInPlace",
    "LayerAllGather",
    "LayerCollective",
    "add_in_order",
    "sum_in_rank_order",
]

CTAS = {f"nccl_{count}": count for count in (2, 4, 8, 16)}
"""Collectives with NCCL on at most so many thread blocks, by the kernel's name: products beside them lose no more SMs
than that. By itself NCCL takes what it likes."""


class Collective(Operation):
    """An operation that every rank runs, on the same rows, in one order with the other collectives of its communicator.

    That order is the one of the program's steps, in which a GPU's executor launches and the reference executor runs
    them, whatever else it draws: so the ranks meet even if all else is in another order on each.
    """

    resource = "network"
    peer_suffix: ClassVar[str] = ""
    """Of the name of its peer memory: collectives whose forms use flags otherwise have memories of their own."""

    def __init__(self, name: str, ranks: int) -> None:
        super().__init__(name)
        self.ranks = ranks

    def communicator(self, context: NanoContext) -> Communicator:
        """That of the context, which must be there and have as many ranks."""
        found = context.communicator
        if found is None or found.size != self.ranks:
            have = "none" if found is None else f"one of {found.size}"
            raise ValueError(f"{self.name} needs a communicator of {self.ranks} ranks, and the executor has {have}")
        return found

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "nccl": self.nccl}

    @property
    def cpu_kernels(self) -> tuple[str, ...]:
        """All: whether ranks have memory in common, which some need, is the communicator's matter."""
        return tuple(self.kernels)

    def nccl(self, context: NanoContext) -> None:
        """With the collective of the communicator's library: NCCL on a GPU."""
        raise NotImplementedError

    def peer_room(self, kernel: str, rows: int, itemsize: int) -> int | None:
        """Bytes of data in each rank's block of peer memory that `kernel` needs for `rows` rows; None: it uses none."""
        return None

    def peer_buffer(self, kernel: str) -> str | None:
        """The value whose buffers all ranks must reach for `kernel`, if there is one."""
        return None

    def peers(self, context: NanoContext) -> PeerMemory:
        """That of the context, which must be there and of as many ranks."""
        found = context.peers
        if found is None or found.size != self.ranks:
            have = "none" if found is None else f"that of {found.size}"
            raise ValueError(f"{self.name} needs memory in common of {self.ranks} ranks, and the executor has {have}")
        return found

    def places(self, context: NanoContext, kernel: str) -> PeerMemory:
        """All ranks' buffers of `peer_buffer`: those of the context, which must be there."""
        if context.places is None:
            value = self.peer_buffer(kernel)
            raise ValueError(f"{self.name} needs {value} in memory that all ranks reach, and it is in none")
        return context.places

    def cost_with(self, kernel: str, work: Work, itemsize: int) -> Cost:
        """What `work` takes with `kernel`, where that sends more than others do; empty: the preferred one."""
        return self.cost(work, itemsize)

    def ways(self, kernel: str) -> int:
        """How many times bytes go from rank to rank, each after the others' have come: 1 or 2."""
        return 1

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return "nccl" if device.type == "cuda" else "reference"


class LayerCollective(Collective):
    """One in a layer, where each number of thread blocks has a communicator of its own, and some forms meet in memory
    that all ranks reach.

    What other ranks send may arrive there (`peer_room`). Like scratch memory, each lane has its own: the lane's order
    keeps its users apart on this rank, and the forms' flags on the others.
    """

    peer_forms: ClassVar[tuple[str, ...]]
    """Kernels that meet in such memory."""

    def among_peers(self, form: str, context: NanoContext) -> None:
        """With one of `peer_forms`."""
        raise NotImplementedError

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """How many thread blocks NCCL takes is its communicator's matter: `BoundPrograms` makes one for each number,
        and the memory that forms meet in."""
        forms = {form: partial(self.among_peers, form) for form in self.peer_forms}
        return {**super().kernels, **dict.fromkeys(CTAS, self.nccl), **forms}

    def scratch_bytes(self, rows: int, sms: int) -> int:
        """Of the form that needs most, counters and flags included, for elements of 4 bytes."""
        return data_begin(self.ranks) + max(self.peer_room(form, rows, 4) or 0 for form in self.peer_forms)


class CollectiveInPlace(LayerCollective):
    """One on the rows of one value, in its place."""

    def __init__(self, name: str, buffer: str, columns: int, ranks: int) -> None:
        super().__init__(name, ranks)
        self.buffer = buffer
        self.columns = columns

    @property
    def accesses(self) -> tuple[Access, ...]:
        """Whole rows, also where a rank reads or writes only a share of them."""
        return (Access(self.buffer), Access(self.buffer, write=True), Access(SCRATCH, write=True))


class AllReduce(CollectiveInPlace):
    """``buffer = sum of all ranks' buffer``; see `nanoflow.ops.peer_all_reduce` for its forms."""

    peer_forms = PEER_FORMS

    def peer_room(self, kernel: str, rows: int, itemsize: int) -> int | None:
        return peer_room(kernel, rows * self.columns, self.ranks, itemsize) if kernel in PEER_FORMS else None

    def cost(self, work: Work, itemsize: int) -> Cost:
        """Wire bytes are those that a rank sends; in memory it reads what it sends and writes what it gets."""
        elements = work.rows * self.columns
        sent = 2.0 * (self.ranks - 1) / self.ranks * elements * itemsize
        return Cost(flops=float((self.ranks - 1) * elements) / self.ranks, bytes=2 * sent, wire_bytes=sent)

    def cost_with(self, kernel: str, work: Work, itemsize: int) -> Cost:
        """In one shot a rank sends all it has to all others, and adds all that it gets."""
        if kernel != "one_shot":
            return self.cost(work, itemsize)
        others = float((self.ranks - 1) * work.rows * self.columns)
        return Cost(flops=others, bytes=2 * others * itemsize, wire_bytes=others * itemsize)

    def ways(self, kernel: str) -> int:
        return 1 if kernel == "one_shot" else 2

    def reference(self, context: NanoContext) -> None:
        sum_in_rank_order(self.communicator(context), context.rows(self.buffer))

    def nccl(self, context: NanoContext) -> None:
        self.communicator(context).all_reduce(context.rows(self.buffer))

    def among_peers(self, form: str, context: NanoContext) -> None:
        peer_all_reduce(form, context.rows(self.buffer), self.peers(context), context.sms)


class AllGather(Collective):
    """``target[:, r * C : (r + 1) * C] = rank r's source``, cut after the target's columns.

    `gathered` is where the shares arrive, one rank's after the other: a value of N * C columns that nothing else uses,
    of which a nano-batch has its own rows.
    """

    def __init__(
        self, name: str, source: str, gathered: str, target: str, share: int, columns: int, ranks: int
    ) -> None:
        """`share` columns of a rank's source (C), `columns` of the target: at most N * C."""
        super().__init__(name, ranks)
        self.source = source
        self.gathered = gathered
        self.target = target
        self.share = share
        self.columns = columns

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.source), Access(self.gathered, write=True), Access(self.target, write=True))

    def cost(self, work: Work, itemsize: int) -> Cost:
        """Wire bytes are those that a rank sends; the shares are written when they arrive, and copied side by side."""
        share = float(work.rows * self.share * itemsize)
        sent = (self.ranks - 1) * share
        return Cost(bytes=2 * sent + 2 * self.ranks * share, wire_bytes=sent)

    def reference(self, context: NanoContext) -> None:
        source_SC, target_SV = context.rows(self.source), context.rows(self.target)
        rows = source_SC.shape[0]
        gathered_NSC = context.rows(self.gathered).view(self.ranks, rows, self.share)
        self.communicator(context).all_gather(source_SC, gathered_NSC)
        for rank in range(self.ranks):
            begin, end = rank * self.share, min((rank + 1) * self.share, self.columns)
            if begin < end:
                target_SV[:, begin:end] = gathered_NSC[rank, :, : end - begin]

    def nccl(self, context: NanoContext) -> None:
        self.reference(context)


class LayerAllGather(LayerCollective, AllGather):
    """One in a layer, of all columns that the ranks have; see `nanoflow.ops.peer_columns` for its forms."""

    peer_suffix = "-columns"
    peer_forms = COLUMN_FORMS

    def __init__(self, name: str, source: str, gathered: str, target: str, share: int, ranks: int) -> None:
        super().__init__(name, source, gathered, target, share, ranks * share, ranks)

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (*super().accesses, Access(SCRATCH, write=True))

    def peer_room(self, kernel: str, rows: int, itemsize: int) -> int | None:
        """None but for flags: shares are written into the other ranks' buffers."""
        return 0 if kernel in COLUMN_FORMS else None

    def peer_buffer(self, kernel: str) -> str | None:
        if kernel not in COLUMN_FORMS:
            return None
        return self.gathered if kernel == "copy_engine" else self.target

    def cost_with(self, kernel: str, work: Work, itemsize: int) -> Cost:
        """Pushed, a share is read once, and written to its place on every rank."""
        if kernel not in PUSH:
            return self.cost(work, itemsize)
        share = float(work.rows * self.share * itemsize)
        return Cost(bytes=(self.ranks + 1) * share, wire_bytes=(self.ranks - 1) * share)

    def among_peers(self, form: str, context: NanoContext) -> None:
        source_TC, gathered, target = map(context.rows, (self.source, self.gathered, self.target))
        peers, places = self.peers(context), self.places(context, form)
        gather_columns(form, source_TC, gathered, target, context.part.rows.start, peers, places, context.sms)


def sum_in_rank_order(communicator: Communicator, tensor: torch.Tensor) -> None:
    """Put the sum of all ranks' `tensor` (contiguous) in its place: rank 0's plus rank 1's and so on, in float32 or
    wider, rounded once at the end."""
    parts = tensor.new_empty(communicator.size, *tensor.shape)
    communicator.all_gather(tensor, parts)
    tensor.copy_(add_in_order(parts))


def add_in_order(parts: torch.Tensor) -> torch.Tensor:
    """The sum of `parts` [N, ...] in rank order, in float32 or wider: the caller rounds it, once."""
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total
