"""The ranks of a tensor-parallel run, as rank 0 has them: started, told what to do, watched, ended.

Contract: whichever rank ends, raises or hangs, the run ends with one message that says which and why, and no process is
left. Rank 0's main thread raises `ParallelError` as soon as it is where it can; if it cannot, since it waits inside a
library for a rank that is gone, a thread prints the message and ends the process: results are with the system already.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from types import TracebackType
from typing import Any, Self

import torch

from nanoflow.config_schema import EngineSection, ModelSection, RunConfig
from nanoflow.devices import choose_device
from nanoflow.errors import ConfigError, ParallelError
from nanoflow.loading import Model, shard_model
from nanoflow.ops.batch import DenseBatch
from nanoflow.ops.communicator import TIMEOUT, Communicator, CommunicatorError, TorchCommunicator, have_peer_memory
from nanoflow.parallel.batches import BatchWriter
from nanoflow.parallel.executor import BUILD_ERRORS, RankExecutor, TensorParallelExecutor
from nanoflow.parallel.messages import HERE, LINK_DTYPE, READY, Build, CannotBuild, Load, Profiling, RankSettings
from nanoflow.parallel.processes import SILENT_SECONDS, Child, Loss, Watch, leave, start
from nanoflow.parallel.torchrun import accept_ranks, check_place
from nanoflow.search.ceilings import measure_link

__all__ = ["TensorGroup", "check_ranks", "tensor_ranks"]

TARGET = "nanoflow.parallel.worker:work"
ITERATION_SECONDS = TIMEOUT
WATCHED_DEVICES = ("cuda",)
"""Where an iteration that does not end ends the run. On a CPU one may take minutes, and collectives have a timeout."""
GRACE_SECONDS = 8.0
"""After a rank's loss, how long rank 0 may take to end by itself."""
SETTLE_SECONDS = 1.0
"""After a loss, how long others are waited for: of several, the first to be heard of need not be the cause."""
BLAME_SECONDS = 5.0
"""How long the loss is waited for that explains why a collective failed."""


def check_ranks(engine: EngineSection, tensor: int, *, use: bool = True, torchrun: bool = False) -> bool:
    """Whether torchrun has started the ranks, if there are several. `use`: see `choose_device`.

    Raises ConfigError if it has started more or fewer, or any where `torchrun` does not say that it may, or if there
    are too few GPUs.
    """
    by_torchrun = check_place(tensor)
    if by_torchrun and not torchrun:
        raise ConfigError(
            "torchrun: it is for `nanoflow run` and `nanoflow bench`; all else starts its ranks itself: start it "
            "without torchrun"
        )
    if tensor > 1:
        device = choose_device(engine.device, use=use)
        first, there = device.index or 0, torch.cuda.device_count() if device.type == "cuda" else 0
        if device.type == "cuda" and first + tensor > there:
            begin = f" from cuda:{first} on" if first else ""
            raise ConfigError(
                f"parallel.tensor: {tensor} GPUs are asked for{begin}, and this machine has {there}; "
                f"set it to {max(1, there - first)} or less"
            )
    return by_torchrun


def tensor_ranks(config: RunConfig, model: Model, then: str) -> "AbstractContextManager[TensorGroup | None]":
    """The other ranks that `parallel.tensor` asks for, started and waiting for orders; None if there are none.

    Replicas (`parallel.data`) have ranks of their own: then this process has none. `then` as `TensorGroup` has it.

    Raises (at once, or from `with`) ConfigError, and ShardError if `model` cannot be split over so many ranks.
    """
    size = config.parallel.tensor
    if config.parallel.data > 1:
        return nullcontext()
    by_torchrun = check_ranks(config.engine, size, torchrun=True)
    if size == 1:
        return nullcontext()
    shard_model(model, 0, size)  # refused here, and not in every rank
    return TensorGroup(config.model, config.engine, size, torchrun=by_torchrun, then=then)


class TensorGroup:
    """Ranks 1 to `size` - 1. Use as a context manager: it starts them, and leaves none.

    Args:
        model: as configured.
        engine: as configured; on a GPU, rank r has the r-th device from `engine.device` on.
        size: all ranks, this one included.
        torchrun: they were started by torchrun, and come by themselves.
        then: what the user is told of a lost rank's consequences, behind the cause.
        layers: only so many of the model's; None: all.

    Raises (from `with`) ConfigError if the device cannot be used.
    """

    def __init__(
        self,
        model: ModelSection,
        engine: EngineSection,
        size: int,
        *,
        torchrun: bool = False,
        then: str = "",
        layers: int | None = None,
    ) -> None:
        self.size = size
        self._layers = layers
        self._then = f"; {then}" if then else ""
        self._model, self._engine, self._torchrun = model, engine, torchrun
        self._ranks: list[Child] = []
        self._losses: list[Loss] = []
        self._broken = False
        self._heard = threading.Event()
        self._watch: Watch | None = None
        self._writer: BatchWriter | None = None
        self._store: Any = None
        self.communicator: Communicator
        """To the ranks, once they have met; of the newest executor, if any was built."""
        self._builds = 0
        self._serving = False
        """Whether the ranks have an executor, and wait for batches."""
        self._awaited: float | None = None
        """Seconds for which an iteration has been waited for, if one is."""
        self._finished = threading.Event()
        self._threads = torch.get_num_threads()
        self.link_bytes_per_second: float | None = None
        """That this rank sends in a large all-reduce; None before all have met."""
        self.peers = False
        """Whether all ranks reach each other's memory; known when all have met."""
        self._device_before: int | None = None

    def __enter__(self) -> Self:
        device = choose_device(self._engine.device)
        share = self._threads if device.type == "cuda" else max(1, self._threads // self.size)
        self._device = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
        engine = self._engine.model_copy(update={"device": str(self._device)})
        self._store, port = open_store()
        settings = RankSettings(self._model, engine, 0, self.size, share, port, TIMEOUT, self._layers)
        torch.set_num_threads(share)
        if device.type == "cuda":
            self._device_before = torch.cuda.current_device()
            torch.cuda.set_device(self._device)
        try:
            self._watch = Watch(self._lost, silent_seconds=SILENT_SECONDS)
            if self._torchrun:
                self._ranks = accept_ranks(self.size)
                for rank, child in enumerate(self._ranks, 1):
                    child.link.send((settings.of_rank(rank),))
                    self._watch.add(child)
            else:
                for rank in range(1, self.size):
                    self._ranks.append(start(TARGET, settings.of_rank(rank), name=f"rank {rank}"))
                    self._watch.add(self._ranks[-1])
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        if self._device.type in WATCHED_DEVICES:
            threading.Thread(target=self._watch_iterations, name="iterations", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish(patience=0.0)  # those that had time to end have; after an error there is nothing to wait for
        self._finished.set()
        torch.set_num_threads(self._threads)
        if self._device_before is not None:
            torch.cuda.set_device(self._device_before)

    @property
    def lost(self) -> bool:
        """Whether a rank has ended, or hangs."""
        return bool(self._losses) or self._broken

    # Building the engine, in this order.

    def load(self, order: Load | Profiling) -> None:
        """Wait until all ranks have started, tell them what for, and meet them."""
        self.hear(HERE)
        self.tell(order)
        self.communicator = self._meet()
        with self.blamed():
            self.link_bytes_per_second = measure_link(self.communicator, self._device, LINK_DTYPE)
            self.peers = have_peer_memory(self.communicator)

    def least(self, pages: int) -> int:
        """The least of all ranks' KV pages, `pages` of this rank among them, which all of them take."""
        least = min(pages, *(int(found) for found in self.hear(None)))
        with self.blamed():
            self._writer = BatchWriter([rank.link for rank in self._ranks], self._check)
            for rank in self._ranks:
                rank.link.send(least)
                send_handle(rank.link, self._writer.descriptor, rank.pid)
        return least

    def executor(
        self,
        plans: tuple[str, ...],
        make: Callable[[Communicator], RankExecutor],
        *,
        row_buckets: tuple[int, ...] | None = None,
        measuring: bool = False,
    ) -> TensorParallelExecutor:
        """Executors of `plans` on all ranks; `make` gives this one's. An earlier one must have been released. The rest
        as `Build` has it; `make` must do the same.

        Raises ParallelError. When measuring, what `make` raises is raised once all ranks have said that they cannot
        either, and others may be asked for; that some can and some cannot is a ParallelError.
        """
        assert self._writer is not None
        if self._serving:
            with self.blamed():
                self._writer.pause()
            self._serving = False
        self.tell(Build(plans, self._builds, row_buckets, measuring))
        if self._builds:
            self.communicator = self._meet()
        self._builds += 1
        own, failure = None, None
        try:
            with self.blamed():
                own = make(self.communicator)
        except BUILD_ERRORS as error:
            if not measuring:
                raise
            failure = error
        # One that could not build may have left the others in a collective, which on a GPU would not end.
        answers = self.hear(None if measuring else READY, TIMEOUT if failure is not None else None)
        refused = [answer.why for answer in answers if isinstance(answer, CannotBuild)]
        if failure is not None and len(refused) == len(answers):
            self.communicator.close()
            try:
                raise failure
            finally:
                del failure  # whose traceback holds on to what was made
        if failure is not None or refused:
            why = refused[0] if refused else str(failure).splitlines()[0]
            raise ParallelError(f"a plan can run on some ranks and not on all: {why}{self._then}")
        assert own is not None
        self._serving = True
        return TensorParallelExecutor(own, self, self.communicator.close)

    # What the executor needs.

    def publish(self, batch: DenseBatch) -> None:
        """Hand a batch to all ranks. Raises ParallelError, or OSError for a rank that has just ended."""
        assert self._writer is not None
        self._check()
        self._writer.publish(batch)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Errors that come of another rank's end become a ParallelError that says why it ended."""
        try:
            yield
        except (CommunicatorError, OSError, EOFError) as error:
            raise self._explanation(error) from error

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """See `OtherRanks.awaited`."""
        self._awaited = 0.0
        try:
            yield
        finally:
            self._awaited = None

    def end(self) -> None:
        """Ask all ranks to end, and wait until they have, or end them."""
        self._finish(patience=None)

    def tell(self, message: object) -> None:
        """Send a message to every rank."""
        with self.blamed():
            for rank in self._ranks:
                rank.link.send(message)

    def hear(self, expected: object, seconds: float | None = None) -> list[Any]:
        """A message of every rank, in their order, in `seconds` if given; all are `expected` unless that is None."""
        found: dict[Connection, Any] = {}
        begun = time.monotonic()
        with self.blamed():
            while len(found) < len(self._ranks):
                self._check()
                if seconds is not None and time.monotonic() > begun + seconds:
                    self._broken = True
                    raise ParallelError(f"a rank has not answered in {seconds:.0f} s: it hangs{self._then}")
                for line in wait([rank.link for rank in self._ranks if rank.link not in found], 0.1):
                    assert isinstance(line, Connection)
                    found[line] = line.recv()
        assert expected is None or all(message == expected for message in found.values()), found
        return [found[rank.link] for rank in self._ranks]

    # All else.

    def _meet(self) -> Communicator:
        with self.blamed():
            name = f"build {self._builds}"
            return TorchCommunicator(self._store, 0, self.size, self._device, timeout=TIMEOUT, name=name)

    def _check(self) -> None:
        if self._losses:
            raise self._explanation(None)

    def _explanation(self, error: BaseException | None) -> ParallelError:
        """Why the run cannot go on, of all that is known."""
        self._heard.wait(BLAME_SECONDS)
        if not self._losses:
            self._broken = True  # a rank lives, but is not to be waited for
            return ParallelError(f"{error}{self._then}")
        loss = self._cause()
        explained = ParallelError(f"{loss.text}{self._then}")
        explained.mistake = loss.error(loss.text)
        explained.add_note(loss.trace)
        return explained

    def _cause(self) -> Loss:
        """Of the ranks lost, the one whose end the others' follow from: one that failed to reach others is not it."""
        time.sleep(SETTLE_SECONDS)
        losses = list(self._losses)
        causes = [loss for loss in losses if CommunicatorError.__name__ not in loss.text]
        killed = [loss for loss in causes if loss.signal is not None]
        return (killed or causes or losses)[0]

    def _lost(self, loss: Loss) -> None:
        """In the thread of who watches."""
        if any(known.child is loss.child for known in self._losses):
            return  # it was killed here, for hanging
        self._losses.append(loss)
        loss.child.process.kill()  # if it hangs: whoever waits for it learns that it will not come
        if not self._heard.is_set():
            self._heard.set()
            threading.Thread(target=self._end_process, name="last resort", daemon=True).start()

    def _end_process(self) -> None:
        """End the process unless it ends by itself: its main thread may wait for a rank that is gone."""
        if self._finished.wait(GRACE_SECONDS):
            return
        for rank in self._ranks:
            rank.process.kill()
        leave(f"{self._cause().text}{self._then}")

    def _watch_iterations(self) -> None:
        """On a GPU nothing else notices a rank that lives, but does not take part in a graph's collectives."""
        tick = 1.0
        while not self._finished.wait(tick):
            # By own ticks: time in which this process is stopped does not count.
            if self._awaited is None:
                continue
            self._awaited += tick
            if self._awaited > ITERATION_SECONDS and not self._losses:
                text = f"an iteration has not come to its end in {ITERATION_SECONDS:.0f} s: a rank hangs"
                self._lost(Loss(self._ranks[0], text))

    def _finish(self, patience: float | None) -> None:
        """End the ranks; those that `patience` seconds do not suffice for are killed. None: as long as is usual."""
        watch, self._watch = self._watch, None
        if watch is not None:
            for rank in self._ranks:
                watch.remove(rank)
            watch.close()
        for rank in self._ranks:
            rank.link.close()
        if self.lost or patience == 0.0:
            for rank in self._ranks:
                rank.kill()
        for rank in self._ranks:
            rank.end()
        if self._writer is not None:
            self._writer.close()


def open_store() -> tuple[Any, int]:
    """A store where ranks find each other, and its port; on 127.0.0.1 alone."""
    from torch._C._distributed_c10d import TCPStore

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, None, True, timedelta(seconds=TIMEOUT), False, master_listen_fd=listener.detach()
    )
    return store, port
