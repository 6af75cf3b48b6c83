"""`LLM` called from threads and from signal handlers: calls run one after the other, and nothing waits for ever."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.errors import InputError
from tests.unit.tiny_model import save_tiny_llama

SIZES: dict[str, Any] = {"device": "cpu", "kv_memory": "1MiB", "page_size": 8, "max_running": 3}
WAYS = [{}, {"tensor": 2}, {"data": 2}]
LONG = SamplingParams(max_tokens=60, ignore_eos=True)
LIMIT = 60.0
CLOSED = "^the model is closed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("threads") / "model")


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def before_step(llm: LLM, monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Call `act` with 0, 1, ... before each of the model's steps."""
    runs: Any = llm.engine if llm._pool is None else llm._pool
    step, steps = runs.step, iter(range(10**9))

    def acting() -> Any:
        act(next(steps))
        return step()

    monkeypatch.setattr(runs, "step", acting)


@pytest.mark.parametrize("parallel", WAYS)
def test_each_thread_gets_its_own_outputs(folder: Path, parallel: dict[str, int]) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[[10 * thread + number + 1] * 5 for number in range(3)] for thread in range(3)]
    with LLM(folder, **parallel, **SIZES) as llm:
        expected = [[output.outputs[0].token_ids for output in llm.generate(each, params)] for each in prompts]
        with ThreadPoolExecutor(3) as threads:
            for _ in range(2):
                together = threading.Barrier(3)

                def generate(each: list[list[int]], together: threading.Barrier = together) -> list[list[int]]:
                    together.wait(LIMIT)
                    outputs = llm.generate(each, params)
                    assert [output.prompt_token_ids for output in outputs] == each
                    return [output.outputs[0].token_ids for output in outputs]

                assert list(threads.map(generate, prompts, timeout=LIMIT)) == expected


@pytest.mark.parametrize("parallel", WAYS)
def test_close_waits_for_the_call_that_runs_and_refuses_those_that_wait(
    folder: Path, parallel: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(folder, **parallel, **SIZES)
    running, go_on = threading.Event(), threading.Event()

    def hold(step: int) -> None:
        running.set()
        assert go_on.wait(LIMIT)

    before_step(llm, monkeypatch, hold)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(llm.generate, [[5, 6]] * 4, LONG)
        assert running.wait(LIMIT)
        second = threads.submit(llm.generate, [[5, 6]], LONG)
        closing = threads.submit(llm.close)
        time.sleep(0.1)
        assert not closing.done() and not second.done()
        go_on.set()
        assert [len(output.outputs[0].token_ids) for output in first.result(LIMIT)] == [60] * 4
        with pytest.raises(InputError, match=CLOSED):
            second.result(LIMIT)
        closing.result(LIMIT)
    llm.close()
    for prompt in ([[5]], "abc"):
        with pytest.raises(InputError, match=CLOSED):
            llm.generate(prompt)


@pytest.fixture
def at_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Sets what SIGUSR1 does."""
    before = signal.getsignal(signal.SIGUSR1)

    def set_act(act: Callable[[], None]) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: act())

    yield set_act
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("parallel", WAYS)
def test_a_signal_handler_may_close(
    folder: Path, parallel: dict[str, int], monkeypatch: pytest.MonkeyPatch, at_signal: Any
) -> None:
    llm = LLM(folder, **parallel, **SIZES)
    refused: list[str] = []

    def handle() -> None:
        try:
            llm.generate([[5]])
        except InputError as error:
            refused.append(str(error))
        llm.close()
        llm.close()

    at_signal(handle)
    before_step(llm, monkeypatch, lambda step: os.kill(os.getpid(), signal.SIGUSR1) if step == 2 else None)
    with pytest.raises(InputError, match=CLOSED):
        llm.generate([[5, 6]] * 4, LONG)
    assert refused == ["a call is going on in this thread; a signal handler cannot begin another inside of it"]
    with pytest.raises(InputError, match=CLOSED):
        llm.generate([[5]])
    llm.close()
    if llm._pool is not None:
        assert llm._pool._closed and all(one.child.process.wait(0) is not None for one in llm._pool._all)


@pytest.mark.parametrize("parallel", WAYS[:2])
def test_an_interrupted_call_leaves_the_lock(
    folder: Path, parallel: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    llm = LLM(folder, **parallel, **SIZES)
    before_step(llm, monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6]] * 4, LONG)
    with ThreadPoolExecutor(1) as threads:
        if parallel:
            with pytest.raises(InputError, match=CLOSED):
                threads.submit(llm.generate, [[5]]).result(LIMIT)
        else:
            assert len(threads.submit(llm.generate, [[5]], LONG).result(LIMIT)) == 1
        threads.submit(llm.close).result(LIMIT)


SCRIPT = """
import atexit, signal, sys, threading, time
from nanoflow import LLM, SamplingParams

llm = LLM({model!r}, **{options!r})
{atexit}
def endless():
    while True:
        llm.generate([[5, 6]] * 4, SamplingParams(max_tokens=60, ignore_eos=True))

thread = threading.Thread(target=endless, daemon=True)
thread.start()
time.sleep(0.3)
print("end", flush=True)
"""


@pytest.mark.parametrize("closing", ["", "atexit.register(llm.close)"])
@pytest.mark.parametrize("parallel", WAYS[:2])
def test_the_interpreter_ends_while_a_thread_generates(folder: Path, parallel: dict[str, int], closing: str) -> None:
    script = textwrap.dedent(SCRIPT).format(model=str(folder), options=SIZES | parallel, atexit=closing)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "end\n"
