"""Replicas as threads of one process, with real engines: fast to start, and killed at any moment."""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

from nanoflow.config_schema import RunConfig
from nanoflow.loading import build_engine, open_model
from nanoflow.parallel.processes import Child, Line, Loss
from nanoflow.power import EnergyMeter
from nanoflow.replicas import serve
from nanoflow.replicas.messages import Ready


class ReplicaThread:
    """A replica in a thread; stands for its process.

    Args:
        before_step: called by the replica before each iteration, with its number.
    """

    pid = 0

    def __init__(self, number: int, config: RunConfig, before_step: Callable[[int], None]) -> None:
        link, self._link = Pipe()
        life, self._life = Pipe()
        self.child = Child(f"replica {number}", self, link, life)
        self._number, self._config, self._before_step = number, config, before_step
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        return 0

    def kill(self) -> None:
        """Its lines end at once; what it still does reaches nobody."""
        for line in (self._link, self._life):
            with suppress(OSError):
                shut(line)

    def _work(self) -> None:
        model = open_model(self._config.model, self._config.engine)
        engine = build_engine(model, self._config.engine, quiet=True)
        step = engine.step

        def slowed() -> Any:
            self._before_step(self._number)
            return step()

        engine.step = slowed  # type: ignore[method-assign]
        with suppress(EOFError, OSError):
            ready = Ready(
                engine.scheduler.max_running,
                engine.sizes,
                engine.kv_capacity,
                engine.programs,
                0.1,
            )
            self._link.send(ready)
            loop = serve.Loop(engine, self._tell, EnergyMeter(model.device))
            threading.Thread(target=serve.listen, args=(self._link, engine, loop.inbox), daemon=True).start()
            loop.run()
        engine.close()
        self.kill()

    def _tell(self, message: Any) -> None:
        try:
            self._link.send(message)
        except OSError:
            raise EOFError from None


def shut(line: Line) -> None:
    """End a line for both sides, also for who waits in it."""
    with socket.socket(fileno=os.dup(line.fileno())) as near:
        near.shutdown(socket.SHUT_RDWR)


class FakeWatch:
    """Tells of the losses that a test makes."""

    def __init__(self, lost: Callable[[Loss], None]) -> None:
        self.lost = lost
        self.watched: set[Child] = set()

    def add(self, child: Child) -> None:
        self.watched.add(child)

    def remove(self, child: Child) -> None:
        self.watched.discard(child)

    def close(self) -> None:
        self.watched.clear()

    def kill(self, thread: ReplicaThread) -> None:
        """End a replica as the system would, and tell."""
        thread.kill()
        if thread.child in self.watched:
            self.watched.discard(thread.child)
            self.lost(Loss(thread.child, f"{thread.child.name} was killed by SIGKILL", signal=9))
