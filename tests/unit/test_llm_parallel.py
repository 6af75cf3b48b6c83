"""`LLM` with ranks and replicas on a CPU: tokens of one device, one message whatever is lost, no process left."""

import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM, SamplingParams, llm as llm_module
from nanoflow.errors import ConfigError, InputError, OutOfMemoryError, ParallelError, UserError
from nanoflow.pipeline.plan import PlanError
from tests.unit.tiny_model import save_tiny_llama

SIZES: dict[str, Any] = {"device": "cpu", "kv_memory": "1MiB", "page_size": 8, "max_running": 3}
PROMPTS = [[5, 6, 7], [9] * 20, [11], [12, 13], [14, 15, 16, 17, 18], [20, 21]]
PARAMS = [
    SamplingParams(max_tokens=9, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=1.0, n=2, ignore_eos=True),
    SamplingParams(max_tokens=5, temperature=1.1, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=6, structured_outputs={"regex": "[a-d]{4}"}),
    SamplingParams(max_tokens=30, stop=["zz"], ignore_eos=True),
]
LIMIT = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    end = time.monotonic() + LIMIT
    while left := processes_of(os.getpid()):
        assert time.monotonic() < end, f"processes {left} are left"
        time.sleep(0.02)


def processes_of(parent: int) -> list[int]:
    """Ranks and replicas below process `parent`, by its environment, which they inherit."""
    mark = f"NANOFLOW_TEST_PARENT={parent}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            if mark in (entry / "environ").read_bytes().split(b"\0") and (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLOW_TEST_PARENT", str(os.getpid()))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def plain(outputs: list[Any]) -> list[Any]:
    """All but times and the last bits of log-probabilities."""
    return [
        (o.prompt, o.prompt_token_ids, o.key, o.error, [(c.token_ids, c.text, c.finish_reason) for c in o.outputs])
        for o in outputs
    ]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Any]:
    """Of two calls."""
    with LLM(model, **SIZES) as llm:
        return [plain(llm.generate(PROMPTS, PARAMS)), plain(llm.generate("abc", PARAMS[2]))]


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"data": 2}])
def test_several_give_the_tokens_of_one(model: Path, expected: list[Any], parallel: dict[str, int]) -> None:
    threads = torch.get_num_threads()
    with LLM(model, **parallel, **SIZES) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        assert plain(outputs) == expected[0]
        assert outputs[2].outputs[0].logprobs is not None and len(outputs[2].outputs[0].logprobs[0].top) == 2
        with pytest.raises(InputError, match="prompt 1: prompt: token id 9999 is unknown"):
            llm.generate([[5], [9999]])
        with pytest.raises(InputError, match=r"prompt 0: prompt: .* leaves no room for output"):
            llm.generate([[5] * 200])
        assert plain(llm.generate("abc", PARAMS[2])) == expected[1], "what was refused has no place among the seeds"
        assert torch.get_num_threads() == threads
    llm.close()
    with pytest.raises(InputError, match="the model is closed"):
        llm.generate([[5]])


def test_what_cannot_be_is_refused_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^tensor_parallel_size: unknown key; did you mean tensor\?$"):
        LLM(model, tensor_parallel_size=2, **SIZES)
    with pytest.raises(InputError, match=r"^tensor: 0 is not allowed"):
        LLM(model, tensor=0, **SIZES)
    with pytest.raises(UserError, match="3 ranks cannot share this model"):
        LLM(model, tensor=3, **SIZES)
    monkeypatch.setattr(llm_module, "place", lambda: object())
    with pytest.raises(ConfigError, match="start the script without torchrun"):
        LLM(model, tensor=2, **SIZES)


@pytest.mark.parametrize(
    ("kind", "changes"), [(PlanError, {"plan": "no_such_plan.yaml"}), (OutOfMemoryError, {"kv_memory": "1KiB"})]
)
def test_errors_at_the_start_are_those_of_one_device(
    model: Path, kind: type[Exception], changes: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    said = set()
    for parallel in ({}, {"tensor": 2}, {"data": 2}):
        with pytest.raises(kind) as raised:
            LLM(model, **parallel, **SIZES | changes)
        assert raised.type is kind
        said.add(re.sub(r"[0-9.]+ [KMG]iB", "SIZE", str(raised.value)))  # a rank needs less, and what is free changes
    assert len(said) == 1
    assert not capfd.readouterr().err


NO_MEMORY = """
import nanoflow.parallel.worker as w
from nanoflow.errors import OutOfMemoryError
def none(*arguments): raise OutOfMemoryError("engine.kv_memory: 3 GiB are missing; lower it")
w.kv_pages = none
"""


def test_a_mistake_of_another_rank_keeps_its_class(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_MEMORY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    with pytest.raises(OutOfMemoryError, match=r"^rank 1: engine.kv_memory: 3 GiB are missing; lower it$"):
        LLM(model, tensor=2, **SIZES)


def rank_below(llm: LLM) -> int:
    """A process that one of the model's processes has started: rank 1."""
    found = processes_of(os.getpid())
    assert llm._pool is not None
    own = [replica.child.pid for replica in llm._pool._all]
    return next(pid for pid in found if pid not in own)


@pytest.mark.parametrize("when", ["idle", "running"])
def test_a_rank_that_is_lost(model: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model, tensor=2, **SIZES)
    victim = rank_below(llm)
    if when == "idle":
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
    else:
        assert llm._pool is not None
        step, steps = llm._pool.step, []

        def killing() -> Any:
            steps.append(0)
            if len(steps) == 3:
                os.kill(victim, signal.SIGKILL)
            return step()

        monkeypatch.setattr(llm._pool, "step", killing)
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(ParallelError, match=rf"^rank 1 \(process {victim}\) was killed by SIGKILL"):
            llm.generate([[5, 6]] * 40, SamplingParams(max_tokens=100, ignore_eos=True))
    assert time.monotonic() - begun < LIMIT
    llm.close()


def test_a_replica_that_is_lost_is_done_without(
    model: Path, expected: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with LLM(model, data=2, **SIZES) as llm:
        assert llm._pool is not None
        os.kill(llm._pool._all[0].child.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert plain(llm.generate(PROMPTS, PARAMS)) == expected[0]
    assert "warning: replica 0 (process" in capfd.readouterr().err


def test_a_call_that_is_interrupted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model, data=2, **SIZES)

    def interrupted() -> Any:
        raise KeyboardInterrupt

    assert llm._pool is not None
    monkeypatch.setattr(llm._pool, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5]])
    with pytest.raises(InputError, match="a call was interrupted; make it anew"):
        llm.generate([[5]])


SCRIPT = """
import sys
from nanoflow import LLM, SamplingParams

sizes = {sizes!r}
for data in (1, 1):  # one after the other; the first is dropped, not closed
    llm = LLM({model!r}, tensor=2, data=data, **sizes)
    print(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids, flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("raise ArithmeticError", 1), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_scripts_leave_nothing(model: Path, tmp_path: Path, end: str, status: int) -> None:
    """Without a main guard, and without closing."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(sizes=SIZES, model=str(model), end=end))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert status == 1 or "Traceback" not in done.stderr, done.stderr
