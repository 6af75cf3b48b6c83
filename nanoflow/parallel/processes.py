"""Processes that belong together: a parent starts children, learns of their end, and none of them outlives it.

Contract:

- A child runs in a fresh interpreter, which imports nothing of the parent's main module: it can be started from
  ``python -m``, a notebook or a test alike, and before or after the parent has used a GPU.
- However the parent ends, its children end within a moment. They do so themselves, by the end of their `life` line; on
  Linux the kernel sees to it as well (children of the main thread), for one that is stopped or hangs.
- However a child ends, the parent hears of it: by its exception's text, by the signal that killed it, or, of one that
  is stopped, by its silence.
- Children ignore SIGINT and SIGTERM, which a terminal or a system sends to all at once: the parent decides.

Each child has two lines to its parent. `Child.link` is for the two to use as they like; its end asks the child to come
to its own. The other, `life`, is this module's: beats and the last words of a child.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, Protocol, TypeAlias

from nanoflow.errors import ParallelError

__all__ = [
    "BEAT_SECONDS",
    "SILENT_SECONDS",
    "Child",
    "Line",
    "Loss",
    "Process",
    "Watch",
    "enter",
    "leave",
    "live",
    "start",
]

Line: TypeAlias = "Connection[Any, Any]"

BEAT_SECONDS = 1.0
"""Between a child's signs of life."""
SILENT_SECONDS = 120.0
"""Without a sign of life for so long, a child counts as lost. A thread of its own gives them, so neither computing nor
loading delays them; code that holds the interpreter's lock does, for some seconds."""
END_SECONDS = 10.0
"""How long a child that was asked to end may take."""
EXIT_FAILED, EXIT_ORPHAN = 2, 3

BOOTSTRAP = "from nanoflow.parallel.processes import enter; enter({target!r}, {parent}, {life}, {link})"
"""What a child's interpreter runs, once modules are found where the parent finds them."""


class Process(Protocol):
    """What is needed of a process; `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit status, minus the signal that killed it; None if that is not known. Raises
        subprocess.TimeoutExpired."""
        ...

    def kill(self) -> None:
        """SIGKILL; nothing if it has ended."""
        ...


class Child:
    """A process that was started, or that joined."""

    def __init__(self, name: str, process: Process, link: Line, life: Line) -> None:
        self.name = name
        """What messages call it, such as ``rank 1``."""
        self.process = process
        self.link = link
        """To the child's own code. Closing it asks the child to end; at its death, receiving raises EOFError or
        OSError."""
        self.life = life

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self, patience: float = END_SECONDS) -> None:
        """Ask it to end; kill it if it has not after `patience` seconds. Safe to call again."""
        self.link.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
        # `life` stays open as long as this object is there: a watch may be listening to it.

    def kill(self) -> None:
        """End it at once, without its own doing, and wait until it has."""
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # uninterruptible, in the kernel: it ends when that lets it
            self.process.wait(END_SECONDS)


@dataclass(frozen=True)
class Loss:
    """How a child was lost."""

    child: Child
    text: str
    """What to tell the user, the child's name at its head."""
    mistake: type[Exception] | None = None
    """The class of the error that the text is of, if the user can mend it."""
    trace: str = ""
    """The child's traceback, if it raised."""
    signal: int | None = None
    """The signal that killed it."""

    def error(self, text: str) -> Exception | None:
        """The child's mistake with this text; None if it made none, or only tells of a process that it lost itself."""
        if self.mistake is None or issubclass(self.mistake, ParallelError):
            return None
        return self.mistake.__new__(self.mistake, text)  # not by its constructor, which may want something else


def start(target: str, *arguments: Any, name: str, environment: Mapping[str, str] | None = None) -> Child:
    """Start a process that calls ``module:function`` with its end of the link and `arguments`, and ends with it.

    Args:
        arguments: anything that can be pickled.
        environment: variables that it has beside the parent's.
    """
    link, far_link = Pipe()
    life, far_life = Pipe()
    passed = (far_life.fileno(), far_link.fileno())
    # The kernel counts the thread that started a child as its parent: only the main one lasts as long as the process.
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
    code = BOOTSTRAP.format(target=target, parent=parent, life=passed[0], link=passed[1])
    process = subprocess.Popen(
        # -P: no folder is put before those of the parent, and nothing in the working folder is taken for a module.
        [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        stdin=subprocess.DEVNULL,
        stdout=2,  # the parent's standard output may be the results
        pass_fds=passed,
        env={**os.environ, **(environment or {})},
        start_new_session=True,  # Ctrl-C in a terminal is for the parent alone
    )
    far_link.close()
    far_life.close()
    child = Child(name, process, link, life)
    with suppress(OSError):  # it has ended already: whoever watches it says so
        link.send(arguments)
    return child


def enter(target: str, parent: int, life: int, link: int) -> None:
    """A child's whole course; does not return. `life` and `link` are inherited file descriptors.

    `parent` is the process whose end the kernel is to answer with this one's; 0: nobody's.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for inherited in (life, link):
        os.set_inheritable(inherited, False)  # a process that this one starts must not keep the lines open
    if parent:
        _die_with(parent)
    near = Connection(link)

    def work() -> None:
        module, _, function = target.partition(":")
        arguments = near.recv()
        getattr(import_module(module), function)(near, *arguments)

    live(work, Connection(life))


def live(work: Callable[[], None], life: Line) -> None:
    """Call `work` and end the process with it; does not return. What it raises are the process's last words."""
    global _guardian
    _guardian = guardian = _Guardian(life)
    guardian.start()
    status = 0
    try:
        work()
    except BaseException as error:  # EOFError of a link that the parent has closed is one, which nobody hears
        guardian.tell(_last_words(error))
        status = EXIT_FAILED
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    # Not the interpreter's own end: it would wait for threads that compute, and for libraries that wait for peers.
    os._exit(status)


def leave(text: str) -> NoReturn:
    """End this process at once, whatever its threads wait for. `text` says why: to its parent if it is a child, else on
    standard error."""
    if _guardian is None or not _guardian.tell((text, ParallelError, "")):
        show_cursor = "\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""
        with suppress(OSError):
            os.write(2, f"\r{show_cursor}error: {text}\n".encode())  # not print: a thread may hang inside of one
    os._exit(EXIT_FAILED)


def _last_words(error: BaseException) -> tuple[str, type[Exception] | None, str]:
    """Text, the error's class if it is meant for the user, traceback."""
    from nanoflow.mistakes import is_mistake

    trace = "".join(traceback.format_exception(error))
    if isinstance(error, Exception) and is_mistake(error):
        told = error.mistake if isinstance(error, ParallelError) else None  # of a rank that this process has started
        return str(error), type(told or error), trace
    return f"{type(error).__name__}: {error}", None, trace


class _Guardian(threading.Thread):
    """Tells the parent that this process lives, and ends the process when the parent has ended."""

    def __init__(self, life: Line) -> None:
        super().__init__(name="guardian", daemon=True)
        self._life = life
        self._sending = threading.Lock()

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._life.fileno(), 0)  # nothing but the other end's closing
        while not poll.poll(BEAT_SECONDS * 1e3):
            if not self.tell(None):
                break
        os._exit(EXIT_ORPHAN)

    def tell(self, words: object) -> bool:
        """Whether the parent is there to hear them."""
        try:
            with self._sending:
                self._life.send(words)
        except OSError:
            return False
        return True


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; where it cannot, the guardian alone sees to that."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended in the meantime
        os._exit(EXIT_ORPHAN)


_guardian: _Guardian | None = None
"""Of this process, if it is a child."""


class Watch:
    """Listens to children and tells of each one's loss, once.

    Args:
        lost: called from the watch's own thread.
        silent_seconds: without a sign of life for so long, a child is lost. Time in which this process itself was
            stopped does not count.
    """

    def __init__(self, lost: Callable[[Loss], None], *, silent_seconds: float = SILENT_SECONDS) -> None:
        self._lost = lost
        self._silent_seconds = silent_seconds
        self._silence: dict[Child, float] = {}
        self._lock = threading.Lock()
        self._stop, self._stopped = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()

    def add(self, child: Child) -> None:
        """Watch it from now on."""
        with self._lock:
            self._silence[child] = 0.0

    def remove(self, child: Child) -> None:
        """From now on its end is expected. Do it before the child is asked to end."""
        with self._lock:
            self._silence.pop(child, None)

    def close(self) -> None:
        """Watch none of them any more."""
        with self._lock:
            self._silence.clear()
        self._stopped.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _listen(self) -> None:
        before = time.monotonic()
        tick = min(BEAT_SECONDS, self._silent_seconds) / 2
        while True:
            with self._lock:
                by_line = {child.life: child for child in self._silence}
            ready = wait([*by_line, self._stop], tick)
            if self._stop in ready:
                return
            now = time.monotonic()
            passed, before = min(now - before, 2 * tick), now
            losses = [self._hear(by_line[line]) for line in ready if isinstance(line, Connection)]
            losses += self._grow_silent(passed)
            for loss in losses:
                with self._lock:
                    known = loss is not None and self._silence.pop(loss.child, None) is not None
                if loss is not None and known:
                    self._lost(loss)

    def _hear(self, child: Child) -> Loss | None:
        try:
            words = child.life.recv()
        except (EOFError, OSError):
            return _end_of(child)
        if words is None:
            with self._lock:
                if child in self._silence:
                    self._silence[child] = 0.0
            return None
        text, mistake, trace = words
        return Loss(child, f"{child.name}: {text}" if mistake else f"{child.name} failed: {text}", mistake, trace)

    def _grow_silent(self, seconds: float) -> list[Loss | None]:
        with self._lock:
            for child in self._silence:
                self._silence[child] += seconds
            silent = [child for child, silence in self._silence.items() if silence > self._silent_seconds]
        text = "{} (process {}) has given no sign of life for {:.0f} s: it hangs, or was stopped"
        return [Loss(child, text.format(child.name, child.pid, self._silent_seconds)) for child in silent]


def _end_of(child: Child) -> Loss:
    """Of a child that ended without a word."""
    who = f"{child.name} (process {child.pid})"
    try:
        status = child.process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return Loss(child, f"{who} has closed its line and still runs")
    if status is None or status >= 0:
        known = "" if status is None else f"with status {status} and "
        return Loss(child, f"{who} has ended {known}without a word")
    hint = "; if nobody did that, memory ran out: see the system's log" if -status == signal.SIGKILL else ""
    return Loss(child, f"{who} was killed by {signal.Signals(-status).name}{hint}", signal=-status)
