"""What children of the tests run."""

import os
import signal
import time

from nanoflow.errors import ConfigError
from nanoflow.parallel.processes import Line, start


def echo(link: Line, prefix: str) -> None:
    """Answer until the link ends."""
    while True:
        link.send((prefix, link.recv(), os.getpid()))


def tell_pid_and(link: Line, what: str) -> None:
    """Say which process this is, then do as told."""
    link.send(os.getpid())
    if what == "raise":
        raise ArithmeticError("seven is no even number")
    if what == "mistake":
        raise ConfigError("engine.device: cuda:9 is not there; use cuda:0")
    if what == "exit":
        os._exit(0)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "return":
        return
    while True:  # deaf to the end of its link
        time.sleep(1)


def with_child(link: Line, what: str) -> None:
    """Start a child of one's own, hand its process id on, and wait."""
    child = start("tests.unit.process_targets:tell_pid_and", what, name="grandchild")
    link.send(child.link.recv())
    link.recv()


def sums_of_batches(link: Line) -> None:
    """Take batches and answer each with a sum."""
    from multiprocessing.reduction import recv_handle

    from nanoflow.parallel.batches import BatchReader

    reader = BatchReader(recv_handle(link), 0, link, readers=1)
    while True:
        batch = reader.take()
        assert batch is not None
        link.send(int(batch.kv_index.astype(object).sum()))
