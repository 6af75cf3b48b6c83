"""All-gather of columns between ranks that reach each other's memory, as a Triton kernel that pushes; and what puts
the shares that copies have brought side by side.

What flags mean, what orders reads and writes and why nothing waits for ever is said in
`nanoflow.ops.all_reduce_triton`. "Kernel k" is the k-th on a block, the same on all ranks.

Programs divide a share's elements, whatever its columns: an element's row follows from its place. The compiler knows
the columns. Where they are a multiple of 8, all accesses to 16-bit types are 16 bytes wide, and rows and their places,
whatever they are, need no kernels of their own.

Shape legend: N ranks, T rows, C columns of a rank's share.
"""

import torch
import triton
import triton.language as tl

from nanoflow.ops.all_reduce_triton import (
    ADD_BLOCK,
    ADD_WARPS,
    _await_flags,
    _counters,
    _data,
    _is_last,
    _limit,
    _raise_flags,
    _sizes,
)
from nanoflow.ops.peer_memory import PeerMemory

__all__ = ["all_gather", "side_by_side"]


@triton.jit(do_not_specialize=["rows", "first"])
def all_gather_kernel(
    source, blocks, places, counters, rows, first, COLUMNS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BEGIN: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank writes its `source` [T, C] to its columns in all ranks' targets [.., N * C], its own among them, which
    begin the data of `places`; the rows are those from `first` on.

    The first flags of a program say that its rank has come here: all that read the target's rows before has ended
    there. The second ones say that the program's part has been written. No data of `blocks` are used.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    number = tl.load(counters) + 1
    _raise_flags(blocks, 0, program, number, RANK, RANKS)
    _await_flags(blocks, 0, program, number, RANK, RANKS, LIMIT)
    n = rows * COLUMNS
    begin = first.to(tl.int64) * (COLUMNS * RANKS) + COLUMNS * RANK
    for start in range(program * BLOCK, n, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n
        values = tl.load(source + offsets, mask=mask)
        there = _side_by_side(offsets, COLUMNS, RANKS)
        for step in tl.static_range(1, RANKS + 1):  # its own last
            target = _data(places, (RANK + step) % RANKS, BEGIN, 0, source) + begin
            tl.store(target + there, values, mask=mask)
    _raise_flags(blocks, 1, program, number, RANK, RANKS)
    _await_flags(blocks, 1, program, number, RANK, RANKS, LIMIT)
    if _is_last(counters):
        tl.store(counters, number)


@triton.jit(do_not_specialize=["rows"])
def side_by_side_kernel(
    source, gathered, target, rows, COLUMNS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``target[:, r * C : (r + 1) * C] = gathered[r]``, and of this rank `source`."""
    n = rows * COLUMNS
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    there = _side_by_side(offsets, COLUMNS, RANKS)
    for rank in tl.static_range(RANKS):
        share = source if rank == RANK else gathered + n.to(tl.int64) * rank
        values = tl.load(share + offsets, mask=mask, cache_modifier=".cg")
        tl.store(target + COLUMNS * rank + there, values, mask=mask)


@triton.jit
def _side_by_side(offsets, COLUMNS: tl.constexpr, RANKS: tl.constexpr):
    """Where in rows of N * C columns the elements of [T, C] are, from the first column of their share on."""
    return offsets + offsets // COLUMNS * (COLUMNS * (RANKS - 1))


def all_gather(source_TC: torch.Tensor, first: int, peers: PeerMemory, places: PeerMemory, programs: int) -> None:
    """Put all ranks' `source_TC`, contiguous, side by side in rows from `first` on of the targets in `places`, on at
    most `programs` thread blocks."""
    rows, columns = source_TC.shape
    grid, block, warps = _sizes(source_TC.numel(), programs)
    all_gather_kernel[grid](
        source_TC, peers.addresses, places.addresses, _counters(peers), rows, first, COLUMNS=columns, RANK=peers.rank,
        RANKS=peers.size, BEGIN=places.begin, LIMIT=_limit(peers), BLOCK=block, num_warps=warps,
    )  # fmt: skip


def side_by_side(
    source_TC: torch.Tensor, gathered_NTC: torch.Tensor, target: torch.Tensor, rank: int, *, block: int = ADD_BLOCK
) -> None:
    """Put `gathered_NTC` side by side in `target` [T, N * C], of this rank `source_TC` in its place; all contiguous."""
    ranks, rows, columns = gathered_NTC.shape
    side_by_side_kernel[triton.cdiv(source_TC.numel(), block),](
        source_TC, gathered_NTC, target, rows, COLUMNS=columns, RANK=rank, RANKS=ranks, BLOCK=block,
        num_warps=ADD_WARPS,
    )  # fmt: skip
