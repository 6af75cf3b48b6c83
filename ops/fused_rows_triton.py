"""Reduce-scatter of rows, residual sum, RMS norm and all-gather between peers in one Triton kernel, and its halves; and
what is left of them for a kernel where the copy engines move the bytes.

What flags mean, what orders reads and writes and why nothing waits for ever is said in
`nanoflow.ops.all_reduce_triton`; how rows are shared out in `nanoflow.ops.row_shares`. "Kernel k" is the k-th on a
block, the same on all ranks.

In one kernel, a program has some rows of every rank's share, one after the other: it sends the other ranks their parts
of its rows, waits for the same program of the others, and has then all that it needs of its own rank's. So a program
waits for one other of each rank, not for all that their ranks have to send, and no value goes through memory between
the steps.

Shape legend: N ranks, T rows of a nano-batch, C rows of a rank's share (the last ranks may have fewer), E columns.
"""

from typing import Any

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
    _tell,
)
from nanoflow.ops.norm import RowNorm
from nanoflow.ops.norm_triton import warps_for
from nanoflow.ops.peer_memory import PROGRAMS as MOST_PROGRAMS, PeerMemory

__all__ = ["fused_rows", "own_rows"]

FEW, STAGES = 32, 3
"""Up to so many programs have the loads of so many rows under way; more of them hide the way to the memory by their
number. On an H100, 1,024 rows of 8,192 columns: 16 programs take a fifth less time so, 64 as much, 128 more."""


@triton.jit
def _own_row(
    branch, arrived, residual, weight, out, stride, eps, offsets, column, inside, SUM: tl.constexpr,
    NORM: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the sum of what all ranks have of a row to the residual, and norm it: gives, and writes, the normed row, or
    else the residual's."""
    x = tl.load(residual + offsets, mask=inside, other=0.0)
    if SUM:
        total = _sum(branch, arrived, offsets, inside, stride, RANK, RANKS).to(tl.float32)
        x = (x.to(tl.float32) + total).to(residual.dtype.element_ty)
        tl.store(residual + offsets, x, mask=inside)
    if NORM:
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        wide = tl.where(inside, x.to(tl.float32), 0.0)
        mean = tl.sum(wide * wide, axis=0) / COLUMNS
        normal = (wide * tl.rsqrt(mean + eps)).to(out.dtype.element_ty).to(tl.float32)
        x = (normal * scale).to(out.dtype.element_ty)
        tl.store(out + offsets, x, mask=inside)
    return x


@triton.jit(do_not_specialize=["rows"])
def own_rows_kernel(
    branch, residual, weight, out, blocks, counters, rows, stride, eps, SUM: tl.constexpr, NORM: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, BEGIN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each of a rank's rows, whose pointers are given. With SUM the others' parts have arrived in slots
    [N, stride], and they are told that it is read."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = (column < COLUMNS) & (row < rows)
    arrived = _data(blocks, RANK, BEGIN, 0, branch)
    offsets = row * COLUMNS + column
    _own_row(
        branch, arrived, residual, weight, out, stride, eps, offsets, column, inside, SUM, NORM, RANK, RANKS, COLUMNS
    )
    if SUM:
        _tell(blocks, counters, RANK, RANKS)


@triton.jit(do_not_specialize=["rows", "share", "each", "first"])
def fused_rows_kernel(
    branch, residual, weight, out, blocks, places, counters, rows, share, each, first, stride, half, eps,
    SUM: tl.constexpr, GATHER: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, BEGIN: tl.constexpr,
    LIMIT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
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
    arrived = _data(blocks, RANK, BEGIN, base, branch)
    for row in tl.range(begin, tl.minimum(end, rows - RANK * share), num_stages=STAGES):
        offsets = row * COLUMNS + column
        x = _own_row(
            branch + own, arrived, residual + own, weight, out + own, stride, eps, offsets, column, inside, SUM, GATHER,
            RANK, RANKS, COLUMNS,
        )  # fmt: skip
        if GATHER:
            for step in tl.static_range(1, RANKS):
                there = _data(places, (RANK + step) % RANKS, BEGIN, 0, out) + first.to(tl.int64) * COLUMNS + own
                tl.store(there + offsets, x, mask=inside)
    if GATHER:
        _raise_flags(blocks, 1, program, number, RANK, RANKS)
        _await_flags(blocks, 1, program, number, RANK, RANKS, LIMIT)
    if _is_last(counters):
        tl.store(counters, number)


def fused_rows(
    residual_TE: torch.Tensor,
    branch_TE: torch.Tensor | None,
    norm: RowNorm | None,
    peers: PeerMemory,
    share: int,
    stride: int,
    programs: int,
    *,
    first: int = 0,
    places: PeerMemory | None = None,
) -> None:
    """Sum and norm contiguous rows in one kernel, in shares of `share` rows and slots of `stride` elements, on at most
    `programs` thread blocks.

    Args:
        branch_TE: partial sums, which are added up over the ranks and to the residual; None: there are none.
        norm: None: the rows are not normed, nor gathered.
        first: the row in the buffers of all ranks, `places`, that the normed rows begin with.
    """
    rows, columns = residual_TE.shape
    if not rows:
        return
    programs = min(programs, MOST_PROGRAMS, share)
    each = triton.cdiv(share, programs)
    pointers, constants = _arguments(residual_TE, branch_TE, norm, peers)
    fused_rows_kernel[(triton.cdiv(share, each),)](
        *pointers, peers.addresses, (places or peers).addresses, _counters(peers), rows, share, each, first, stride,
        peers.room // 2, norm.eps if norm else 0.0, GATHER=norm is not None, LIMIT=_limit(peers),
        TILE=min(LARGE[0], triton.next_power_of_2(each * columns)), STAGES=_stages(residual_TE, programs, peers.size),
        num_warps=warps_for(columns), **constants,
    )  # fmt: skip


def own_rows(
    residual_CE: torch.Tensor, branch_CE: torch.Tensor | None, norm: RowNorm | None, peers: PeerMemory, stride: int
) -> None:
    """Sum and norm a rank's own rows, contiguous, of which all parts have arrived in slots of `stride` elements.

    With a branch, the others' `wait_for_readers` gets to know, also where there are no rows.
    """
    rows, columns = residual_CE.shape
    programs = max(rows, int(branch_CE is not None))
    if not programs:
        return
    pointers, constants = _arguments(residual_CE, branch_CE, norm, peers)
    own_rows_kernel[(programs,)](
        *pointers, peers.addresses, _counters(peers), rows, stride, norm.eps if norm else 0.0, NORM=norm is not None,
        num_warps=warps_for(columns), **constants,
    )  # fmt: skip


def _stages(rows_TE: torch.Tensor, programs: int, ranks: int) -> int:
    """Rows that a program loads at a time: several where the device's shared memory holds two of each rank's part, of
    the residual and of the weight."""
    if programs > FEW or not rows_TE.is_cuda:
        return 1
    row = triton.next_power_of_2(rows_TE.shape[1]) * rows_TE.element_size()
    room = torch.cuda.get_device_properties(rows_TE.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return STAGES if 2 * (ranks + 2) * row + 1024 <= room else 1


def _arguments(
    residual: torch.Tensor, branch: torch.Tensor | None, norm: RowNorm | None, peers: PeerMemory
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """What both kernels begin with, and constants that they share; the residual stands for what there is not."""
    columns = residual.shape[1]
    pointers = (
        residual if branch is None else branch,
        residual,
        residual if norm is None else norm.weight_E,
        residual if norm is None else norm.out_TE,
    )
    constants = {
        "SUM": branch is not None, "RANK": peers.rank, "RANKS": peers.size, "BEGIN": peers.begin, "COLUMNS": columns,
        "BLOCK": triton.next_power_of_2(columns),
    }  # fmt: skip
    return pointers, constants
