"""Reduce-scatter and all-gather of rows, by ranks that reach each other's memory, in two forms.

- ``push``: own kernels. Every rank writes what another one needs straight to it; on 16 thread blocks, beside others'
  work, or on the lane's SMs. ``push_32``, ``push_64`` and ``push_128`` have so many where the lane is not confined.
- ``copy_engine``: the bytes are moved by copies between devices, which the copy engines do without an SM; of kernels
  there are some that wait, of one thread block, and one that adds.

Reduce-scatter: each rank writes the rows of another's share into a slot in that one's block, which adds up what has
arrived to its own, in rank order in float32: the same bits in both forms, those of the reference.

All-gather: each rank writes its rows into the other ranks' buffers of the value, to their places, so no one copies them
again. Those buffers are in memory that all ranks reach. A rank begins to write when all have come to the all-gather:
what they had to read of the old rows they have read then, since it writes those rows by its accesses.

`nanoflow.ops.rows_triton` has the kernels; flags, order and timeouts are those of `nanoflow.ops.all_reduce_triton`. Any
of them may be captured in a CUDA graph.

Shape legend: N ranks, T rows of a nano-batch, E columns.
"""

import torch

from nanoflow.ops.peer_all_reduce import UNCONFINED, whole_grains
from nanoflow.ops.peer_memory import PROGRAMS, PeerMemory
from nanoflow.ops.row_shares import row_share, share_rows

__all__ = [
    "PUSH",
    "ROW_FORMS",
    "gather_rows",
    "programs_of",
    "scatter_room",
    "scatter_sums",
    "send_rows",
    "send_shares",
]

PUSH = {"push": UNCONFINED, **{f"push_{programs}": programs for programs in (32, 64, 128)}}
"""Thread blocks of own kernels in a lane that is not confined, by the form's name."""
ROW_FORMS = ("copy_engine", *PUSH)


def scatter_room(form: str, rows: int, columns: int, ranks: int, itemsize: int) -> int:
    """Bytes of data in each rank's block that a reduce-scatter of up to so many rows needs: a slot for each rank, and
    of ``push`` two, in turns."""
    slots = ranks * whole_grains(share_rows(rows, ranks) * columns)
    return slots * itemsize * (2 if form in PUSH else 1)


def scatter_sums(form: str, x_TE: torch.Tensor, peers: PeerMemory, sms: int | None) -> None:
    """Put the sum over the ranks of this rank's share of the rows in the place of its own; the other rows are left as
    they are.

    All ranks call it with the same form, shape, type and SMs (None: the lane is not confined); a `peers` serves one
    form of reduce-scatters.
    """
    from nanoflow.ops import rows_triton
    from nanoflow.ops.all_reduce_triton import add_arrived, meet, wait_for_readers

    rows, columns = x_TE.shape
    peers.check_room(scatter_room(form, rows, columns, peers.size, x_TE.element_size()), f"{form} of {rows} rows")
    share = share_rows(rows, peers.size) * columns
    stride = whole_grains(share)
    if form in PUSH:
        rows_triton.reduce_scatter(x_TE.view(-1), peers, share, stride, programs_of(form, sms))
        return
    wait_for_readers(peers)
    send_shares(x_TE, peers, stride)
    meet(peers)
    own = x_TE[row_share(slice(0, rows), peers.rank, peers.size)]
    add_arrived(own.view(-1), peers, stride, tell=True)


def gather_rows(
    form: str, x_TE: torch.Tensor, first: int, peers: PeerMemory, places: PeerMemory, sms: int | None
) -> None:
    """Write this rank's share of the rows to where the other ranks have them, and wait for theirs.

    All ranks call it as they do `scatter_sums`; a `peers` serves one form of all-gathers.

    Args:
        x_TE: of a buffer that is this rank's data of `places`.
        first: its first row in that buffer, the same on all ranks.
    """
    from nanoflow.ops import rows_triton
    from nanoflow.ops.all_reduce_triton import meet

    rows, columns = x_TE.shape
    if form in PUSH:
        share = share_rows(rows, peers.size) * columns
        rows_triton.all_gather(x_TE.view(-1), first * columns, peers, places, share, programs_of(form, sms))
        return
    own = row_share(slice(0, rows), peers.rank, peers.size)
    meet(peers)
    send_rows(x_TE[own], first + own.start, peers, places)
    meet(peers)


def send_shares(x_TE: torch.Tensor, peers: PeerMemory, stride: int) -> None:
    """Copy the rows of each other rank's share into this rank's slot in that one's block, in slots of `stride`
    elements."""
    for other in _others(peers):
        theirs = x_TE[row_share(slice(0, len(x_TE)), other, peers.size)].view(-1)
        if theirs.numel():
            slot = peers.rank * stride * x_TE.element_size()
            peers.data(other, slot, theirs.numel(), x_TE.dtype).copy_(theirs)


def send_rows(x_CE: torch.Tensor, first: int, peers: PeerMemory, places: PeerMemory) -> None:
    """Copy rows to where the other ranks have them in their buffers, from row `first` on."""
    if x_CE.numel():
        for other in _others(peers):
            at = first * x_CE.shape[1] * x_CE.element_size()
            places.data(other, at, x_CE.numel(), x_CE.dtype).copy_(x_CE.view(-1))


def programs_of(form: str, sms: int | None) -> int:
    """The most thread blocks of a form of `PUSH` in a lane of so many SMs (None: it is not confined)."""
    return min(PUSH[form] if sms is None else sms, PROGRAMS)


def _others(peers: PeerMemory) -> list[int]:
    """The other ranks, not all beginning with the same one."""
    return [(peers.rank + step) % peers.size for step in range(1, peers.size)]
