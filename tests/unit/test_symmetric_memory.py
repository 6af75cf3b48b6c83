"""How ranks come to have memory in common: why not, said on all of them, and an end to every wait."""

import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import DistStoreError, HashStore

from nanoflow.ops.peer_memory import PeerMemory, PeerMemoryError, symmetric_memory
from tests.unit.rank_threads import on_all


@pytest.mark.parametrize(
    "devices, reached, message",
    [
        ((0, 1, 1), 8, "ranks 1 and 2 have the same GPU, cuda:1"),
        ((0, 1, 2), 2, "rank 0 does not see the GPU of rank 2"),
        ((0, 1, 3), 8, "cuda:0 does not reach the memory of cuda:3"),
    ],
)
def test_devices_out_of_reach_are_named_alike_on_all_ranks(
    devices: tuple[int, ...], reached: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: reached)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: 3 not in (one, other))
    store = HashStore()

    def refused(rank: int) -> str:
        with pytest.raises(PeerMemoryError) as error:
            symmetric_memory(store, rank, 3, torch.device("cuda", devices[rank]), 1024, 1.0)
        return str(error.value)

    assert on_all(refused, 3) == [message] * 3


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)


def test_without_symmetric_memory_the_reason_is_said(two_gpus: None) -> None:
    """A build of torch without CUDA stands for what has no such memory."""
    store = HashStore()

    def refused(rank: int) -> None:
        with pytest.raises(PeerMemoryError, match=r"rank 0 has no memory in common with the others \("):
            symmetric_memory(store, rank, 2, torch.device("cuda", rank), 1024, 1.0)

    on_all(refused, 2)


class MadeUp:
    """Symmetric memory in this process; what `rendezvous` does can be given."""

    def __init__(self, rendezvous: Callable[[], None] = lambda: None, full: int | None = None) -> None:
        self.rendezvous_does, self.full = rendezvous, full

    def get_backend(self, device: torch.device) -> str:
        return "CUDA"

    def empty_strided_p2p(self, shape: tuple[int], stride: object, dtype: object, device: torch.device) -> torch.Tensor:
        if device.index == self.full:
            raise RuntimeError("CUDA driver error: out of memory\nmore")
        return torch.ones(shape, dtype=torch.uint8)

    def set_group_info(self, *group: object) -> None:
        pass

    def rendezvous(self, block: torch.Tensor, name: str) -> SimpleNamespace:
        self.rendezvous_does()
        return SimpleNamespace(get_buffer=lambda rank, shape, dtype: torch.full(shape, rank, dtype=dtype))


Meet = Callable[[MadeUp, int], PeerMemory]


@pytest.fixture
def meet(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> Meet:
    """Has a rank meet the other, in a memory that is made up."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    store = HashStore()

    def meet_in(memory: MadeUp, rank: int) -> PeerMemory:
        monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", memory)
        return symmetric_memory(store, rank, 2, torch.device("cuda", rank), 1024, 1.0)

    return meet_in


def test_ranks_meet_in_blocks_of_zeros(meet: Meet) -> None:
    for rank, peers in enumerate(on_all(lambda rank: meet(MadeUp(), rank), 2)):
        assert (peers.rank, peers.size, peers.room) == (rank, 2, 1024)
        assert not peers.blocks[rank].any() and (peers.blocks[1 - rank] == 1 - rank).all()


def test_too_little_memory_on_one_rank_is_said_on_all(meet: Meet) -> None:
    def refused(rank: int) -> str:
        with pytest.raises(torch.OutOfMemoryError) as error:
            meet(full, rank)
        return str(error.value)

    full = MadeUp(full=1)
    message = "rank 1 has no memory in common with the others (CUDA driver error: out of memory)"
    assert on_all(refused, 2) == [message] * 2


def test_ranks_that_do_not_come_are_not_taken_for_missing_memory(meet: Meet) -> None:
    def nobody() -> None:
        raise DistStoreError("wait timeout")

    def refused(rank: int) -> None:
        with pytest.raises(DistStoreError):
            meet(MadeUp(nobody), rank)

    on_all(refused, 2)


HANGS = """
import ctypes
from nanoflow.ops.peer_memory import _ended_after
with _ended_after(0.5):
    ctypes.PyDLL(None).usleep(20_000_000)  # with Python's lock held
"""


def test_a_rank_lost_in_the_middle_of_it_ends_the_others() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "Timeout (" in done.stderr and time.monotonic() - began < 19
