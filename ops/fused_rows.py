"""Collectives over rows in one operation with what each rank does on its own rows between them.

`nanoflow.ops.row_sharding` makes them of a reduce-scatter, the residual sum and norm of the rank's rows, and an
all-gather, where these follow one another: all of them, the first two (behind the last product of a layer) or the last
two (before the first one). The values between them are in no buffer, so all that one rank waits for is the others'
bytes on the wire, once on the way there and once on the way back.

The bits are those of the operations one after the other: the sum over ranks is rounded before it is added to the
residual. ``push`` and the like are one kernel (`nanoflow.ops.fused_rows_triton`). With ``copy_engine`` bytes are moved
by copies between devices; of kernels there are some that wait, of one thread block, and one that sums and norms a
rank's rows. ``nccl`` runs the three operations in turn.

Shape legend: N ranks, T rows of a nano-batch, C rows of a share, E columns.
"""

import torch

from nanoflow.ops.collectives import LayerCollective
from nanoflow.ops.elementwise import Add
from nanoflow.ops.norm import AddNorm, Norm, RowNorm
from nanoflow.ops.operation import SCRATCH, Access, Cost, NanoContext, Weight, Work
from nanoflow.ops.own_rows import OwnRows
from nanoflow.ops.peer_all_reduce import whole_grains
from nanoflow.ops.peer_memory import PeerMemory
from nanoflow.ops.peer_rows import PUSH, ROW_FORMS, programs_of, scatter_room, send_rows, send_shares
from nanoflow.ops.row_collectives import ReduceScatter, RowsAllGather
from nanoflow.ops.row_shares import row_share, share_rows

__all__ = ["FusedRows"]


class FusedRows(LayerCollective):
    """`scatter` if there is one, then `own`, then `gather` if there is one; at least one of the two.

    `own` is on the rank's rows and adds what `scatter` summed up (Add, AddNorm) or is a Norm; `gather` is of what it
    normed. Its weights are those of `own`, by that name (`weights_of`).
    """

    peer_suffix = "-fused"
    peer_forms = ROW_FORMS

    def __init__(self, name: str, scatter: ReduceScatter | None, own: OwnRows, gather: RowsAllGather | None) -> None:
        super().__init__(name, own.ranks)
        self.scatter = scatter
        self.own = own
        self.gather = gather
        op = own.op
        if not isinstance(op, Add | AddNorm if scatter else Norm) or isinstance(op, Add) is not (gather is None):
            raise TypeError(f"{name} cannot be made of {scatter}, {own} and {gather}")
        self.residual = op.source if isinstance(op, Norm) else op.residual
        self.eps = 0.0 if isinstance(op, Add) else op.eps if isinstance(op, Norm) else op.norm.eps
        self.parts = tuple(part for part in (scatter, own, gather) if part is not None)

    @property
    def weights_of(self) -> str:
        return self.own.name

    @property
    def accesses(self) -> tuple[Access, ...]:
        """Of all parts; scratch memory as `AllReduce` has it."""
        found = [access for part in self.parts for access in part.accesses if access.buffer != SCRATCH]
        return (*dict.fromkeys(found), Access(SCRATCH, write=True))

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.own.weights

    def peer_room(self, kernel: str, rows: int, itemsize: int) -> int | None:
        if kernel not in ROW_FORMS:
            return None
        return scatter_room(kernel, rows, self.scatter.columns, self.ranks, itemsize) if self.scatter else 0

    def peer_buffer(self, kernel: str) -> str | None:
        return self.gather.buffer if self.gather and kernel in ROW_FORMS else None

    def cost(self, work: Work, itemsize: int) -> Cost:
        """What its parts take, but for values that stay in registers: a sum of partial sums, and normed rows that are
        sent."""
        total = Cost()
        for part in self.parts:
            total = total + part.cost(work, itemsize)
        sent = 0.0 if self.gather is None else self.gather.sent(work, itemsize)
        summed = 0.0
        if self.scatter is not None:
            summed = float(share_rows(work.rows, self.ranks) * self.scatter.columns * itemsize)
        return Cost(total.flops, total.bytes - sent - summed, total.wire_bytes)

    def ways(self, kernel: str) -> int:
        return (self.scatter is not None) + (self.gather is not None)

    def reference(self, context: NanoContext) -> None:
        for part in self.parts:
            part.reference(context)

    def nccl(self, context: NanoContext) -> None:
        """With the library's collectives, and what the device prefers between them."""
        residual = context.rows(self.residual)
        kernel = self.own.preferred_kernel(residual.device, residual.dtype, context.sms)
        for part in self.parts:
            part.kernels[kernel if part is self.own else "nccl"](context)

    def among_peers(self, form: str, context: NanoContext) -> None:
        peers = self.peers(context)
        places = None if self.gather is None else self.places(context, form)
        itemsize = context.buffers[self.residual].element_size()
        for rows in context.part.nano_batch_rows:
            count = rows.stop - rows.start
            peers.check_room(self.peer_room(form, count, itemsize) or 0, f"{self.name} by {form} of {count} rows")
            if form in PUSH:
                self._push(programs_of(form, context.sms), context, rows, peers, places)
            else:
                self._by_copies(context, rows, peers, places)

    def _push(
        self, programs: int, context: NanoContext, rows: slice, peers: PeerMemory, places: PeerMemory | None
    ) -> None:
        from nanoflow.ops.fused_rows_triton import fused_rows

        residual_TE, branch_TE, norm = self._tensors(context, rows)
        share = share_rows(len(residual_TE), self.ranks)
        stride = whole_grains(share * residual_TE.shape[1])
        fused_rows(residual_TE, branch_TE, norm, peers, share, stride, programs, first=rows.start, places=places)

    def _by_copies(self, context: NanoContext, rows: slice, peers: PeerMemory, places: PeerMemory | None) -> None:
        """The ranks meet once their parts have been sent, or before the first of them sends normed rows: what they had
        to read of the old ones they have read then."""
        from nanoflow.ops.all_reduce_triton import meet, wait_for_readers
        from nanoflow.ops.fused_rows_triton import own_rows

        own = row_share(rows, peers.rank, peers.size)
        residual_CE, branch_CE, norm = self._tensors(context, own)
        stride = whole_grains(share_rows(rows.stop - rows.start, self.ranks) * residual_CE.shape[1])
        if self.scatter is not None:
            wait_for_readers(peers)
            send_shares(context.buffers[self.scatter.buffer][rows], peers, stride)
        meet(peers)
        own_rows(residual_CE, branch_CE, norm, peers, stride)
        if norm is not None and places is not None:
            send_rows(norm.out_TE, own.start, peers, places)
            meet(peers)

    def _tensors(self, context: NanoContext, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None, RowNorm | None]:
        """These rows of the residual and of what is added to it, and how they are normed."""
        buffers, norm = context.buffers, None
        if self.gather is not None:
            norm = RowNorm(context.weights["weight"], self.eps, buffers[self.gather.buffer][rows])
        return buffers[self.residual][rows], buffers[self.scatter.buffer][rows] if self.scatter else None, norm
