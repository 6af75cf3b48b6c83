"""Memory of each rank that all ranks of a machine read and write: where their own all-reduces meet.

On a GPU it is torch's symmetric memory: every rank allocates a block of one size and maps those of the others, which
NVLink (or PCIe, where the devices can reach each other over it) then serves like its own. Blocks stay where they are,
so that CUDA graphs may hold their addresses.

A block begins with a few counters and flags (`nanoflow.ops.all_reduce_triton` says how they are used), then comes data.
All flags are zero when the ranks have met.
"""

import ctypes
import faulthandler
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch

__all__ = ["FLAGS", "PROGRAMS", "SLACK", "PeerMemory", "PeerMemoryError", "data_begin", "symmetric_memory"]

FLAGS = 32
"""Where in a block its flags begin, in int32: behind the counters."""
PROGRAMS = 128
"""The most programs (thread blocks) of a kernel that have flags of their own."""
PHASES = 2
"""Flags that a program has for every other rank."""
ALIGNMENT = 1024
"""Bytes that data begin at a multiple of."""
SLACK = 1.5
"""What waits for other ranks and cannot be interrupted does so longer than the host, by this factor: its message says
more."""
UNUSABLE = (ImportError, AttributeError, RuntimeError)
"""What a build of torch or a driver without such memory raises."""

_numbers = count()


class PeerMemoryError(RuntimeError):
    """The ranks' devices do not reach each other's memory. The message says why, the same on all ranks."""


def data_begin(ranks: int) -> int:
    """Bytes of a block before its data, for so many ranks."""
    flags = 4 * (FLAGS + PHASES * PROGRAMS * ranks)
    return -(-flags // ALIGNMENT) * ALIGNMENT


class PeerMemory:
    """A block of each rank, as one of them reaches it. One stream uses it at a time, in one order on all ranks.

    Args:
        rank: whose end this is.
        blocks: uint8, of all ranks, contiguous, of one size; those of other ranks are their memory, not copies.
        timeout: seconds after which a kernel that waits for another rank gives up.
        release: gives the memory back.

    Attributes:
        size: ranks.
        addresses: int64 [N], where this rank's device finds the blocks.
        room: bytes of data in each block.
    """

    def __init__(
        self, rank: int, blocks: Sequence[torch.Tensor], timeout: float, release: Callable[[], None] | None = None
    ) -> None:
        self.rank = rank
        self.size = len(blocks)
        self.blocks = tuple(blocks)
        self.timeout = timeout
        self._release = release
        own = self.blocks[rank]
        self.begin = data_begin(self.size)
        self.room = own.numel() - self.begin
        self.addresses = torch.tensor([block.data_ptr() for block in self.blocks], dtype=torch.int64, device=own.device)

    def data(self, rank: int, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements of a rank's data, from byte `offset` on."""
        begin = self.begin + offset
        return self.blocks[rank][begin : begin + count * dtype.itemsize].view(dtype)

    def check_room(self, needed: int, what: str) -> None:
        """Raise ValueError unless there are `needed` bytes of data: beyond a block is the memory of something else."""
        if needed > self.room:
            raise ValueError(f"{what} needs {needed} bytes of peer memory, and has {self.room}")

    def close(self) -> None:
        """Give this rank's end back. Nothing on its device may be using it; other ranks may go on with theirs."""
        self.blocks = ()
        if self._release is not None:
            self._release()


def symmetric_memory(store: Any, rank: int, size: int, device: torch.device, room: int, timeout: float) -> PeerMemory:
    """Allocate a block with `room` bytes of data on this GPU, and meet the other ranks, who do the same.

    Not while a graph is captured. Every rank calls it as often as the others, with a `store` that nothing else uses.
    What is not closed stays until the process ends.

    Raises on all ranks, with one message:
        PeerMemoryError: the devices do not reach each other, or this build of torch or the driver has no such memory.
        torch.OutOfMemoryError: a device has too little left.
    """
    from torch.distributed import DistError

    _agree(store, rank, size, "reach", _out_of_reach(store, rank, size, device))
    # Multicast through the switches stays off, as in `nanoflow.ops.communicator`: nothing here uses it.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    whole = data_begin(size) + room
    try:
        block, reason = _block(whole, device), ""
    except UNUSABLE as error:
        reason = _without(rank, error)
    # Said before any rank waits where nothing can interrupt it.
    _agree(store, rank, size, "block", reason)
    try:
        with _ended_after(SLACK * timeout):
            handle, group = _rendezvous(block, store, rank, size)
        blocks = [block if r == rank else handle.get_buffer(r, (whole,), torch.uint8) for r in range(size)]
    except UNUSABLE as error:
        if isinstance(error, (torch.OutOfMemoryError, DistError)):  # the latter: other ranks did not come
            raise
        raise PeerMemoryError(_without(rank, error)) from error
    keep = [block, handle, group]
    # Never collected: torch waits for the device before it frees such memory, and where that fails, because a kernel
    # has failed on it, the process is aborted and its message lost.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(keep))
    return PeerMemory(rank, blocks, timeout, keep.clear)


def _block(size: int, device: torch.device) -> torch.Tensor:
    """Zeroed bytes that other processes can map."""
    from torch._C._distributed_c10d import _SymmetricMemory

    # Another backend that the environment asks for may not map the memory of other ranks. Where this one is the
    # default, it cannot be asked for.
    if _SymmetricMemory.get_backend(device) != "CUDA":
        _SymmetricMemory.set_backend("CUDA")
    block: torch.Tensor = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    block.zero_()
    torch.cuda.synchronize(device)  # before any rank can have come out of the rendezvous
    return block


def _rendezvous(block: torch.Tensor, store: Any, rank: int, size: int) -> tuple[Any, Any]:
    """What maps all ranks' blocks, and what must live as long."""
    from torch._C._distributed_c10d import ProcessGroup, _register_process_group, _SymmetricMemory

    name: Any = f"nanoflow-{next(_numbers)}"
    # Which of the two the rendezvous looks the group up in depends on torch's version.
    group = ProcessGroup(store, rank, size)
    group._set_group_name(name)
    _register_process_group(name, group)
    _SymmetricMemory.set_group_info(name, rank, size, store)
    return _SymmetricMemory.rendezvous(block, name), group


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End the process, with where it is on the terminal, if this takes longer: torch hands mappings over with Python's
    lock held and without a timeout, so that no other thread could tell of a rank that is lost in the middle of it."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _without(rank: int, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"rank {rank} has no memory in common with the others ({reason})"


def _out_of_reach(store: Any, rank: int, size: int, device: torch.device) -> str:
    """Which of the others' devices this rank does not reach; empty if it reaches all."""
    index = torch.cuda.current_device() if device.index is None else device.index
    store.set(f"device/{rank}", str(index))
    others = {r: int(store.get(f"device/{r}").decode()) for r in range(size) if r != rank}
    for other, theirs in others.items():
        if theirs == index:
            return f"ranks {rank} and {other} have the same GPU, cuda:{index}"
        if theirs >= torch.cuda.device_count():
            return f"rank {rank} does not see the GPU of rank {other}"
        if not torch.cuda.can_device_access_peer(index, theirs):
            return f"cuda:{index} does not reach the memory of cuda:{theirs}"
    return ""


def _agree(store: Any, rank: int, size: int, what: str, reason: str) -> None:
    """Raise what one of the ranks has a reason for, the first one's, on all of them."""
    store.set(f"{what}/{rank}", reason or "none")
    for other in range(size):
        found = store.get(f"{what}/{other}").decode()
        if found != "none":
            raise torch.OutOfMemoryError(found) if "out of memory" in found else PeerMemoryError(found)
