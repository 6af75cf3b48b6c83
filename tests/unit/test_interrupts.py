"""Runs that are killed, interrupted, or out of disk, in processes of their own: nothing finished is lost."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.forks import SLOW, ForkServer, Job, wait_for_lines
from tests.unit.tiny_model import request_lines, save_tiny_llama

SHORT_GRACE = "import nanoflow.interrupt as i; i.GRACE_SECONDS = 0.6; i._LAST_STEP_SECONDS = 0.3; "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("interrupts") / "model")


def make_job(folder: Path, model: Path, server: ForkServer, output: Path | None = None) -> Job:
    """Two dozen requests, greedy ones and sampled ones, four at a time."""
    lines = request_lines(24)
    lines[11]["prompt"] = []
    return Job(
        server,
        folder,
        model,
        [*map(json.dumps, lines), "bad"],
        sampling={"max_tokens": 9, "ignore_eos": True},
        engine={"max_running": 4},
        output={"path": str(output)} if output else {},
    )


@pytest.fixture
def job(tmp_path: Path, model: Path, server: ForkServer) -> Job:
    return make_job(tmp_path, model, server)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, server: ForkServer) -> dict[str | None, Any]:
    job = make_job(tmp_path_factory.mktemp("undisturbed"), model, server)
    run = job.start()
    assert run.wait() == 1, run.stderr
    assert len(job.records()) == 25
    return job.records()


def assert_goes_on(job: Job, undisturbed: dict[str | None, Any]) -> None:
    """The same command again ends with the records of an undisturbed run."""
    run = job.start()
    assert run.wait() == 1, run.stderr
    assert job.records() == undisturbed
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_twenty_kills_at_random_moments(job: Job, undisturbed: dict[str | None, Any]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    kills, ends, found = 0, 0, set()
    while kills < 20:
        run = job.start(before=SLOW.format(0.002))
        time.sleep(rng.uniform(0.05, 0.9))
        run.kill(signal.SIGKILL)
        status = run.wait()
        if status == -signal.SIGKILL:
            kills += 1
            found.add(job.output.read_bytes().count(b"\n") if job.output.exists() else 0)
            continue
        assert status == 1, run.stderr
        assert job.records() == undisturbed
        ends += 1
        for name in ("o.jsonl", "o.state.json"):
            (job.folder / name).unlink()
    assert_goes_on(job, undisturbed)
    assert len(found) >= 4  # the kills did come at different stages


def test_ctrl_c_once_finishes_what_runs(job: Job, undisturbed: dict[str | None, Any]) -> None:
    run = job.start(before=SLOW.format(0.02))
    wait_for_lines(job.output, 6)
    started = time.monotonic()
    run.kill(signal.SIGINT)
    assert run.wait() == 130, run.stderr
    assert time.monotonic() - started < 20
    assert "stopping: what finishes within 5 s is written; again to stop at once" in run.stderr
    records = job.records()
    assert 6 <= len(records) < 25
    assert f"{len(records)} requests have their record in" in run.stderr
    assert f"to go on: nanoflow run {job.folder / 'job.yaml'}" in run.stderr
    assert "Traceback" not in run.stderr
    assert job.report["requests"] == len(records)
    assert_goes_on(job, undisturbed)


def test_sigterm_stops_in_time_though_requests_still_run(job: Job, undisturbed: dict[str | None, Any]) -> None:
    run = job.start("--set", "sampling.max_tokens=100", before=SLOW.format(0.1) + SHORT_GRACE)
    wait_for_lines(job.output, 1)  # the bad line; nothing else ends within 10 s
    run.kill(signal.SIGTERM)
    started = time.monotonic()
    assert run.wait() == 143, run.stderr
    assert time.monotonic() - started < 9
    assert "to go on: nanoflow run" in run.stderr and "--set sampling.max_tokens=100" in run.stderr
    assert job.start("--restart").wait() == 1
    assert job.records() == undisturbed


def test_an_iteration_that_takes_too_long_is_not_waited_for(job: Job, undisturbed: dict[str | None, Any]) -> None:
    run = job.start(before=SLOW.format("30 if len(a[1].token_ids) < 6 else 0") + SHORT_GRACE)
    wait_for_lines(job.output, 1)
    time.sleep(0.3)
    run.kill(signal.SIGINT)
    started = time.monotonic()
    assert run.wait() == 130, run.stderr
    assert time.monotonic() - started < 20
    assert "the same command goes on" in run.stderr and "Traceback" not in run.stderr
    assert_goes_on(job, undisturbed)


def test_ctrl_c_twice_stops_at_once(job: Job, undisturbed: dict[str | None, Any]) -> None:
    run = job.start(before=SLOW.format(0.5))
    wait_for_lines(job.output, 1)
    run.kill(signal.SIGINT)
    started = time.monotonic()
    time.sleep(0.2)
    run.kill(signal.SIGINT)
    assert run.wait() == 130, run.stderr
    assert time.monotonic() - started < 4.5  # and not the 5 s of a first one
    assert "the same command goes on" in run.stderr and "Traceback" not in run.stderr
    assert_goes_on(job, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_requests_run_ends_at_once(job: Job, number: int) -> None:
    run = job.start(before="import nanoflow.runner as r, time; r.build_engine = lambda *a, **k: time.sleep(30)")
    time.sleep(0.6)
    run.kill(number)
    assert run.wait() == 128 + number
    assert run.stderr == "stopped before any request ran; the output is as it was\n"
    assert not job.output.exists()


def test_a_signal_that_the_parent_ignores_stays_ignored(job: Job, undisturbed: dict[str | None, Any]) -> None:
    run = job.start(before="import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    wait_for_lines(job.output, 2)
    run.kill(signal.SIGINT)
    assert run.wait() == 1, run.stderr
    assert job.records() == undisturbed


@pytest.mark.parametrize("limit", [700, 5000])
def test_a_file_that_may_not_grow(job: Job, undisturbed: dict[str | None, Any], limit: int) -> None:
    """A limit on the size of files stands for a full disk, wherever in a line it comes."""
    run = job.start(
        before=f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({limit}, r.getrlimit(r.RLIMIT_FSIZE)[1]))"
    )
    assert run.wait() == 2
    assert "File too large" in run.stderr and "Traceback" not in run.stderr
    for line in job.output.read_bytes().splitlines() if job.output.exists() else []:
        json.loads(line)
    assert_goes_on(job, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "none", place], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_full_disk(
    tmp_path: Path, model: Path, server: ForkServer, small_disk: Path, undisturbed: dict[str | None, Any]
) -> None:
    job = make_job(tmp_path, model, server, small_disk / "o.jsonl")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(8192))
    run = job.start()
    assert run.wait() == 2
    assert "No space left on device" in run.stderr and "the same command goes on" in run.stderr
    kept = job.output.read_bytes()
    assert kept.endswith(b"\n") and kept.count(b"\n") == len(job.records()) > 0
    # There is room again, and the records are still there.
    filler.unlink()
    small = subprocess.run(["mount", "-o", "remount,size=1m", small_disk], capture_output=True)
    assert small.returncode == 0
    assert_goes_on(job, undisturbed)
    assert job.output.read_bytes().startswith(kept)


def test_standard_input_goes_on_too(job: Job, undisturbed: dict[str | None, Any]) -> None:
    lines = job.folder / "in.jsonl"
    run = job.start("--set", "workload.input='-'", stdin=lines, before=SLOW.format(0.01))
    wait_for_lines(job.output, 5)
    run.kill(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    again = job.start("--set", "workload.input='-'", stdin=lines)
    assert again.wait() == 1, again.stderr
    assert job.records() == undisturbed


def test_a_second_run_on_the_same_output_is_refused(job: Job, undisturbed: dict[str | None, Any]) -> None:
    run = job.start(before=SLOW.format(0.01))
    wait_for_lines(job.output, 2)
    folder = job.folder / "second"
    folder.mkdir()
    second = job.server.start(folder, "run", job.folder / "job.yaml")
    assert second.wait() == 2
    assert "another run is writing" in second.stderr
    assert run.wait() == 1
    assert job.records() == undisturbed
