"""Reduce-scatter of rows, residual sum, RMS norm and all-gather between peers in one Triton kernel, and its halves.

What flags mean, what orders reads and writes and why nothing waits for ever is said in
`nanoflow.ops.all_reduce_triton`; how rows are shared out in `nanoflow.ops.row_shares`. "Kernel k" is the k-th on a
block, the same on all ranks.

A program has some rows of every rank's share, one after the other: it sends the other ranks their parts of its rows,
waits for the same program of the others, and has then all that it needs of its own rank's. So a program waits for one
other of each rank, not for all that their ranks have to send, and no value goes through memory between the steps.

Shape legend: N ranks, T rows of a nano-batch, C rows of a rank's share (the last ranks may have fewer), E columns.
"""

import torch
import triton
import triton.language as tl

from nanoflow.ops.all_reduce_triton import (
    LARGE,
    _await_flags,
    _counters,
    _data,
    _is_last,
    _limit,
    _raise_flags,
    _sum,
)
from nanoflow.ops.norm_triton import warps_for
from nanoflow.ops.peer_memory import PROGRAMS as MOST_PROGRAMS, PeerMemory

__all__ = ["fused_rows"]

WARPS = 16
"""Of programs that have many bytes to send: so many are in flight at once that few programs fill a link."""


@triton.jit
def fused_rows_kernel(
    branch, residual, weight, out, blocks, places, counters, rows, share, each, first, stride, half, eps,
    SUM: tl.constexpr, GATHER: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, BEGIN: tl.constexpr,
    LIMIT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """With SUM: ``residual[own] += sum of all ranks' branch[own]``. With GATHER: ``out = rms_norm(residual)`` of all
    rows, each normed by the rank whose it is, who writes it to all others' buffers, which begin the data of `places`;
    `out` is from their row `first` on.

    Data of `blocks`, with SUM: [2, N, stride], one half for each other kernel. A half is written again in kernel k + 2,
    whose rank has seen flags of the others' kernel k + 1, so they have finished kernel k, which read it.

    The first flags of a program say that what it sends has arrived, and that its rank has come here: all that read the
    rows of `out` before has ended there. The second ones say that the program's rows of `out` have been written.
    """
    program = tl.program_id(0)
    number = tl.load(counters) + 1
    base = (number & 1).to(tl.int64) * half
    begin = program * each
    end = tl.minimum(begin + each, share)
    if SUM:
        last = end * COLUMNS
        for start in range(begin * COLUMNS, last, TILE):
            offsets = start + tl.arange(0, TILE)
            for step in tl.static_range(1, RANKS):
                peer = (RANK + step) % RANKS
                mask = (offsets < last) & (offsets < (rows - peer * share) * COLUMNS)
                theirs = branch + peer * share.to(tl.int64) * COLUMNS
                values = tl.load(theirs + offsets, mask=mask)
                slot = _data(blocks, peer, BEGIN, base, branch) + stride.to(tl.int64) * RANK
                tl.store(slot + offsets, values, mask=mask)
    _raise_flags(blocks, 0, program, number, RANK, RANKS)
    _await_flags(blocks, 0, program, number, RANK, RANKS, LIMIT)
    own = RANK * share.to(tl.int64) * COLUMNS
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    for row in range(begin, tl.minimum(end, rows - RANK * share)):
        offsets = row * COLUMNS + column
        x = tl.load(residual + own + offsets, mask=inside, other=0.0).to(tl.float32)
        if SUM:
            arrived = _data(blocks, RANK, BEGIN, base, branch)
            x += _sum(branch + own, arrived, offsets, inside, stride, RANK, RANKS).to(tl.float32)
            total = x.to(residual.dtype.element_ty)
            tl.store(residual + own + offsets, total, mask=inside)
            x = total.to(tl.float32)
        if GATHER:
            scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x, 0.0)
            mean = tl.sum(x * x, axis=0) / COLUMNS
            normal = (x * tl.rsqrt(mean + eps)).to(out.dtype.element_ty).to(tl.float32)
            normal = (normal * scale).to(out.dtype.element_ty)
            tl.store(out + own + offsets, normal, mask=inside)
            for step in tl.static_range(1, RANKS):
                there = _data(places, (RANK + step) % RANKS, BEGIN, 0, out) + first.to(tl.int64) * COLUMNS + own
                tl.store(there + offsets, normal, mask=inside)
    if GATHER:
        _raise_flags(blocks, 1, program, number, RANK, RANKS)
        _await_flags(blocks, 1, program, number, RANK, RANKS, LIMIT)
    if _is_last(counters):
        tl.store(counters, number)


def fused_rows(
    residual_TE: torch.Tensor,
    peers: PeerMemory,
    share: int,
    stride: int,
    programs: int,
    *,
    branch_TE: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float, torch.Tensor, int, PeerMemory] | None = None,
) -> None:
    """Run the kernel on contiguous rows, in shares of `share` rows and slots of `stride` elements, on at most
    `programs` thread blocks.

    Args:
        branch_TE: partial sums, which are to be added up over the ranks and to the residual.
        norm: weight [E], eps, where the normed rows go [T, E], its first row in the buffers of all ranks, and these.
    """
    rows, columns = residual_TE.shape
    if not rows:
        return
    weight, eps, out, first, places = norm or (residual_TE, 0.0, residual_TE, 0, peers)
    branch = residual_TE if branch_TE is None else branch_TE
    programs = max(1, min(programs, MOST_PROGRAMS, share))
    each = triton.cdiv(share, programs)
    block = triton.next_power_of_2(columns)
    fused_rows_kernel[(triton.cdiv(share, each),)](
        branch, residual_TE, weight, out, peers.addresses, places.addresses, _counters(peers), rows, share, each, first,
        stride, peers.room // 2, eps, SUM=branch_TE is not None, GATHER=norm is not None, RANK=peers.rank,
        RANKS=peers.size, BEGIN=peers.begin, LIMIT=_limit(peers), COLUMNS=columns, BLOCK=block,
        TILE=min(LARGE[0], triton.next_power_of_2(each * columns)),
        num_warps=WARPS if each * columns >= LARGE[0] else warps_for(columns),
    )  # fmt: skip
