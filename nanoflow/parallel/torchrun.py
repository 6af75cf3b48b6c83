"""Ranks that torchrun has started: how they find rank 0, which takes them for the children it would have started.

All ranks of a run are processes of one machine and one user. Rank 0 listens on a Unix socket whose name is in no folder
(so nothing of it is left behind) and follows from what torchrun told all of them; each rank opens its two lines there.
"""

import os
import select
import signal
import socket
import struct
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from nanoflow.errors import ConfigError, ParallelError
from nanoflow.parallel.processes import Child, Line, live

__all__ = ["Place", "accept_ranks", "beside_rank_0", "check_place", "place", "serve_as_rank"]

RUN = "TORCHELASTIC_RUN_ID"
"""Torchrun's name of a run, in the environment of each of its processes."""
MEET_SECONDS = 120.0
"""How long ranks wait for each other: the slowest may still be importing."""
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group of a socket's other end."""


@dataclass(frozen=True)
class Place:
    """Which of torchrun's processes this one is."""

    rank: int
    size: int


def place() -> Place | None:
    """Where torchrun has put this process; None if it was not started by torchrun, or alone.

    Raises ConfigError if it has started processes on other machines too.
    """
    found = os.environ
    if RUN not in found or int(found.get("WORLD_SIZE", 1)) == 1:
        return None
    size, here = int(found["WORLD_SIZE"]), int(found.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"]))
    if here != size:
        raise ConfigError(f"torchrun: {size} processes, {here} of them here; a run has one machine: use --nnodes 1")
    return Place(int(found["RANK"]), size)


def beside_rank_0() -> bool:
    """Whether torchrun has started another process that says what there is to say."""
    return RUN in os.environ and os.environ.get("RANK", "0") != "0"


def check_place(tensor: int) -> bool:
    """Whether torchrun starts the ranks. Raises ConfigError if it has started more or fewer than `tensor`."""
    found = place()
    if found is not None and found.size != tensor:
        raise ConfigError(
            f"parallel.tensor: {tensor}, but torchrun has started {found.size} processes; set it to {found.size}, or "
            f"--nproc-per-node to {tensor}"
        )
    return found is not None


def accept_ranks(size: int) -> list[Child]:
    """Rank 0: wait for the others' lines. Raises ParallelError if they do not come in time."""
    lines: dict[tuple[int, str], tuple[Line, int]] = {}
    end = time.monotonic() + MEET_SECONDS
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(_address())
        listener.listen()
        while len(lines) < 2 * (size - 1):
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                near, _ = listener.accept()
            except TimeoutError:
                missing = sorted({*range(1, size)} - {rank for rank, _ in lines})
                raise ParallelError(
                    f"torchrun: ranks {', '.join(map(str, missing))} have not come in {MEET_SECONDS:.0f} s; "
                    "see what torchrun says of them"
                ) from None
            process = _same_user(near)
            if process is None:
                near.close()
                continue
            near.setblocking(True)
            line: Line = Connection(near.detach())
            lines[line.recv()] = line, process
    return [
        Child(f"rank {rank}", _Foreign(lines[rank, "link"][1]), lines[rank, "link"][0], lines[rank, "life"][0])
        for rank in range(1, size)
    ]


def serve_as_rank(rank: int) -> None:
    """Any other rank: the process's whole course; does not return. Says nothing: rank 0 does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a rank 0, torchrun may end this one at once
    link, life = _connect(rank, "link"), _connect(rank, "life")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides

    def work() -> None:
        from nanoflow.parallel.worker import work

        work(link, *link.recv())

    live(work, life)


def _connect(rank: int, what: str) -> Line:
    end = time.monotonic() + MEET_SECONDS
    while True:
        near = socket.socket(socket.AF_UNIX)
        try:
            near.connect(_address())
            break
        except OSError:
            near.close()
            if time.monotonic() > end:
                os._exit(1)  # rank 0 never came, and torchrun says so
            time.sleep(0.05)
    if _same_user(near) is None:
        raise ParallelError("torchrun: another user listens where rank 0 should; start the job again")
    line: Line = Connection(near.detach())
    line.send((rank, what))
    return line


def _address() -> str:
    run = "-".join(os.environ.get(name, "") for name in (RUN, "MASTER_PORT"))
    return f"\0nanoflow-{os.getuid()}-{run}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"


def _same_user(near: socket.socket) -> int | None:
    """The process at the other end; None if it is another user's, whose messages must not be unpacked."""
    process, user, _ = _CREDENTIALS.unpack(near.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(process) if user == os.getuid() else None


class _Foreign:
    """A process that another one has started; see `Process`. Its exit status is its parent's to know."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)  # which no later process of the same number is

    def wait(self, timeout: float | None = None) -> int | None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1e3):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
