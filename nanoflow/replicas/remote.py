"""One replica as the main process knows it: its lines, what it has told, what it did."""

from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from nanoflow.engine import EngineStats
from nanoflow.parallel.processes import Child
from nanoflow.recording import IterationRecord
from nanoflow.replicas.figures import ReplicaFigures
from nanoflow.replicas.messages import End, Ended, Give, Ready, Told

__all__ = ["Remote"]


class Remote:
    """A replica's process, and what it has told. Sending never waits: a thread does it.

    Args:
        number: from 0.
        child: its process, started.
    """

    def __init__(self, number: int, child: Child) -> None:
        self.number = number
        self.child = child
        self.ready: Ready | None = None
        """None while it loads."""
        self.given: tuple[bool, bool] | None = None
        """Whether it was last told to expect more, and to admit."""
        self.last: Told | None = None
        self.record: IterationRecord | None = None
        """Of its newest iteration; None while nothing runs."""
        self.ended: Ended | None = None
        self.loss: str | None = None
        """How it was lost."""
        self.silent = False
        """Whether nothing more can come from it."""
        self._completed = 0
        self._errors = 0
        self._output_tokens = 0
        self._outbox: SimpleQueue[Give | End | None] = SimpleQueue()
        Thread(target=self._send, name=f"send-{number}", daemon=True).start()

    def send(self, message: Give | End) -> None:
        """Send as soon as it takes messages."""
        self._outbox.put(message)

    def receive(self) -> Ready | Told | Ended | None:
        """The next message, which is waited for; None if there will be none."""
        try:
            message: Ready | Told | Ended = self.child.link.recv()
        except (EOFError, OSError):
            self.silent = True  # it is dead, which the watch will tell
            return None
        if isinstance(message, Ready):
            self.ready = message
        elif isinstance(message, Ended):
            self.ended = message
        else:
            self.last = message
            self._output_tokens += sum(record.output_tokens for record in message.iterations)
            failed = sum(done.error is not None for done in message.done)
            self._errors += failed
            self._completed += len(message.done) - failed
        return message

    def end(self, *, kill: bool) -> None:
        """End the process, which was asked to or is to be killed."""
        if kill:
            self.child.kill()
        self._outbox.put(None)
        self.child.end()

    def figures(self, seconds: float) -> ReplicaFigures:
        """What it did in a run of `seconds`."""
        stats = self.last.stats if self.last is not None else EngineStats()
        return ReplicaFigures(
            replica=self.number,
            completed=self._completed,
            errors=self._errors,
            output_tokens=self._output_tokens,
            iterations=stats.iterations,
            rows=stats.rows,
            busy_share=stats.busy_seconds / seconds if seconds else 0.0,
            load_seconds=self.ready.load_seconds if self.ready is not None else None,
            steady=self.ended.steady if self.ended is not None else None,
            lost=self.loss,
        )

    def _send(self) -> None:
        while (message := self._outbox.get()) is not None:
            with suppress(OSError, ValueError):  # dead, which the watch will tell; or closed
                self.child.link.send(message)
