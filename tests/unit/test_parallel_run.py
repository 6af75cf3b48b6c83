"""`nanoflow run` with several ranks, on gloo: the tokens of one rank, and one clear end whichever process is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.forks import SLOW, ForkServer, Job, Run, wait_for_lines
from tests.unit.tiny_model import request_lines, save_tiny_llama

LIMIT = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("ranks") / "model")


class RankJob(Job):
    """Ten requests, greedy ones and sampled ones, and a bad line; three run at a time, on two ranks."""

    def __init__(self, folder: Path, model: Path, server: ForkServer) -> None:
        super().__init__(
            server,
            folder,
            model,
            ["bad", *map(json.dumps, request_lines(10))],
            sampling={"max_tokens": 6, "ignore_eos": True},
            engine={"max_running": 3},
            parallel={"tensor": 2},
        )

    def start(self, *arguments: str, **options: Any) -> Run:
        """Start the run, its ranks as forks if nothing else is asked."""
        return super().start(*arguments, **{"fast": True} | options)


@pytest.fixture
def job(tmp_path: Path, model: Path, server: ForkServer) -> Iterator[RankJob]:
    job = RankJob(tmp_path, model, server)
    yield job
    end = time.monotonic() + LIMIT
    while left := processes_of(job):  # a process that was killed by its line's end may need a moment
        assert time.monotonic() < end, f"processes {left} are left"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, model: Path, server: ForkServer) -> dict[str | None, Any]:
    """What a run on one rank writes."""
    job = RankJob(tmp_path_factory.mktemp("one"), model, server)
    run = job.start("--set", "parallel.tensor=1", fast=False)
    assert run.wait() == 1, run.stderr
    assert len(job.records()) == 11
    return job.records()


def processes_of(job: RankJob) -> list[int]:
    """Processes that write to the terminal of the job's run: its ranks, unless they have ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.readlink(entry / "fd/2") == str(job.folder / "stderr"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def workers(run: Run, job: RankJob) -> list[int]:
    """The other ranks, once they are there (and, of forks, what forks them: it has no line to rank 0)."""
    end = time.monotonic() + LIMIT
    while True:
        found = [pid for pid in processes_of(job) if pid != run.pid and os.getsid(pid) == pid]
        if found:
            return found
        assert time.monotonic() < end
        time.sleep(0.005)


def assert_lost(run: Run, text: str, seconds: float = LIMIT) -> None:
    """The run ends in time, with the one message that `text` is in."""
    started = time.monotonic()
    assert run.wait() == 2, run.stderr
    assert time.monotonic() - started < seconds
    assert run.stderr.count("error: ") == 1 and "Traceback" not in run.stderr, run.stderr
    message = run.stderr[run.stderr.index("error: ") :]
    assert text in message, run.stderr
    assert "what was finished is in the output, and the same command goes on" in message


def assert_goes_on(job: RankJob, one_rank: dict[str | None, Any]) -> None:
    run = job.start()
    assert run.wait() == 1, run.stderr
    assert job.records() == one_rank


def test_ranks_give_the_tokens_of_one(job: RankJob, one_rank: dict[str | None, Any]) -> None:
    run = job.start(fast=False)
    assert run.wait() == 1, run.stderr
    assert job.records() == one_rank
    assert "Traceback" not in run.stderr and "rank" not in run.stderr
    report = job.report
    assert report["parallel"] == {"tensor": 2, "data": 1} and report["device"] == "cpu"
    assert "on cpu, tensor 2, float32" in run.stdout
    assert "GB/s on the wire, on each of 2 devices)" in " ".join(run.stdout.replace("│", " ").split())
    more = job.start("--set", "parallel.tensor=4", "--restart")  # more than there are key/value heads
    assert more.wait() == 1, more.stderr
    assert job.records() == one_rank
    # The same work on twice the devices, but for what all of them do: norms, and key/value heads that two hold.
    with_four = job.report
    for resource in ("compute", "memory"):
        assert 0.35 < with_four["bound_seconds"][resource] / report["bound_seconds"][resource] < 0.95
    # What they send, and what the link between them was measured to carry.
    assert report["ceilings"]["link_bytes_per_second"] > 1e6 and report["bound_seconds"]["network"] > 0


@pytest.mark.parametrize("sharding", ["reduce_scatter", "all_gather"])
def test_plan_files_of_other_shardings(job: RankJob, one_rank: dict[str | None, Any], sharding: str) -> None:
    """For batches of 3 rows and more; the others run in sequence, where the weights allow it with all-reduces."""
    plan = f"{{sharding: {sharding}, capacity: 64, least_rows: 3, "
    plan += "nano_batches: {a: {decode: 1, prefill: 1, rows: 64}}, "
    plan += "period: [whole: {main: [qkv, decode_attention, prefill_attention, o, gate_up, down]}]}"
    (job.folder / "plan.yaml").write_text(plan)
    arguments = ("--set", f"pipeline.plan={job.folder / 'plan.yaml'}", "--set", "engine.max_batch_tokens=64")
    run = job.start(*arguments)
    assert run.wait() == 1, run.stderr
    assert job.records() == one_rank


@pytest.mark.parametrize("lines", [0, 3])
def test_a_rank_that_is_killed_ends_the_run(job: RankJob, one_rank: dict[str | None, Any], lines: int) -> None:
    run = job.start(before=SLOW.format(0.02), fast=lines > 0)
    worker = workers(run, job)[0]
    if lines:
        wait_for_lines(job.output, lines)
    os.kill(worker, signal.SIGKILL)
    assert_lost(run, f"rank 1 (process {worker}) was killed by SIGKILL")
    assert lines <= len(job.records()) < 11
    assert_goes_on(job, one_rank)


def test_ranks_end_when_rank_0_is_killed(job: RankJob, one_rank: dict[str | None, Any]) -> None:
    run = job.start(before=SLOW.format(0.02), fast=False)
    worker = workers(run, job)[0]
    wait_for_lines(job.output, 2)
    assert worker in processes_of(job)
    run.kill(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    end = time.monotonic() + LIMIT
    while processes_of(job):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert_goes_on(job, one_rank)


@pytest.mark.slow
def test_kills_of_any_rank_at_random_moments(job: RankJob, one_rank: dict[str | None, Any]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(12):
        run = job.start("--set", "parallel.tensor=4", "--restart", before=SLOW.format(0.01))
        victim = run.pid if rng.random() < 0.3 else rng.choice(workers(run, job))
        time.sleep(rng.uniform(0.0, 2.0))
        started = time.monotonic()
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            assert run.wait() == 1, run.stderr
        else:
            # 1: it had come to its end just before.
            assert run.wait() in (-signal.SIGKILL if victim == run.pid else 2, 1), run.stderr
        assert time.monotonic() - started < LIMIT
        while processes_of(job):
            assert time.monotonic() - started < LIMIT
            time.sleep(0.01)
        job.records()
    assert_goes_on(job, one_rank)


FAIL_IN_ITERATION = """
import nanoflow.pipeline.reference_executor as e
run, count = e.ReferenceExecutor._run, []
def fail(*arguments):
    count.append(0)
    if len(count) > 4:
        raise ArithmeticError("seven is no even number")
    return run(*arguments)
e.ReferenceExecutor._run = fail
"""
NO_MEMORY = """
import nanoflow.parallel.worker as w
from nanoflow.errors import OutOfMemoryError
def none(*arguments): raise OutOfMemoryError("engine.kv_memory: 3 GiB are missing; lower it")
w.kv_pages = none
"""


@pytest.mark.parametrize(
    ("sabotage", "text"),
    [
        (FAIL_IN_ITERATION, "rank 1 failed: ArithmeticError: seven is no even number"),
        (NO_MEMORY, "rank 1: engine.kv_memory: 3 GiB are missing; lower it"),
    ],
)
def test_what_a_rank_raises_is_the_message(job: RankJob, sabotage: str, text: str) -> None:
    run = job.start(sabotage=sabotage)
    assert_lost(run, text)


def test_debug_shows_the_traceback_of_a_rank(job: RankJob) -> None:
    run = job.start("--debug", sabotage=FAIL_IN_ITERATION)
    assert run.wait() == 2
    assert "in fail\n" in run.stderr and "ArithmeticError: seven" in run.stderr


def test_of_several_ranks_the_one_at_fault_is_named(job: RankJob) -> None:
    run = job.start("--set", "parallel.tensor=4", sabotage=f"if rank == 2: exec({FAIL_IN_ITERATION!r}, globals())")
    assert_lost(run, "rank 2 failed: ArithmeticError: seven is no even number")


def test_a_rank_that_is_stopped_ends_the_run(job: RankJob) -> None:
    """Its silence is what tells: rank 0 waits for it in a collective, whose own timeout is far away."""
    run = job.start(before=SLOW.format(0.02) + "import nanoflow.parallel.group as g; g.SILENT_SECONDS = 5.0; ")
    worker = workers(run, job)[0]
    wait_for_lines(job.output, 2)
    os.kill(worker, signal.SIGSTOP)
    assert_lost(run, f"rank 1 (process {worker}) has given no sign of life for 5 s")


HANG = FAIL_IN_ITERATION.replace('raise ArithmeticError("seven is no even number")', "import time; time.sleep(600)")


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ("g.TIMEOUT = 5.0; g.BLAME_SECONDS = 0.1", "rank 0 of 2: the other ranks did not take part in the all-"),
        (
            "g.ITERATION_SECONDS = 3.0; g.WATCHED_DEVICES = ('cpu',)",
            "an iteration has not come to its end in 3 s: a rank hangs",
        ),
    ],
)
def test_a_rank_that_lives_and_takes_no_part(job: RankJob, limits: str, text: str) -> None:
    """Either a collective gives up, or, where none would, the iteration."""
    run = job.start(before=f"import nanoflow.parallel.group as g; {limits}; ", sabotage=HANG)
    assert_lost(run, text)


STUCK = """
import nanoflow.parallel.group as g, nanoflow.parallel.executor as x, os, time
g.GRACE_SECONDS = 1.0
collect, count = x.TensorParallelExecutor.collect, []
def stuck(self):
    count.append(0)
    if len(count) == 9:
        os.kill(self._ranks._ranks[0].pid, 9)
        time.sleep(600)
    return collect(self)
x.TensorParallelExecutor.collect = stuck
"""


def test_a_run_that_waits_inside_a_library_ends_too(job: RankJob) -> None:
    """As on a GPU, where rank 0 would wait for ever."""
    run = job.start(before=STUCK)
    assert_lost(run, "was killed by SIGKILL")
    assert job.records()


def test_ctrl_c_once_finishes_what_runs(job: RankJob, one_rank: dict[str | None, Any]) -> None:
    run = job.start(before=SLOW.format(0.02))
    wait_for_lines(job.output, 3)
    run.kill(signal.SIGINT)
    assert run.wait() == 130, run.stderr
    assert "stopping: what finishes within 5 s is written" in run.stderr and "error: " not in run.stderr
    assert 3 <= len(job.records()) < 11
    assert_goes_on(job, one_rank)


def test_ctrl_c_twice_stops_at_once(job: RankJob) -> None:
    run = job.start(before=SLOW.format(0.5))
    wait_for_lines(job.output, 1)
    run.kill(signal.SIGINT)
    time.sleep(0.2)
    started = time.monotonic()
    run.kill(signal.SIGINT)
    assert run.wait() == 130, run.stderr
    assert time.monotonic() - started < 4.5
    assert "error: " not in run.stderr and "Traceback" not in run.stderr


def test_ctrl_c_before_requests_run(job: RankJob) -> None:
    run = job.start(fast=False)  # it takes seconds to import
    workers(run, job)
    run.kill(signal.SIGINT)
    assert run.wait() == 130
    assert run.stderr == "stopped before any request ran; the output is as it was\n"


def place(rank: int, size: int, folder: Path) -> str:
    """What torchrun's processes find in their environment."""
    found = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 29500}
    found["TORCHELASTIC_RUN_ID"] = folder.name  # type: ignore[assignment]
    return f"import os; os.environ.update({ {key: str(value) for key, value in found.items()} })"


def as_torchrun(job: RankJob, size: int, *arguments: str, before: str = "") -> list[Run]:
    runs = []
    for rank in range(size):
        folder = job.folder / f"rank{rank}"
        folder.mkdir(exist_ok=True)
        first = place(rank, size, job.folder) + "; " + before
        runs.append(job.server.start(folder, "run", job.folder / "job.yaml", *arguments, before=first))
    return runs


def test_processes_of_torchrun_become_the_ranks(job: RankJob, one_rank: dict[str | None, Any]) -> None:
    runs = as_torchrun(job, 2, before=SLOW.format(0.02))
    wait_for_lines(job.output, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        runs[1].kill(number)  # a terminal's Ctrl-C reaches all of them: rank 0 decides
    assert [run.wait() for run in runs] == [1, 0], runs[0].stderr
    assert job.records() == one_rank
    assert runs[1].stderr == "" and runs[1].stdout == ""


def test_a_rank_of_torchrun_that_is_killed(job: RankJob) -> None:
    runs = as_torchrun(job, 2, before=SLOW.format(0.02))
    wait_for_lines(job.output, 2)
    runs[1].kill(signal.SIGKILL)
    assert_lost(runs[0], f"rank 1 (process {runs[1].pid}) has ended without a word")
    assert runs[1].wait() == -signal.SIGKILL


def test_torchrun_with_another_number_of_processes(job: RankJob) -> None:
    runs = as_torchrun(job, 3)
    assert runs[0].wait() == 2
    message = "error: parallel.tensor: 2, but torchrun has started 3 processes; set it to 3, or --nproc-per-node to 2\n"
    assert runs[0].stderr == message
    for run in runs[1:]:  # torchrun ends them, without waiting
        run.kill(signal.SIGTERM)
        assert run.wait() == -signal.SIGTERM


def test_what_is_not_for_torchrun_says_so_once(job: RankJob) -> None:
    runs = []
    for rank in range(2):
        folder = job.folder / f"tune{rank}"
        folder.mkdir()
        before = place(rank, 2, job.folder)
        runs.append(job.server.start(folder, "tune", job.folder / "job.yaml", "--minutes", "0.1", before=before))
    assert [run.wait() for run in runs] == [2, 2]
    assert runs[0].stderr.startswith("error: torchrun: it is for `nanoflow run` and `nanoflow bench`"), runs[0].stderr
    assert runs[1].stderr == ""


@pytest.mark.slow
def test_torchrun_itself(job: RankJob, one_rank: dict[str | None, Any]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "nanoflow", "run"]
    done = subprocess.run(
        [*command, str(job.folder / "job.yaml"), "--quiet"], capture_output=True, text=True, timeout=120
    )
    # torchrun takes status 1, of a run with an error record, for a failure.
    assert "error: " not in done.stderr.lower().split("traceback")[0]
    assert job.records() == one_rank


def test_heads_that_cannot_be_shared_are_refused_before_anything_starts(job: RankJob) -> None:
    run = job.start("--set", "parallel.tensor=3", fast=False, before="import nanoflow.parallel.group as g; del g.start")
    assert run.wait() == 2
    assert run.stderr.startswith("error: parallel.tensor: 3 ranks cannot share this model")
