"""Ranks and replicas that start fast: forks of a process that has imported torch, in place of fresh interpreters.

A run's process calls `install` before anything else, while it has a single thread. What is started then differs from
what a user's run starts in how it comes to be alone; it does the same, and rank 0 hears of its end in the same way.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from typing import Any, NoReturn

import nanoflow.parallel.group
import nanoflow.parallel.worker  # before the forks
import nanoflow.replicas.serve
import nanoflow.replicas.start
from nanoflow.parallel.processes import Child, enter

_ASKING = threading.Lock()
"""One question at a time: the watch and the main thread wait for ranks."""


def install(sabotage: str = "") -> None:
    """From now on, ranks and replicas of this process are forks, which run the Python code `sabotage` first (`rank` is
    their number). The ranks of a replica are not."""
    near, far = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        near.close()
        _serve(far, sabotage)
    far.close()

    def start(target: str, *arguments: Any, name: str, environment: Mapping[str, str] | None = None) -> Child:
        return _start(near, target, arguments, name, dict(environment or {}))

    nanoflow.parallel.group.start = nanoflow.replicas.start.start = start  # type: ignore[attr-defined]


def _serve(line: socket.socket, sabotage: str) -> NoReturn:
    while True:
        data, descriptors, _, _ = socket.recv_fds(line, 1000, 2)
        if not data:
            os._exit(0)
        order = json.loads(data)
        if "wait" in order:
            ended, status = os.waitpid(order["wait"], os.WNOHANG)
            line.send(json.dumps(os.waitstatus_to_exitcode(status) if ended else None).encode())
            continue
        pid = os.fork()
        if pid == 0:
            line.close()
            os.setsid()
            os.environ.update(order["environment"])
            exec(sabotage, {"rank": int(order["name"].split()[-1])})
            enter(order["target"], 0, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        line.send(json.dumps(pid).encode())


class _Fork:
    def __init__(self, line: socket.socket, pid: int) -> None:
        self.pid, self._line = pid, line
        self._status: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (1e9 if timeout is None else timeout)
        while True:
            with _ASKING:
                if self._status is None:
                    self._line.send(json.dumps({"wait": self.pid}).encode())
                    self._status = json.loads(self._line.recv(1000))
                if self._status is not None:
                    return self._status
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            time.sleep(0.005)

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)


def _start(
    line: socket.socket, target: str, arguments: tuple[Any, ...], name: str, environment: dict[str, str]
) -> Child:
    link, far_link = Pipe()
    life, far_life = Pipe()
    order = json.dumps({"target": target, "name": name, "environment": environment}).encode()
    with _ASKING:
        socket.send_fds(line, [order], [far_life.fileno(), far_link.fileno()])
        pid = json.loads(line.recv(1000))
    far_link.close()
    far_life.close()
    link.send(arguments)
    return Child(name, _Fork(line, pid), link, life)
