"""Collectives over rows: a reduce-scatter that leaves each rank the sums of its own rows, and the all-gather that puts
all ranks' rows together again.

Together they are an all-reduce with something in between, which each rank does on its own rows alone
(Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198: sequence
parallelism). Both work in place, on a nano-batch's rows at a time, of which each rank has a share
(`nanoflow.ops.row_shares`): an operation that a plan leaves whole goes through the nano-batches one after the other.

For N ranks and B bytes a rank sends (N - 1) / N * B in either, in the mean over the ranks where shares are uneven: half
of what an all-reduce sends. The reference adds in float32 or wider, in rank order; the forms that meet in memory of all
ranks (`nanoflow.ops.peer_rows`) give its bits, a library adds in an order of its own.

Shape legend: N ranks, T rows of a nano-batch, C rows of a share, E columns.
"""

from collections.abc import Callable, Mapping

import torch

from nanoflow.ops.collectives import AllReduce, CollectiveInPlace, add_in_order
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.operation import Cost, Kernel, NanoContext, Work
from nanoflow.ops.peer_rows import ROW_FORMS, gather_rows, scatter_room, scatter_sums
from nanoflow.ops.row_shares import row_share, share_rows

__all__ = ["ReduceScatter", "RowsAllGather", "SampledSum"]

OnRows = Callable[[Communicator, torch.Tensor], None]


class _RowCollective(CollectiveInPlace):
    """A collective on the rows of one value, a nano-batch at a time; see `nanoflow.ops.peer_rows` for its forms."""

    peer_forms = ROW_FORMS

    def sent(self, work: Work, itemsize: int) -> float:
        """Bytes that a rank sends, in the mean over the ranks."""
        return (self.ranks - 1) / self.ranks * work.rows * self.columns * itemsize

    def on_each(self, context: NanoContext, function: OnRows) -> None:
        """`function` of the communicator and [T, E] of every nano-batch that has rows."""
        communicator = self.communicator(context)
        for rows in context.part.nano_batch_rows:
            function(communicator, context.buffers[self.buffer][rows])


class ReduceScatter(_RowCollective):
    """``buffer[own rows] = sum of all ranks' buffer[own rows]``; what the other rows hold then is no one's."""

    peer_suffix = "-scatter"

    def peer_room(self, kernel: str, rows: int, itemsize: int) -> int | None:
        return scatter_room(kernel, rows, self.columns, self.ranks, itemsize) if kernel in ROW_FORMS else None

    def cost(self, work: Work, itemsize: int) -> Cost:
        """In memory a rank reads what it sends and writes what it gets."""
        sent = self.sent(work, itemsize)
        return Cost(flops=sent / itemsize, bytes=2 * sent, wire_bytes=sent)

    def reference(self, context: NanoContext) -> None:
        def add(communicator: Communicator, x_TE: torch.Tensor) -> None:
            own = row_share(slice(0, len(x_TE)), communicator.rank, communicator.size)
            parts_NTE = x_TE.new_empty(communicator.size, *x_TE.shape)
            communicator.all_gather(x_TE, parts_NTE)
            x_TE[own] = add_in_order(parts_NTE[:, own])

        self.on_each(context, add)

    def nccl(self, context: NanoContext) -> None:
        def add(communicator: Communicator, x_TE: torch.Tensor) -> None:
            own = row_share(slice(0, len(x_TE)), communicator.rank, communicator.size)
            padded_NCE = _in_shares(x_TE, communicator.size)
            mine_CE = padded_NCE[communicator.rank]
            communicator.reduce_scatter(padded_NCE, mine_CE)
            if len(x_TE) % communicator.size:
                x_TE[own] = mine_CE[: own.stop - own.start]

        self.on_each(context, add)

    def among_peers(self, form: str, context: NanoContext) -> None:
        peers = self.peers(context)
        for rows in context.part.nano_batch_rows:
            scatter_sums(form, context.buffers[self.buffer][rows], peers, context.sms)


class RowsAllGather(_RowCollective):
    """``buffer[rank r's rows] = rank r's buffer[rank r's rows]`` of all ranks."""

    peer_suffix = "-gather"

    def peer_room(self, kernel: str, rows: int, itemsize: int) -> int | None:
        """None but for flags: rows are written to their places in the other ranks' buffers."""
        return 0 if kernel in ROW_FORMS else None

    def peer_buffer(self, kernel: str) -> str | None:
        return self.buffer if kernel in ROW_FORMS else None

    def cost(self, work: Work, itemsize: int) -> Cost:
        """In memory a rank reads what it sends and writes what it gets."""
        sent = self.sent(work, itemsize)
        return Cost(bytes=2 * sent, wire_bytes=sent)

    def reference(self, context: NanoContext) -> None:
        def gather(communicator: Communicator, x_TE: torch.Tensor) -> None:
            size, rows = communicator.size, slice(0, len(x_TE))
            parts_NTE = x_TE.new_empty(size, *x_TE.shape)
            communicator.all_gather(x_TE, parts_NTE)
            for rank in range(size):
                share = row_share(rows, rank, size)
                x_TE[share] = parts_NTE[rank, share]

        self.on_each(context, gather)

    def nccl(self, context: NanoContext) -> None:
        def gather(communicator: Communicator, x_TE: torch.Tensor) -> None:
            rows = len(x_TE)
            padded_NCE = _in_shares(x_TE, communicator.size)
            communicator.all_gather(padded_NCE[communicator.rank], padded_NCE)
            if rows % communicator.size:
                x_TE.copy_(padded_NCE.view(-1, self.columns)[:rows])

        self.on_each(context, gather)

    def among_peers(self, form: str, context: NanoContext) -> None:
        peers, places = self.peers(context), self.places(context, form)
        for rows in context.part.nano_batch_rows:
            gather_rows(form, context.buffers[self.buffer][rows], rows.start, peers, places, context.sms)


class SampledSum(AllReduce):
    """The sampled rows' hidden states, of which every rank has those of its own rows and zeros: the sum has them all,
    to the bit, whatever the order."""

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "nccl": self.nccl}


def _in_shares(x_TE: torch.Tensor, ranks: int) -> torch.Tensor:
    """[N, C, E]: `x_TE` itself where shares are even, else a copy with more rows, which hold anything."""
    rows, columns = x_TE.shape
    share = share_rows(rows, ranks)
    if rows == ranks * share:
        return x_TE.view(ranks, share, columns)
    padded = x_TE.new_empty(ranks * share, columns)
    padded[:rows] = x_TE
    return padded.view(ranks, share, columns)
