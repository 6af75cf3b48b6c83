"""All-reduces by ranks that reach each other's memory, in several forms.

- ``one_shot``: every rank writes all it has to all others and adds: one way between the ranks, N - 1 times the bytes.
- ``two_shot``: every rank adds up its share and sends the sum to all: two ways, 2 (N - 1) / N times the bytes.
- ``copy_engine``: the same, but the bytes are moved by copies between devices, which the copy engines do without an SM;
  of kernels there are one that waits, of one thread block, and one that adds. Two ranks send each other all they have:
  that is one way and as many bytes as two-shot's.

Sums are taken in rank order in float32: the same bits on all ranks and in all forms. Any of them may be captured in a
CUDA graph. `nanoflow.ops.all_reduce_triton` has the kernels and says why nothing is overwritten before it is read.
"""

import torch

from nanoflow.ops.peer_memory import PeerMemory

__all__ = ["PEER_FORMS", "UNCONFINED", "peer_all_reduce", "peer_room", "whole_grains"]

PEER_FORMS = ("copy_engine", "one_shot", "two_shot")
UNCONFINED = 16
"""Thread blocks of a form's own kernels in a lane that has no SMs of its own: few, beside others' products."""
GRAIN = 128
"""Shares and slots are multiples of so many elements, so that all accesses are 16 bytes wide."""


def peer_room(form: str, elements: int, ranks: int, itemsize: int) -> int:
    """Bytes of data in each rank's block that `form` needs for up to so many elements."""
    if form == "one_shot" or (form == "copy_engine" and ranks == 2):
        slots = ranks * whole_grains(elements)
        return slots * itemsize * (2 if form == "one_shot" else 1)
    return 2 * ranks * _share(elements, ranks) * itemsize


def peer_all_reduce(form: str, tensor: torch.Tensor, peers: PeerMemory, sms: int | None) -> None:
    """Put the sum over the ranks in the place of `tensor`, contiguous, on a lane of so many SMs (None: not confined).

    All ranks call it with the same form, shape, type and SMs; a `peers` serves one form.
    """
    from nanoflow.ops import all_reduce_triton

    x = tensor.view(-1)
    peers.check_room(peer_room(form, x.numel(), peers.size, x.element_size()), f"{form} of {x.numel()} elements")
    programs = UNCONFINED if sms is None else sms
    if not x.numel():
        return
    if form == "one_shot":
        all_reduce_triton.one_shot(x, peers, whole_grains(x.numel()), programs)
    elif form == "two_shot":
        all_reduce_triton.two_shot(x, peers, _share(x.numel(), peers.size), programs)
    elif peers.size == 2:
        _exchange(x, peers)
    else:
        _scatter_and_gather(x, peers)


def _exchange(x: torch.Tensor, peers: PeerMemory) -> None:
    """Two ranks: each copies all it has into the other's block, and both add.

    A graph holds the copy's address, so there are no two places to take in turns: the copy waits until the other rank
    has read the last one, which it has long done as a rule.
    """
    from nanoflow.ops.all_reduce_triton import add_arrived, meet, wait_for_readers

    stride = whole_grains(x.numel())
    wait_for_readers(peers)
    peers.data(1 - peers.rank, peers.rank * stride * x.element_size(), x.numel(), x.dtype).copy_(x)
    meet(peers)
    add_arrived(x, peers, stride, tell=True)


def _scatter_and_gather(x: torch.Tensor, peers: PeerMemory) -> None:
    """More ranks: each adds up its share and copies the sum to all others.

    The slots are copied to again after the second meeting, before which the others have added; the sums after the next
    first one, before which the others have taken them.
    """
    from nanoflow.ops.all_reduce_triton import add_arrived, meet

    rank, ranks, bytes_each = peers.rank, peers.size, x.element_size()
    each = _share(x.numel(), ranks)
    sums = peers.room // 2
    others = [(rank + step) % ranks for step in range(1, ranks)]  # not all to the same one first

    def part(of: int) -> torch.Tensor:
        return x[of * each : (of + 1) * each]

    for other in others:
        mine = part(other)
        peers.data(other, rank * each * bytes_each, mine.numel(), x.dtype).copy_(mine)
    meet(peers)
    add_arrived(part(rank), peers, each, tell=False)
    for other in others:
        mine = part(rank)
        peers.data(other, sums + rank * each * bytes_each, mine.numel(), x.dtype).copy_(mine)
    meet(peers)
    for other in others:
        theirs = part(other)
        theirs.copy_(peers.data(rank, sums + other * each * bytes_each, theirs.numel(), x.dtype))


def _share(elements: int, ranks: int) -> int:
    """Elements of each rank's share: whole grains."""
    return whole_grains(-(-elements // ranks))


def whole_grains(elements: int) -> int:
    """Elements of a slot for so many."""
    return -(-elements // GRAIN) * GRAIN
