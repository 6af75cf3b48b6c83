"""Ctrl-C and SIGTERM: the first asks the run to end soon, the second ends the process at once; never a traceback.

Before requests run there is nothing to finish, and the first signal ends the run right away, as `Interrupted`.
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["GRACE_SECONDS", "Interrupted", "Interrupts"]

GRACE_SECONDS = 5.0
"""How long requests that run may go on after the first signal."""
_LAST_STEP_SECONDS = 1.0
"""After that, how long the run has to write what it has; a very long iteration is not waited for."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was asked to end before requests ran. `signal` is the number; 128 + that is the exit status."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class Interrupts:
    """Takes the signals for its extent. Outside the main thread, where signals cannot be taken, it does nothing.

    Args:
        quiet: say nothing.
        stopping: what is said when the first signal comes while requests run; None: what a run does then.
        stopped: what is said when the process ends at once; None: what holds of a run.
        grace: seconds from the first signal to the end of the process, if nothing ends it before.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stopping: str | None = None,
        stopped: str | None = None,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self.signal: int | None = None
        """The signal that came; None as long as none has."""
        self._quiet = quiet
        self._grace = grace
        self._stopping = stopping
        self._stopped = (
            stopped or "stopped; every request that was finished is in the output, and the same command goes on"
        )
        self._draining = False
        self._deadline = 0.0
        self._previous: dict[int, Any] = {}
        self._watchdog: threading.Timer | None = None

    @property
    def out_of_time(self) -> bool:
        """Whether a signal came, and the time that running requests had since is over."""
        return self.signal is not None and time.monotonic() >= self._deadline

    def drain(self) -> None:
        """From now on there are requests to finish: the first signal sets `signal`, and the caller sees to the rest."""
        self._draining = True

    def drained(self) -> None:
        """No request runs any more; what is left to do takes no long time, and only another signal cuts it short."""
        if self._watchdog is not None:
            self._watchdog.cancel()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # What the parent told us to ignore (as a script does with what it starts by `&`) stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.signal is not None and error is None:
            return  # the process is about to end: a second signal still ends it at once
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self._end(number)
        self.signal = number
        if not self._draining:
            raise Interrupted(number)
        self._deadline = time.monotonic() + self._grace
        self._say(
            self._stopping or f"stopping: what finishes within {self._grace:.0f} s is written; again to stop at once"
        )
        self._watchdog = threading.Timer(self._grace + _LAST_STEP_SECONDS, self._end, (number,))
        self._watchdog.daemon = True
        self._watchdog.start()

    def _end(self, number: int) -> None:
        self._say(self._stopped)
        # Not `sys.exit`: threads that compute would be waited for, and the writer's lines are with the system already.
        os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        show_cursor = "\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""
        with suppress(OSError):
            os.write(2, f"\r{show_cursor}{text}\n".encode())  # not print: the signal may have come inside of one
