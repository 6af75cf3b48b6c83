"""All-reduces between ranks that reach each other's memory, as Triton kernels: one-shot, two-shot, and the pieces of
one whose bytes the copy engines move.

All of them push: a rank writes its part into the other ranks' blocks (`nanoflow.ops.peer_memory`), raises a flag there,
waits for the flags of the others in its own block, and reads what has arrived from its own memory. Sums are taken in
rank order in float32 and rounded once, so all ranks have the same bits, those of `sum_in_rank_order`.

Flags count. A kernel's number (the count of its kind on this block so far, kept in the block and advanced by the last
of the kernel's programs) is what it raises flags to and waits for, so nothing is ever reset and a replay of a captured
graph goes on counting. Numbers wrap around: their difference is looked at.

Order: a program's writes come before its flag (a barrier of the program's threads, then one thread's release at the
scope of the system), and its reads after the flags it has seen (acquire, then a barrier). Reads of arrived data go past
the first-level cache. Between kernels of a stream there is nothing to add: each begins when all before it has ended and
is visible, and none here is launched early.

No deadlock: program i waits only for program i of the other ranks, and every rank launches in one order. A grid is a
few programs, so that those of several lanes fit on a device beside each other.

What protects data that a peer has not read yet is said at each kernel. "Kernel k" is the k-th on a block, the same on
all ranks; a rank that is in kernel k + 1 has finished kernel k, on one stream.

Shape legend: N ranks, n elements, S elements of a rank's share.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from nanoflow.ops.peer_memory import FLAGS as FIRST_FLAG, PROGRAMS as MOST_PROGRAMS, SLACK, PeerMemory

__all__ = ["add_arrived", "meet", "one_shot", "two_shot", "wait_for_readers"]

FLAGS = tl.constexpr(FIRST_FLAG)
PROGRAMS = tl.constexpr(MOST_PROGRAMS)
LARGE, SMALL = (16384, 16), (2048, 8)
"""Elements of a tile, and warps: four loads of 16 bytes in flight in each thread hide the way to the memory; where that
would leave programs without a tile, one."""
ADD_BLOCK, ADD_WARPS = 2048, 8


@triton.jit
def _data(blocks, rank, BEGIN: tl.constexpr, offset, like):
    """Pointer to a rank's data from byte `offset` on, of the type of the pointer `like`."""
    address = tl.load(blocks + rank) + BEGIN + offset
    return tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def _flag(blocks, owner, phase: tl.constexpr, program, sender, RANKS: tl.constexpr):
    """The flag in `owner`'s block that a program of `sender` raises."""
    flags = tl.load(blocks + owner).to(tl.pointer_type(tl.int32)) + FLAGS
    return flags + (phase * PROGRAMS + program) * RANKS + sender


@triton.jit
def _raise_flags(blocks, phase: tl.constexpr, program, number, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Tell this program of all other ranks that all that it has written is there."""
    tl.debug_barrier()
    for step in tl.static_range(1, RANKS):
        flag = _flag(blocks, (RANK + step) % RANKS, phase, program, RANK, RANKS)
        tl.atomic_xchg(flag, number, sem="release", scope="sys")


@triton.jit
def _await_flags(
    blocks, phase: tl.constexpr, program, number, RANK: tl.constexpr, RANKS: tl.constexpr, LIMIT: tl.constexpr
):
    """Wait until this program of all other ranks has raised its flag to `number` or beyond; with a LIMIT in
    nanoseconds, no longer than that: then the kernel fails, and with it all that the process does on the device."""
    for step in tl.static_range(1, RANKS):
        flag = _flag(blocks, RANK, phase, program, (RANK + step) % RANKS, RANKS)
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        if LIMIT > 0:
            begun = globaltimer()
            while seen - number < 0:
                if globaltimer() - begun > LIMIT:
                    tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        else:
            while seen - number < 0:
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def _is_last(counters):
    """Whether all other programs of the kernel have come here before; for those after it, none has come yet."""
    tl.debug_barrier()
    last = tl.atomic_add(counters + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counters + 1, 0)
    return last


@triton.jit
def _sum(x, arrived, offsets, mask, stride, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The sum in rank order: this rank's part from `x`, those of the others from their slots."""
    total = tl.load(x + offsets, mask=mask).to(tl.float32) if RANK == 0 else _slot(arrived, 0, stride, offsets, mask)
    for rank in tl.static_range(1, RANKS):
        if rank == RANK:
            total += tl.load(x + offsets, mask=mask).to(tl.float32)
        else:
            total += _slot(arrived, rank, stride, offsets, mask)
    return total.to(x.dtype.element_ty)


@triton.jit
def _slot(arrived, rank: tl.constexpr, stride, offsets, mask):
    start = arrived + stride.to(tl.int64) * rank
    return tl.load(start + offsets, mask=mask, cache_modifier=".cg").to(tl.float32)


@triton.jit
def one_shot_kernel(
    x, blocks, counters, n, stride, half, RANK: tl.constexpr, RANKS: tl.constexpr, BEGIN: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank sends all it has to all others, and adds. Data: [2, N, stride], one half for each other kernel.

    A half is written again in kernel k + 2, whose rank has seen flags of the others' kernel k + 1, so they have
    finished kernel k, which read it.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    number = tl.load(counters) + 1
    base = (number & 1).to(tl.int64) * half
    for start in range(program * BLOCK, n, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n
        values = tl.load(x + offsets, mask=mask)
        for step in tl.static_range(1, RANKS):
            slots = _data(blocks, (RANK + step) % RANKS, BEGIN, base, x)
            tl.store(slots + stride.to(tl.int64) * RANK + offsets, values, mask=mask)
    _raise_flags(blocks, 0, program, number, RANK, RANKS)
    _await_flags(blocks, 0, program, number, RANK, RANKS, LIMIT)
    arrived = _data(blocks, RANK, BEGIN, base, x)
    for start in range(program * BLOCK, n, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n
        tl.store(x + offsets, _sum(x, arrived, offsets, mask, stride, RANK, RANKS), mask=mask)
    if _is_last(counters):
        tl.store(counters, number)


@triton.jit
def two_shot_kernel(
    x, blocks, counters, n, share, half, RANK: tl.constexpr, RANKS: tl.constexpr, BEGIN: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every rank adds up its share of the elements and sends the sum to all others. Data: slots [N, share], and in the
    second half all sums [N, share].

    Slots are written again in kernel k + 1: all its rank's programs have seen the second flags of the others' kernel k,
    raised after their programs had read their slots. Sums are written again in kernel k + 1 after its first flags, so
    the others have finished kernel k, which read them.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    number = tl.load(counters) + 1
    wide = share.to(tl.int64)
    for start in range(program * BLOCK, share, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        for step in tl.static_range(1, RANKS):
            peer = (RANK + step) % RANKS
            mask = (offsets < share) & (offsets < n - peer * share)
            values = tl.load(x + wide * peer + offsets, mask=mask)
            tl.store(_data(blocks, peer, BEGIN, 0, x) + wide * RANK + offsets, values, mask=mask)
    _raise_flags(blocks, 0, program, number, RANK, RANKS)
    _await_flags(blocks, 0, program, number, RANK, RANKS, LIMIT)
    arrived = _data(blocks, RANK, BEGIN, 0, x)
    for start in range(program * BLOCK, share, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = (offsets < share) & (offsets < n - RANK * share)
        mine = x + wide * RANK
        total = _sum(mine, arrived, offsets, mask, share, RANK, RANKS)
        tl.store(mine + offsets, total, mask=mask)
        for step in tl.static_range(1, RANKS):
            sums = _data(blocks, (RANK + step) % RANKS, BEGIN, half, x)
            tl.store(sums + wide * RANK + offsets, total, mask=mask)
    _raise_flags(blocks, 1, program, number, RANK, RANKS)
    _await_flags(blocks, 1, program, number, RANK, RANKS, LIMIT)
    sums = _data(blocks, RANK, BEGIN, half, x)
    for start in range(program * BLOCK, share, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        for step in tl.static_range(1, RANKS):
            peer = (RANK + step) % RANKS
            mask = (offsets < share) & (offsets < n - peer * share)
            values = tl.load(sums + wide * peer + offsets, mask=mask, cache_modifier=".cg")
            tl.store(x + wide * peer + offsets, values, mask=mask)
    if _is_last(counters):
        tl.store(counters, number)


@triton.jit
def meet_kernel(blocks, counters, RANK: tl.constexpr, RANKS: tl.constexpr, LIMIT: tl.constexpr):
    """One program: wait until all ranks have come here. What they have copied before has arrived then."""
    number = tl.load(counters) + 1
    _raise_flags(blocks, 0, 0, number, RANK, RANKS)
    _await_flags(blocks, 0, 0, number, RANK, RANKS, LIMIT)
    tl.store(counters, number)


@triton.jit
def readers_kernel(blocks, counters, RANK: tl.constexpr, RANKS: tl.constexpr, LIMIT: tl.constexpr):
    """One program: wait until all other ranks have read what they got before this one last told them so."""
    _await_flags(blocks, 1, 0, tl.load(counters + 2), RANK, RANKS, LIMIT)


@triton.jit
def _tell(blocks, counters, RANK: tl.constexpr, RANKS: tl.constexpr):
    """In all programs of a kernel: let the others know that this rank has read what had come when they last met."""
    if _is_last(counters):
        number = tl.load(counters)
        tl.store(counters + 2, number)
        _raise_flags(blocks, 1, 0, number, RANK, RANKS)


@triton.jit
def add_arrived_kernel(
    x, blocks, counters, n, stride, RANK: tl.constexpr, RANKS: tl.constexpr, BEGIN: tl.constexpr, TELL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add what has arrived in slots [N, stride] to `x`, in rank order; with TELL, let the others know that it is
    read."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    arrived = _data(blocks, RANK, BEGIN, 0, x)
    tl.store(x + offsets, _sum(x, arrived, offsets, mask, stride, RANK, RANKS), mask=mask)
    if TELL:
        _tell(blocks, counters, RANK, RANKS)


def one_shot(x: torch.Tensor, peers: PeerMemory, stride: int, programs: int) -> None:
    """``x = sum of all ranks' x`` for a contiguous `x` [n], in slots of `stride` elements, on at most `programs` thread
    blocks."""
    _launch(one_shot_kernel, x, peers, stride, programs)


def two_shot(x: torch.Tensor, peers: PeerMemory, share: int, programs: int) -> None:
    """``x = sum of all ranks' x`` for a contiguous `x` [n], in shares of `share` elements, on at most `programs` thread
    blocks."""
    _launch(two_shot_kernel, x, peers, share, programs)


def _launch(kernel, x: torch.Tensor, peers: PeerMemory, each: int, programs: int) -> None:
    """`each` elements of a slot, which the programs divide among them."""
    grid, block, warps = _sizes(each, programs)
    half = peers.room // 2
    kernel[grid](
        x, peers.addresses, _counters(peers), x.numel(), each, half, RANK=peers.rank, RANKS=peers.size,
        BEGIN=peers.begin, LIMIT=_limit(peers), BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _sizes(each: int, programs: int) -> tuple[tuple[int], int, int]:
    """Grid, tile and warps for `each` elements that at most so many programs divide among them, of those with flags."""
    programs = min(programs, MOST_PROGRAMS)
    block, warps = LARGE if each >= programs * LARGE[0] else SMALL
    return (min(programs, triton.cdiv(each, block)),), block, warps


def meet(peers: PeerMemory) -> None:
    """Wait, on the device, until all ranks have come here: their copies into this rank's block have arrived."""
    meet_kernel[(1,)](
        peers.addresses, _counters(peers), RANK=peers.rank, RANKS=peers.size, LIMIT=_limit(peers), num_warps=1
    )


def wait_for_readers(peers: PeerMemory) -> None:
    """Wait, on the device, until the other ranks have added what they got before the last `add_arrived` with `tell`
    (or what else tells them) on this block."""
    readers_kernel[(1,)](
        peers.addresses, _counters(peers), RANK=peers.rank, RANKS=peers.size, LIMIT=_limit(peers), num_warps=1
    )


def add_arrived(x: torch.Tensor, peers: PeerMemory, stride: int, *, tell: bool, block: int = ADD_BLOCK) -> None:
    """Add what the other ranks have put into this one's slots [N, stride] to `x` [n], contiguous, in rank order.

    With `tell` the others' `wait_for_readers` gets to know, also where `x` is empty.
    """
    programs = max(int(tell), triton.cdiv(x.numel(), block))
    if programs:
        add_arrived_kernel[(programs,)](
            x, peers.addresses, _counters(peers), x.numel(), stride, RANK=peers.rank, RANKS=peers.size,
            BEGIN=peers.begin, TELL=tell, BLOCK=block, num_warps=ADD_WARPS,
        )  # fmt: skip


def _counters(peers: PeerMemory) -> torch.Tensor:
    """Of kernels, of the programs of the one that runs, and of the kernels when this rank last told the others that it
    has read: int32, at the begin of the own block."""
    return peers.blocks[peers.rank][:12].view(torch.int32)


def _limit(peers: PeerMemory) -> int:
    """Nanoseconds; none in the interpreter, which has no clock."""
    return int(peers.timeout * SLACK * 1e9) if peers.addresses.is_cuda else 0
