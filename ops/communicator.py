"""How the ranks of tensor parallelism reach each other: all-reduce, reduce-scatter, all-gather, broadcast.

Contract: a group of `size` processes (ranks 0 to size - 1, one a device) calls the same operations of one communicator
in the same order, with tensors of the same shape and type; whatever a rank does in between is its own matter. Every
call ends with an error once the timeout has passed or a rank is gone: none waits for ever on the host. On a GPU a call
queues on the current stream and returns. A CUDA graph can capture it; nothing here sees whether a replay ever ends, so
whoever runs the ranks has to watch that they go on.

A single rank has no communicator: code asks for `None`, and its graph has no collectives.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch

from nanoflow.ops.peer_memory import PeerMemory, PeerMemoryError, symmetric_memory

__all__ = ["TIMEOUT", "Communicator", "CommunicatorError", "TorchCommunicator", "have_peer_memory"]

TIMEOUT = 120.0
"""Seconds that a rank waits for the others by default. Ranks of one machine are next to each other in the same
iteration, so this only has to outlast what may stop one of them for a while: compiling a kernel, loading a library."""


class CommunicatorError(RuntimeError):
    """Other ranks did not answer: one of them ended, or is stuck. The message names the rank that noticed."""


class Communicator(Protocol):
    """One rank's end of a group. Not thread-safe: one thread calls it."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int:
        """Ranks of the group, 2 or more."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Put the sum over the ranks in the place of `tensor` (contiguous), added as the library likes to.

        All ranks get the same bits: every element is added up in one place. Which ranks are added first, and in which
        precision, is the library's matter; `nanoflow.ops.collectives` has the sum in rank order.
        """
        ...

    def reduce_scatter(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` with the sum over the ranks of this rank's part of `tensor` [size, *out.shape], added as the
        library likes to; both contiguous. `out` may be that part itself; the other parts hold anything then."""
        ...

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` [size, *tensor.shape] with every rank's `tensor`; both contiguous. `tensor` may be this rank's
        part of `out`."""
        ...

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Put rank `root`'s `tensor` (contiguous) in the place of everyone's."""
        ...

    def twin(self, name: str, max_ctas: int | None = None) -> "Communicator":
        """Another communicator of the same ranks, whose operations need no order with this one's: one for each lane.

        Every rank asks for the same ones in the same order. With `max_ctas` NCCL's kernels have no more thread blocks.
        `close` closes the twins too.
        """
        ...

    def peer_memory(self, name: str, room: int) -> PeerMemory:
        """A block on each rank, with `room` bytes of data, that all ranks read and write; not while a graph is
        captured.

        Every rank asks for the same ones in the same order, by names of their own. The caller closes it.

        Raises PeerMemoryError where devices do not reach each other's memory, on all ranks.
        """
        ...

    def close(self) -> None:
        """Let go of the others without waiting for them. CUDA graphs that hold collectives must be gone."""
        ...


class TorchCommunicator:
    """A `Communicator` over one of torch.distributed's backends: NCCL on a GPU, gloo on a CPU.

    The backend is used by itself, without the process-wide default group: several communicators, and several ranks in
    the threads of one process, do not meet.

    Args:
        store: where the ranks find each other, such as a `torch.distributed.TCPStore`; one for all ranks of a group,
            whose keys begin with "tensor/" here.
        rank: this rank, from 0 on.
        size: ranks of the group, 2 or more.
        device: where the tensors are. Of a GPU, it must be the current device of the process.
        timeout: seconds until a call gives up.
        loopback: all ranks are on this machine: gloo listens on 127.0.0.1 alone.
        name: of a twin.
        max_ctas: the most thread blocks of a kernel of NCCL; None: as many as NCCL likes.

    Raises:
        ValueError: a group of one, or a rank outside.
        CommunicatorError: the others did not come in time.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        device: torch.device,
        *,
        timeout: float = TIMEOUT,
        loopback: bool = True,
        name: str = "main",
        max_ctas: int | None = None,
    ) -> None:
        if size < 2:
            raise ValueError(f"a communicator joins 2 ranks or more, not {size}: a single one needs none")
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not one of 0 to {size - 1}")
        self._store = store
        self._rank = rank
        self._size = size
        self._device = device
        self._timeout = timeout
        self._loopback = loopback
        self._name = name
        self._max_ctas = max_ctas
        self._twins: list[TorchCommunicator] = []
        self._backend: Any = None
        self._call("meeting", lambda: self._connect())

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """See `Communicator.all_reduce`."""
        from torch.distributed import AllreduceOptions

        options = AllreduceOptions()
        options.asyncOp = False  # NCCL then runs on the current stream, with that stream's SMs
        if tensor.numel():
            self._run("all-reduce", lambda: self._backend.allreduce([tensor], options))

    def reduce_scatter(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """See `Communicator.reduce_scatter`."""
        from torch._C._distributed_c10d import ReduceScatterOptions

        if tensor.shape != (self._size, *out.shape):
            raise ValueError(f"scattered to {self._size} ranks, {list(tensor.shape)} is not {list(out.shape)} for each")
        options = ReduceScatterOptions()
        options.asyncOp = False
        if out.numel():
            self._run(
                "reduce-scatter", lambda: self._backend._reduce_scatter_base(out.view(-1), tensor.view(-1), options)
            )

    def all_gather(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """See `Communicator.all_gather`."""
        from torch._C._distributed_c10d import AllgatherOptions

        if out.shape != (self._size, *tensor.shape):
            raise ValueError(f"gathered from {self._size} ranks, {list(tensor.shape)} has no room in {list(out.shape)}")
        options = AllgatherOptions()
        options.asyncOp = False
        if tensor.numel():
            self._run("all-gather", lambda: self._backend._allgather_base(out.view(-1), tensor.view(-1), options))

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """See `Communicator.broadcast`."""
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        options.asyncOp = False
        if tensor.numel():
            self._run("broadcast", lambda: self._backend.broadcast([tensor], options))

    def twin(self, name: str, max_ctas: int | None = None) -> "TorchCommunicator":
        """See `Communicator.twin`."""
        made = TorchCommunicator(
            self._store,
            self._rank,
            self._size,
            self._device,
            timeout=self._timeout,
            loopback=self._loopback,
            name=f"{self._name}/{name}",
            max_ctas=max_ctas,
        )
        self._twins.append(made)
        return made

    def peer_memory(self, name: str, room: int) -> PeerMemory:
        """See `Communicator.peer_memory`."""
        from torch._C._distributed_c10d import PrefixStore

        if self._device.type != "cuda":
            raise PeerMemoryError("ranks on a CPU have no memory in common")
        store = PrefixStore(f"memory/{self._name}/{name}", self._store)
        made: list[PeerMemory] = []

        def meet() -> None:
            made.append(symmetric_memory(store, self._rank, self._size, self._device, room, self._timeout))

        self._call("meeting in memory", meet)
        return made[0]

    def close(self) -> None:
        """See `Communicator.close`."""
        while self._twins:
            self._twins.pop().close()
        backend, self._backend = self._backend, None
        if backend is not None and self._device.type == "cuda":
            # `shutdown` would wait for kernels whose peers may be gone.
            backend.abort()

    def _connect(self) -> None:
        from torch._C._distributed_c10d import PrefixStore

        store = PrefixStore(f"tensor/{self._name}", self._store)
        limit = timedelta(seconds=self._timeout)
        if self._device.type == "cuda":
            self._backend = _nccl(store, self._rank, self._size, limit, self._max_ctas)
            # NCCL meets at the first operation; were that inside a capture, it would fail there.
            self._backend.allreduce([torch.zeros(1, device=self._device)]).wait()
            torch.cuda.synchronize(self._device)
            return
        from torch.distributed import ProcessGroupGloo

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = limit
        options._threads = 1
        options._devices = [
            ProcessGroupGloo.create_device(hostname="127.0.0.1")
            if self._loopback
            else ProcessGroupGloo.create_default_device()
        ]
        self._backend = ProcessGroupGloo(store, self._rank, self._size, options)

    def _run(self, what: str, start: Callable[[], Any]) -> None:
        def call() -> None:
            work = start()
            if work is not None:
                work.wait()

        if self._backend is None:
            raise CommunicatorError(f"rank {self._rank}: the communicator is closed")
        self._call(what, call)

    def _call(self, what: str, function: Callable[[], None]) -> None:
        try:
            function()
        except RuntimeError as error:
            if isinstance(error, (torch.OutOfMemoryError, PeerMemoryError)):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CommunicatorError(
                f"rank {self._rank} of {self._size}: the other ranks did not take part in the {what} within "
                f"{self._timeout:g} s, or one of them ended ({reason})"
            ) from error


def have_peer_memory(communicator: Communicator) -> bool:
    """Whether the ranks reach each other's memory: they try. All of them call it, and get the same answer."""
    try:
        communicator.peer_memory("trial", 0).close()
    except PeerMemoryError:
        return False
    return True


def _nccl(store: Any, rank: int, size: int, timeout: timedelta, max_ctas: int | None) -> Any:
    """A backend over NCCL, which reads what is set here once, at its first communicator."""
    # Two communicators may run at once: their kernels must start in one order on all ranks, that of the launches.
    os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] = "1"
    # Multicast through the switches stays off: it is not there on every machine, and adds in another order.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    if max_ctas is not None:
        options.config.max_ctas = max_ctas
    return ProcessGroupNCCL(store, rank, size, options)
