"""Children: what they are told, how the parent hears of their end, and that they end when it does."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from nanoflow.errors import ConfigError
from nanoflow.parallel import processes
from nanoflow.parallel.processes import Child, Loss, Watch, start

TARGETS = "tests.unit.process_targets:"
LIMIT = 30.0
PARENT = """
import sys, threading, time
sys.path[:] = {path!r}
from nanoflow.parallel.processes import start
def go():
    child = start({target!r}, {what!r}, name="rank 1")
    print(child.link.recv(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def begin() -> Iterator[Callable[..., Child]]:
    """Starts children, which are gone after the test."""
    started: list[Child] = []

    def begin(function: str, *arguments: object, name: str = "rank 1") -> Child:
        started.append(start(TARGETS + function, *arguments, name=name))
        return started[-1]

    yield begin
    for child in started:
        child.kill()


def gone(pid: int) -> bool:
    """Whether a process has ended; one that waits for its parent's notice has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def assert_ends(pid: int) -> None:
    end = time.monotonic() + LIMIT
    while not gone(pid):
        assert time.monotonic() < end, f"process {pid} still runs"
        time.sleep(0.01)


def loss_of(child: Child, silent_seconds: float = LIMIT) -> Loss:
    heard: queue.Queue[Loss] = queue.Queue()
    watch = Watch(heard.put, silent_seconds=silent_seconds)
    watch.add(child)
    loss = heard.get(timeout=LIMIT)
    watch.close()
    assert heard.empty()
    return loss


def test_a_child_answers_and_ends_with_its_link(begin: Callable[..., Child]) -> None:
    child = begin("echo", "you said")
    child.link.send({"large": list(range(100_000))})
    prefix, said, pid = child.link.recv()
    assert (prefix, said["large"][-1], pid) == ("you said", 99_999, child.pid) and pid != os.getpid()
    child.end(LIMIT)
    assert gone(pid)
    child.end()  # again is nothing


def test_a_child_ignores_what_a_terminal_sends_to_all(begin: Callable[..., Child]) -> None:
    child = begin("echo", "")
    child.link.send(1)
    child.link.recv()
    assert os.getsid(child.pid) != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, number)
    child.link.send("still there?")
    assert child.link.recv()[1] == "still there?"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("raise", "rank 1 failed: ArithmeticError: seven is no even number"),
        ("mistake", "rank 1: engine.device: cuda:9 is not there; use cuda:0"),
        ("exit", "rank 1 (process {pid}) has ended with status 0 and without a word"),
        ("return", "rank 1 (process {pid}) has ended with status 0 and without a word"),
    ],
)
def test_the_parent_hears_how_a_child_ended(begin: Callable[..., Child], what: str, text: str) -> None:
    child = begin("tell_pid_and", what)
    loss = loss_of(child)
    assert loss.child is child and loss.text == text.format(pid=child.pid)
    assert loss.mistake is (ConfigError if what == "mistake" else None)
    assert ("ArithmeticError: seven" in loss.trace and "tell_pid_and" in loss.trace) is (what == "raise")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_parent_hears_of_a_kill(begin: Callable[..., Child], number: signal.Signals) -> None:
    child = begin("tell_pid_and", "wait")
    child.link.recv()
    os.kill(child.pid, number)
    loss = loss_of(child)
    assert loss.signal == number and f"(process {child.pid}) was killed by {number.name}" in loss.text
    assert ("memory ran out" in loss.text) is (number == signal.SIGKILL)


def test_a_child_that_is_stopped_grows_silent(begin: Callable[..., Child]) -> None:
    loud, stopped = begin("tell_pid_and", "wait", name="rank 1"), begin("tell_pid_and", "stop", name="rank 2")
    heard: queue.Queue[Loss] = queue.Queue()
    watch = Watch(heard.put, silent_seconds=5.5)
    for child in (loud, stopped):
        child.link.recv()  # it has started
        watch.add(child)
    loss = heard.get(timeout=LIMIT)
    watch.close()
    assert loss.child is stopped and "rank 2" in loss.text and "no sign of life for 6 s" in loss.text
    assert heard.empty()


def test_one_that_is_expected_to_end_is_no_loss(begin: Callable[..., Child]) -> None:
    ends, lost = begin("echo", ""), begin("tell_pid_and", "wait", name="rank 2")
    heard: queue.Queue[Loss] = queue.Queue()
    watch = Watch(heard.put)
    watch.add(ends)
    watch.add(lost)
    watch.remove(ends)
    ends.end(LIMIT)
    lost.kill()
    assert heard.get(timeout=LIMIT).child is lost
    watch.close()
    assert heard.empty()


def test_a_child_that_does_not_end_is_killed(begin: Callable[..., Child]) -> None:
    child = begin("tell_pid_and", "wait")
    child.link.recv()
    child.end(0.05)
    assert gone(child.pid)


# One that is stopped can only be ended by the kernel, which asks whether the thread that started it is there.
@pytest.mark.parametrize(("what", "from_main"), [("wait", True), ("wait", False), ("stop", True)])
def test_children_end_with_a_parent_that_is_killed(begin: Callable[..., Child], what: str, from_main: bool) -> None:
    code = PARENT.format(path=sys.path, target=TARGETS + "tell_pid_and", what=what)
    code += "go()" if from_main else "threading.Thread(target=go).start()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    assert_ends(pid)


def test_grandchildren_end_with_a_child_that_is_killed(begin: Callable[..., Child]) -> None:
    child = begin("with_child", "wait")
    pid = child.link.recv()
    child.kill()
    assert_ends(pid)


def test_the_working_folder_hides_no_module(
    begin: Callable[..., Child], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    with open("selectors.py", "w") as file:
        file.write("raise RuntimeError('a file of the user')")
    child = begin("echo", "")
    child.link.send(1)
    assert child.link.recv()[1] == 1


def test_beats_are_far_more_frequent_than_what_is_taken_for_silence() -> None:
    assert processes.BEAT_SECONDS * 10 < processes.SILENT_SECONDS
