"""Ranks and replicas that are killed in the middle of a run, and replicas that are not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.gpu.checkpoints import save_model
from tests.gpu.sharing import ROOT, environment
from tests.unit.tiny_model import VOCAB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
START_SECONDS = 120.0
"""Kernels are compiled, graphs captured."""
LIMIT = 30.0
"""From a kill to the end of the run."""
REQUESTS = 400


class Job:
    """Requests whose outputs take a while: a few run at a time."""

    def __init__(self, folder: Path, requests: int = REQUESTS, **parallel: int) -> None:
        self.folder = folder
        self.output = folder / "out.jsonl"
        model = folder / "model"
        model.mkdir()
        save_model(model, head_dim=64, num_key_value_heads=2, vocab_size=VOCAB + 1)
        rng = random.Random(5)
        prompts = [[rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 50))] for _ in range(requests)]
        lines = (json.dumps({"custom_id": str(number), "prompt": prompt}) for number, prompt in enumerate(prompts))
        (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
        config = {
            "model": {"path": str(model), "dtype": "float32"},
            "workload": {"input": str(folder / "in.jsonl")},
            "sampling": {"max_tokens": 100, "ignore_eos": True},
            "engine": {"device": "cuda", "kv_memory": "64MiB", "page_size": 16, "max_running": 8},
            "parallel": parallel,
            "output": {"path": str(self.output)},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(config))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nanoflow", "run", str(self.folder / "job.yaml"), "--quiet", *arguments]
        return subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(mps=False), start_new_session=True
        )

    def answers(self) -> dict[str, Any]:
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        records = [json.loads(line) for line in lines]
        return {record["custom_id"]: record["response"]["body"]["choices"] for record in records}

    def wait_for_lines(self, run: subprocess.Popen[str], count: int) -> None:
        end = time.monotonic() + START_SECONDS
        while not self.output.exists() or self.output.read_bytes().count(b"\n") < count:
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Ranks or replicas that `pid` has started, by their age."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdecimal():
                continue
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"python" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and messages."""
    try:
        _, messages = run.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    return run.returncode, messages


@pytest.mark.parametrize("lines", [1, 37])
def test_a_killed_rank_ends_the_run_with_a_message_and_what_was_finished_is_there(tmp_path: Path, lines: int) -> None:
    job = Job(tmp_path, tensor=2)
    run = job.start()
    job.wait_for_lines(run, lines)
    (rank,) = children(run.pid)
    os.kill(rank, signal.SIGKILL)
    status, messages = ended(run)
    assert status == 2, messages
    assert f"rank 1 (process {rank}) was killed by SIGKILL" in messages and "Traceback" not in messages
    assert lines <= len(job.answers()) < REQUESTS
    assert not children(run.pid)


def test_a_killed_rank_0_takes_the_other_with_it(tmp_path: Path) -> None:
    job = Job(tmp_path, tensor=2)
    run = job.start()
    job.wait_for_lines(run, 3)
    (rank,) = children(run.pid)
    run.kill()
    run.communicate(timeout=LIMIT)
    end = time.monotonic() + LIMIT
    while Path(f"/proc/{rank}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_replicas_answer_as_one_engine_and_the_death_of_one_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = Job(tmp_path / "one", 80), Job(tmp_path / "two", 80, data=2)
    assert one.start().wait(START_SECONDS) == 0
    run = two.start()
    two.wait_for_lines(run, 5)
    killed = children(run.pid)[-1]
    os.kill(killed, signal.SIGKILL)
    run_end = time.monotonic() + START_SECONDS
    while run.poll() is None:
        assert time.monotonic() < run_end
        time.sleep(0.1)
    messages = run.communicate()[1]
    assert run.returncode == 0, messages
    assert f"(process {killed}) was killed by SIGKILL" in messages
    assert two.answers() == one.answers()
