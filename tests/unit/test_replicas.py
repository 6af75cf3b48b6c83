"""Runs with `parallel.data`, in processes of their own: killed replicas, Ctrl-C, going on, no process left behind."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.config_schema import RunConfig
from nanoflow.errors import ConfigError
from nanoflow.replicas import start
from nanoflow.replicas.start import Place, check_replicas, places
from tests.unit.forks import ForkServer, Job, Run, children, started_by, wait_for_lines
from tests.unit.tiny_model import request_lines, save_tiny_llama

LIMIT = 60.0
COUNT = 40


class ReplicaJob(Job):
    """Requests of which some are sampled; each takes some iterations."""

    def __init__(self, folder: Path, server: ForkServer, model: Path) -> None:
        lines = request_lines(COUNT)
        lines[11]["prompt"] = []
        super().__init__(
            server,
            folder,
            model,
            [*map(json.dumps, lines), "bad"],
            sampling={"max_tokens": 40, "ignore_eos": True},
            engine={"max_running": 3},
            output={"sort": True},
            report={"series_seconds": 0.1},
        )

    def run(self, data: int, *arguments: str, fast: bool = False) -> Run:
        """Start a run of `data` replicas."""
        return self.start("--set", f"parallel.data={data}", *arguments, fast=fast)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(tmp_path: Path, server: ForkServer, model: Path) -> Iterator[ReplicaJob]:
    yield ReplicaJob(tmp_path, server, model)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, server: ForkServer, model: Path) -> dict[str | None, Any]:
    """Of a run without replicas."""
    job = ReplicaJob(tmp_path_factory.mktemp("undisturbed"), server, model)
    run = job.run(1)
    assert run.wait() == 1, run.stderr
    assert len(job.records()) == COUNT + 1
    return job.records()


def assert_gone(pids: list[int]) -> None:
    end = time.monotonic() + LIMIT
    for pid in pids:
        while Path(f"/proc/{pid}/stat").exists():
            assert time.monotonic() < end, f"process {pid} is left"
            time.sleep(0.01)


def test_three_replicas_of_which_one_is_killed(job: ReplicaJob, undisturbed: dict[str | None, Any]) -> None:
    run = job.run(3, fast=True)
    pids = started_by(run, 3)
    wait_for_lines(job.output, 8)
    os.kill(pids[1], signal.SIGKILL)
    assert run.wait() == 1, run.stderr
    assert job.records() == undisturbed
    ids = [record["id"] for record in map(json.loads, job.output.read_bytes().splitlines())]
    assert ids == sorted(ids, key=lambda id: int(id.rpartition("_")[2]))  # output.sort
    assert f"warning: replica 1 (process {pids[1]}) was killed by SIGKILL" in run.stderr
    assert "the other 2 go on with its" in run.stderr and "Traceback" not in run.stderr
    assert_gone(pids)
    report = job.report
    assert report["parallel"] == {"tensor": 1, "data": 3} and report["completed"] == COUNT - 1
    assert [one["lost"] is not None for one in report["replicas"]] == [False, True, False]
    assert sum(one["completed"] for one in report["replicas"]) == COUNT - 1
    assert sum(one["iterations"] for one in report["replicas"]) == report["iterations"]
    assert 0 < report["executor_busy_share"] < 1
    series = [json.loads(line) for line in job.output.with_name("o.series.jsonl").read_text().splitlines()]
    assert sum(line["iterations"] for line in series) == pytest.approx(report["iterations"], rel=1e-3)
    assert sum(line["seconds"] for line in series) == pytest.approx(report["seconds"], rel=0.1)
    assert "replica 2" in run.stdout


def test_all_killed_and_gone_on_with(job: ReplicaJob, undisturbed: dict[str | None, Any]) -> None:
    run = job.run(2)
    pids = started_by(run, 2)
    wait_for_lines(job.output, 8)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert run.wait() == 2
    assert (
        "was killed by SIGKILL" in run.stderr and "no replica is left; what was finished is in the output" in run.stderr
    )
    assert "Traceback" not in run.stderr
    assert 8 <= len(job.records()) < COUNT
    again = job.run(1)
    assert again.wait() == 1, again.stderr
    assert job.records() == undisturbed


def test_ctrl_c_finishes_what_runs_and_leaves_nobody(job: ReplicaJob, undisturbed: dict[str | None, Any]) -> None:
    run = job.run(2)
    pids = started_by(run, 2)
    wait_for_lines(job.output, 6)
    began = time.monotonic()
    run.kill(signal.SIGINT)
    assert run.wait() == 130, run.stderr
    assert time.monotonic() - began < 30
    assert_gone(pids)
    records = job.records()
    assert 6 <= len(records) < COUNT and f"{len(records)} requests have their record" in run.stderr
    assert "warning" not in run.stderr and "Traceback" not in run.stderr
    assert all(undisturbed[key] == record for key, record in records.items())


@pytest.mark.slow
def test_replicas_killed_at_random_moments(job: ReplicaJob, undisturbed: dict[str | None, Any]) -> None:
    """Also while they load, and several of them: the same command again and again ends with all records."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    ends = []
    for _ in range(6):
        run = job.run(2, fast=True)
        pids = started_by(run, 2)
        for pid in rng.sample(pids, rng.choice([1, 1, 2])):
            time.sleep(rng.uniform(0.0, 2.0))
            with suppress(ProcessLookupError):  # it has ended with the run
                os.kill(pid, signal.SIGKILL)
        ends.append(run.wait())
        assert ends[-1] in (1, 2) and "Traceback" not in run.stderr, run.stderr
        assert_gone(pids)
        if ends[-1] == 1:
            assert job.records() == undisturbed
            for file in job.folder.glob("o.*"):
                file.unlink()
    again = job.run(1)
    assert again.wait() == 1, again.stderr
    assert job.records() == undisturbed


@pytest.mark.slow
def test_a_rank_of_a_replica_is_killed(job: ReplicaJob, undisturbed: dict[str | None, Any]) -> None:
    run = job.run(2, "--set", "parallel.tensor=2", fast=True)
    pids = started_by(run, 2)
    wait_for_lines(job.output, 8)
    (rank,) = children(pids[1])
    os.kill(rank, signal.SIGKILL)
    assert run.wait() == 1, run.stderr
    assert job.records() == undisturbed
    assert f"warning: replica 1: rank 1 (process {rank}) was killed by SIGKILL" in run.stderr
    assert "the other one goes on with its" in run.stderr and "Traceback" not in run.stderr
    assert_gone([*pids, rank])
    report = job.report
    assert report["parallel"] == {"tensor": 2, "data": 2}
    assert sum(one["completed"] for one in report["replicas"]) == COUNT - 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_replicas_load_ends_all(job: ReplicaJob, number: int) -> None:
    run = job.run(2)
    pids = started_by(run, 2)
    run.kill(number)
    assert run.wait() == 128 + number
    assert run.stderr == "stopped before any request ran; the output is as it was\n"
    assert_gone(pids)
    assert not job.output.exists()


def test_replicas_end_with_the_run_however_it_ends(job: ReplicaJob) -> None:
    run = job.run(2)
    pids = started_by(run, 2)
    time.sleep(random.uniform(0.0, 4.0))
    run.kill(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert_gone(pids)


def test_what_no_replica_can_do_is_the_runs_message(job: ReplicaJob) -> None:
    run = job.run(2, "--set", "engine.kv_memory=1KiB")
    assert run.wait() == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: replica ") and "engine.kv_memory: 1KiB is 1.0 KiB here" in line
    assert line.endswith("; no replica could start")
    assert not job.output.exists()


def config_of(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {"model": {"path": "m"}, "workload": {"synthetic": {"input_len": 1, "output_len": 1}}}
    return RunConfig.model_validate(values | changes)


def places_of(config: RunConfig, device: torch.device) -> list[Place]:
    return places(config.engine, config.parallel, device)


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def shown(device: str, **parallel: int) -> list[str]:
        found = places_of(config_of(parallel=parallel), torch.device(device))
        assert {place.engine.device for place in found} == {"cuda"}
        return [place.environment["CUDA_VISIBLE_DEVICES"] for place in found]

    assert shown("cuda", data=3) == ["0", "1", "2"]
    assert shown("cuda:2", data=3, tensor=2) == ["2,3", "4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, 5,GPU-aa,1,0,2,3,4")
    assert shown("cuda", data=2, tensor=2) == ["7,5", "GPU-aa,1"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    for place in places_of(config_of(parallel={"data": 3}), torch.device("cuda")):
        assert place.environment["OMP_NUM_THREADS"] == "4"
    five, eight = config_of(parallel={"data": 5, "tensor": 2}), config_of(parallel={"data": 8})
    with pytest.raises(
        ConfigError, match=r"5 replicas of 2 GPUs each need 10 GPUs, and .* has 8; set it to 4 or less$"
    ):
        places_of(five, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"8 replicas need 8 GPUs from cuda:1 on, and .* has 8; set it to 7 or less$"):
        places_of(eight, torch.device("cuda", 1))


def test_a_cpu_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    for asked, given in (("auto", 0.25 / 3), (0.6, 0.2), ("2GiB", "2GiB")):
        found = places_of(config_of(parallel={"data": 3}, engine={"kv_memory": asked}), torch.device("cpu"))
        assert len(found) == 3
        for place in found:
            assert place.environment == {"OMP_NUM_THREADS": "4"} and place.engine.device == "cpu"
            assert place.engine.kv_memory == (pytest.approx(given) if isinstance(given, float) else given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = places_of(config_of(parallel={"data": 3}), torch.device("cpu"))
    assert found[0].environment == {"OMP_NUM_THREADS": "1"}


def test_more_replicas_than_a_processor_can_feed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert len(places_of(config_of(parallel={"data": 20}), torch.device("cpu"))) == 20
    message = r"parallel\.data: 100,000 replicas are 200,000 processes, and this machine has 5 cores; set it to 10 "
    with pytest.raises(ConfigError, match=message):
        places_of(config_of(parallel={"data": 100_000, "tensor": 2}), torch.device("cpu"))


def test_torchrun_and_bench_refuse_replicas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nanoflow.bench import bench

    config = config_of(parallel={"data": 2}, output={"path": str(tmp_path / "o.jsonl")})
    with pytest.raises(ConfigError, match=r"parallel\.data: 2 replicas are not for a bench"):
        bench(config)
    monkeypatch.setattr(start, "place", lambda: object())
    with pytest.raises(
        ConfigError, match=r"parallel\.data: 2 replicas under torchrun are not supported; use `nanoflow run`"
    ):
        check_replicas(config.engine, config.parallel)
    check_replicas(config_of().engine, config_of().parallel)
