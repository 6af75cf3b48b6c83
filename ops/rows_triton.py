"""Reduce-scatter and all-gather of rows between ranks that reach each other's memory, as Triton kernels that push.

What flags mean, what orders reads and writes and why nothing waits for ever is said in
`nanoflow.ops.all_reduce_triton`. "Kernel k" is the k-th on a block, the same on all ranks.

Shape legend: N ranks, n elements, S elements of a rank's share (the last ranks may have fewer).
"""

import torch
import triton
import triton.language as tl

from nanoflow.ops.all_reduce_triton import (
    _await_flags,
    _counters,
    _data,
    _is_last,
    _limit,
    _raise_flags,
    _sizes,
    _sum,
)
from nanoflow.ops.peer_memory import PeerMemory

__all__ = ["all_gather", "reduce_scatter"]


@triton.jit
def reduce_scatter_kernel(
    x, blocks, counters, n, share, stride, half, RANK: tl.constexpr, RANKS: tl.constexpr, BEGIN: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank sends each other one that one's share, and adds up its own. Data: [2, N, stride], one half for each
    other kernel.

    A half is written again in kernel k + 2, whose rank has seen flags of the others' kernel k + 1, so they have
    finished kernel k, which read it.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    number = tl.load(counters) + 1
    base = (number & 1).to(tl.int64) * half
    wide = share.to(tl.int64)
    for start in range(program * BLOCK, share, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        for step in tl.static_range(1, RANKS):
            peer = (RANK + step) % RANKS
            mask = (offsets < share) & (offsets < n - peer * share)
            values = tl.load(x + wide * peer + offsets, mask=mask)
            slot = _data(blocks, peer, BEGIN, base, x) + stride.to(tl.int64) * RANK
            tl.store(slot + offsets, values, mask=mask)
    _raise_flags(blocks, 0, program, number, RANK, RANKS)
    _await_flags(blocks, 0, program, number, RANK, RANKS, LIMIT)
    arrived = _data(blocks, RANK, BEGIN, base, x)
    mine = x + wide * RANK
    for start in range(program * BLOCK, share, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = (offsets < share) & (offsets < n - RANK * share)
        tl.store(mine + offsets, _sum(mine, arrived, offsets, mask, stride, RANK, RANKS), mask=mask)
    if _is_last(counters):
        tl.store(counters, number)


@triton.jit
def all_gather_kernel(
    x, blocks, places, counters, n, share, first, RANK: tl.constexpr, RANKS: tl.constexpr, BEGIN: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank writes its share to its place in all others' buffers, which begin the data of `places`; `x` is from
    their element `first` on.

    The first flags of a program say that its rank has come here: all that read the rows before has ended there. The
    second ones say that the program's part has been written. No data of `blocks` are used.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    number = tl.load(counters) + 1
    _raise_flags(blocks, 0, program, number, RANK, RANKS)
    _await_flags(blocks, 0, program, number, RANK, RANKS, LIMIT)
    own = share.to(tl.int64) * RANK
    for start in range(program * BLOCK, share, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = (offsets < share) & (offsets < n - RANK * share)
        values = tl.load(x + own + offsets, mask=mask)
        for step in tl.static_range(1, RANKS):
            there = _data(places, (RANK + step) % RANKS, BEGIN, 0, x) + first.to(tl.int64) + own
            tl.store(there + offsets, values, mask=mask)
    _raise_flags(blocks, 1, program, number, RANK, RANKS)
    _await_flags(blocks, 1, program, number, RANK, RANKS, LIMIT)
    if _is_last(counters):
        tl.store(counters, number)


def reduce_scatter(x: torch.Tensor, peers: PeerMemory, share: int, stride: int, programs: int) -> None:
    """``x[own share] = sum of all ranks' x[own share]`` for a contiguous `x` [n], in shares of `share` elements and
    slots of `stride`, on at most `programs` thread blocks."""
    grid, block, warps = _sizes(share, programs)
    reduce_scatter_kernel[grid](
        x, peers.addresses, _counters(peers), x.numel(), share, stride, peers.room // 2, RANK=peers.rank,
        RANKS=peers.size, BEGIN=peers.begin, LIMIT=_limit(peers), BLOCK=block, num_warps=warps,
    )  # fmt: skip


def all_gather(x: torch.Tensor, first: int, peers: PeerMemory, places: PeerMemory, share: int, programs: int) -> None:
    """``x[rank r's share] = rank r's x[its share]`` for a contiguous `x` [n] from element `first` of the buffers in
    `places` on, in shares of `share` elements, on at most `programs` thread blocks."""
    grid, block, warps = _sizes(share, programs)
    all_gather_kernel[grid](
        x, peers.addresses, places.addresses, _counters(peers), x.numel(), share, first, RANK=peers.rank,
        RANKS=peers.size, BEGIN=places.begin, LIMIT=_limit(peers), BLOCK=block, num_warps=warps,
    )  # fmt: skip
