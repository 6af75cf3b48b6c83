"""Profiling a model that ranks share: on two ranks of a CPU from a job to its estimates, and what only GPUs do with
stand-ins."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.ops.collectives import CTAS, AllReduce
from nanoflow.ops.operation import Work
from nanoflow.ops.own_rows import OwnRows
from nanoflow.ops.peer_all_reduce import PEER_FORMS
from nanoflow.ops.peer_columns import COLUMN_FORMS
from nanoflow.ops.row_sharding import ALL_GATHER, REDUCE_SCATTER, with_sharding
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.plan import Plan
from nanoflow.plans.case import open_graph
from nanoflow.plans.job_mixes import WeightedMix
from nanoflow.profiling import rank_bench
from nanoflow.profiling.cases import job_cases
from nanoflow.profiling.network_cases import NetworkCases
from nanoflow.profiling.rank_bench import RankBench, collectives_in
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.fingerprint import Fingerprint, ranks_of
from nanoflow.search.mix import Mix
from nanoflow.search.profile import Pair, Point, Profile, Solo
from nanoflow.search.profile_rates import profile_rates
from nanoflow.search.profiler import Case, PairCase, SoloCase, Unmeasurable
from nanoflow.search.rates import Running
from tests.unit.forks import ForkServer, started_by, wait_for_text
from tests.unit.rank_models import write_job_of_ranks
from tests.unit.rank_threads import CPU, connect, on_all
from tests.unit.tiny_model import save_tiny_llama

RANK = shard_graph(open_graph("llama-3-70b", Plan(1, (), ()), "test")[2], 0, 2)
MIXES = [WeightedMix(Mix(1024, 768, (512, 512)), 1.0, 2048.0, 2048, 1.0)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return write_job_of_ranks(model, tmp_path)


def test_a_job_of_two_ranks_is_profiled_and_estimated(job: Path, tmp_path: Path, server: ForkServer) -> None:
    run = server.start(tmp_path, "profile", job)
    assert run.wait() == 0, run.stderr
    assert "26 cases measured" in run.stdout and "o_all_reduce: milliseconds / GB/s that a rank sends" in run.stdout
    (path,) = (tmp_path / "cache" / "nanoflow" / "profiles").iterdir()
    profile = Profile.load(path)
    assert ranks_of(str(profile.fingerprint.shape)) == 2 and profile.ceilings.link_bytes_per_second
    sums = profile.solo("o_all_reduce", None), profile.solo("down_all_reduce", None)
    assert sums[0] is not None and sums[1] is not None and sums[0].points == sums[1].points, "measured once"
    assert sums[0].wire_bytes == 64 * 4, "of two ranks, each sends as much as the buffer holds"
    assert {solo.kernel for solo in profile.solos if solo.op == "o_reduce_scatter"} == {"", "nccl"}
    assert profile.solo("lm_head_all_gather", None) is not None and not profile.pairs

    again = server.start(tmp_path, "profile", job, fast=True)
    assert again.wait() == 0 and "0 cases measured" in again.stdout, again.stderr

    rates = profile_rates(profile, 4)
    (point, *_) = sums[0].points
    op = AllReduce("o_all_reduce", "o", 64, 2)
    for kernel in ("", "reference"):
        assert rates.seconds(op, Work(prefill_rows=point.at[0]), None, kernel) == pytest.approx(point.seconds)


def test_the_layout_of_the_jobs_plan_is_profiled(job: Path, tmp_path: Path, server: ForkServer) -> None:
    plan = tmp_path / "columns.plan.yaml"
    plan.write_text(
        "sharding: all_gather\ncapacity: 160\nnano_batches: {a: {decode: 1, prefill: 1, rows: 160}}\n"
        "period: [whole: {main: [qkv, decode_attention, prefill_attention, o, gate_up, down]}]\n"
    )
    job.write_text(job.read_text() + f"pipeline: {{plan: {plan}}}\n")
    run = server.start(tmp_path, "profile", job, fast=True)
    assert run.wait() == 0, run.stderr
    assert "o_all_gather: milliseconds / GB/s that a rank sends" in run.stdout
    (path,) = (tmp_path / "cache" / "nanoflow" / "profiles").iterdir()
    profile = Profile.load(path)
    assert {solo.kernel for solo in profile.solos if solo.op == "attention_all_gather"} == {"", "nccl"}
    assert profile.solo("down_all_reduce", None) is not None and profile.solo("o_reduce_scatter", None) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_a_killed_rank_keep_what_was_measured(
    job: Path, tmp_path: Path, server: ForkServer, number: int
) -> None:
    run = server.start(tmp_path, "profile", job, fast=True)
    wait_for_text(run, " 7 to go: ")
    (rank,) = started_by(run, 1)
    os.kill(run.pid if number == signal.SIGINT else rank, number)
    status, seen = run.wait(), run.stderr
    assert "Traceback" not in seen
    if number == signal.SIGINT:
        assert status == 130 and "are left, to go on: nanoflow profile" in seen
    else:
        assert status == 2 and seen.count("error: ") == 1
        assert f"rank 1 (process {rank}) was killed by SIGKILL" in seen
        assert "what was measured is in the profile, and the same command goes on" in seen
    end = time.monotonic() + 30
    while Path(f"/proc/{rank}/cmdline").exists() and Path(f"/proc/{rank}/cmdline").read_bytes():
        assert time.monotonic() < end, "the other rank is left"
        time.sleep(0.02)
    (path,) = (tmp_path / "cache" / "nanoflow" / "profiles").iterdir()
    assert 10 <= len(Profile.load(path).solos) < 26


# What is measured.


def test_collectives_are_measured_in_every_form_on_the_lanes_that_plans_give_them() -> None:
    cases = job_cases(RANK, MIXES, max_model_len=8192, kv_tokens=10**6, sms=132, streams=True)
    assert len(cases) == len(set(cases))
    own = [case for case in cases if isinstance(case, SoloCase) and case.op == "o_all_reduce"]
    everywhere = {"", *CTAS, *PEER_FORMS}
    assert {case.kernel for case in own if case.sms is None} == everywhere
    assert {case.kernel for case in own if case.sms == 16} == everywhere
    assert {case.kernel for case in own if case.sms == 8} == everywhere - {"nccl_16"}
    assert all(case.also == ("down_all_reduce",) and case.wire_bytes == 8192 * 2 for case in own)
    assert (2048,) in own[0].at and (1024,) in own[0].at
    assert not [case for case in cases if case.op == "down_all_reduce"], "which is the same"
    assert {case.op for case in cases if isinstance(case, SoloCase) and case.sms == 124} >= {"qkv", "down", "add_norm"}
    pairs = [case for case in cases if isinstance(case, PairCase) and case.other == "o_all_reduce"]
    assert {(case.sms, case.other_sms) for case in pairs} == {(124, 8), (116, 16), (None, None)}
    assert {case.op for case in pairs} == {"qkv", "o", "gate_up", "down", "decode_attention"}
    assert {case.other_kernel for case in pairs} == everywhere - {"nccl_2"}
    assert {case.at for case in pairs if case.op == "down"} == {case.other_at for case in pairs} == {(1024,)}
    names = [case.other for case in cases if isinstance(case, PairCase)]
    assert names.index("o_all_reduce") < names.index("decode_attention") < names.index("o_reduce_scatter")
    # On a CPU there is one form beside the reference, and nothing runs side by side.
    on_cpu = job_cases(RANK, MIXES, max_model_len=8192, kv_tokens=10**6, sms=None, streams=False)
    assert not [case for case in on_cpu if isinstance(case, PairCase)]
    assert {case.kernel for case in on_cpu if isinstance(case, SoloCase)} == {"", "nccl"}


def test_forms_of_the_all_gathers_of_columns_are_measured() -> None:
    rank = shard_graph(open_graph("llama-3-70b", Plan(1, (), ()), "test")[2], 0, 2, ALL_GATHER)
    cases = job_cases(rank, MIXES, max_model_len=8192, kv_tokens=10**6, sms=132, streams=True)
    own = [case for case in cases if isinstance(case, SoloCase) and case.op == "attention_all_gather"]
    assert {case.kernel for case in own if case.sms is None} == {"", *CTAS, *COLUMN_FORMS}
    assert all(case.also == ("o_all_gather",) and case.wire_bytes == 4096 * 2 for case in own)
    pairs = [case for case in cases if isinstance(case, PairCase) and case.other == "attention_all_gather"]
    assert {case.other_kernel for case in pairs} == {"", *CTAS, *COLUMN_FORMS} - {"nccl_2"}


def test_all_shardings_are_measured() -> None:
    assert {"o_all_reduce", "o_reduce_scatter", "add_norm_all_gather"} <= set(collectives_in(RANK))
    assert not collectives_in(open_graph("llama-3-8b", Plan(1, (), ()), "test")[2])
    assert not NetworkCases(open_graph("llama-3-8b", Plan(1, (), ()), "test")[2], 2, gpu=True)


# How: ranks are threads.

SUM = AllReduce("sum", "x", 16, 2)


@contextmanager
def benches(cases: list[Case]) -> Iterator[list[RankBench]]:
    communicators = connect(2)

    def made(rank: int) -> RankBench:
        buffers = {"x": torch.randn(8, 16)}
        return RankBench(communicators[rank], {"sum": SUM}, cases, buffers, CPU, torch.float32, lambda: None)

    found = on_all(made, 2)
    yield found
    for each in found:
        each.close()
    for communicator in communicators:
        communicator.close()


def test_ranks_run_a_collective_as_often_and_the_slowest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SoloCase("sum", "rows", None, ((3,), (8,)))
    calls: list[int] = [0, 0]
    reference = AllReduce.reference

    def counted(self: AllReduce, context: Any) -> None:
        rank = context.communicator.rank
        calls[rank] += 1
        time.sleep(0.002 * rank)
        reference(self, context)

    monkeypatch.setattr(AllReduce, "reference", counted)
    with benches([case]) as (first, second), torch.inference_mode():
        points = on_all(lambda rank: (first, second)[rank].solo(case, lambda at: 0.05), 2)
    assert calls[0] == calls[1] > 10
    assert points[0] == points[1]
    assert all(point.seconds >= 0.002 for point in points[0])


def test_sums_stay_finite_and_are_not_zero() -> None:
    case = SoloCase("sum", "rows", None, ((8,),))
    with benches([case]) as both:

        def run(rank: int) -> tuple[float, int]:
            with torch.inference_mode():
                replays = both[rank]._replays("sum", "", 8, None, None)
                replays.run_times(3 * replays.fresh_every - 1)
                return float(both[rank]._buffers["x"].abs().max()), replays.fresh_every

        for largest, every in on_all(run, 2):
            assert 1e20 < largest < float("inf") and 200 < every < 250


def test_what_one_rank_cannot_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    case = PairCase("qkv", (4,), None, "sum", (8,), None)
    asked: list[int] = []

    @contextmanager
    def streams(case: PairCase, device: torch.device) -> Iterator[list[None]]:
        yield [None, None]

    def together(own: Any, shared: Any, seconds: float, times: int) -> tuple[float, float]:
        asked.append(times)
        shared.run_times(times)
        return 1e3, 1e3  # of which no machine takes as much for either alone

    monkeypatch.setattr(rank_bench, "_streams", streams)
    monkeypatch.setattr(rank_bench, "time_together", together)

    def measured(both: list[RankBench], fails: int | None) -> list[Any]:
        def run(rank: int) -> Any:
            def calls() -> list[Any]:
                if rank == fails:
                    raise Unmeasurable("it does not fit")
                return [lambda: time.sleep(0.001)]

            try:
                return both[rank].pair(case, calls, 0.02)
            except Unmeasurable as error:
                return str(error)

        return on_all(run, 2)

    with benches([case]) as both, torch.inference_mode():
        kept = measured(both, None)
        assert kept[0] == kept[1] and 0 < kept[0][0] < 0.8 and 0 < kept[0][1] < 0.8
        assert len(asked) == 2 and asked[0] == asked[1] >= 3
        assert measured(both, 1) == ["another rank cannot", "it does not fit"]
        assert len(asked) == 2


def test_forms_that_cannot_run_here_are_named_and_left_out() -> None:
    cases: list[Case] = [
        SoloCase("sum", "rows", None, ((8,),), kernel) for kernel in ("", "nccl", "nccl_4", "one_shot")
    ]
    cases.append(PairCase("qkv", (4,), 124, "sum", (8,), 8, "two_shot"))
    with benches(cases) as both:
        for each in both:
            assert each.missing == dict.fromkeys(("one_shot", "two_shot"), "ranks on a CPU have no memory in common")
            assert [each.can(case) for case in cases] == [True, True, True, False, False]


# What the simulator makes of it.

HERE = Fingerprint(model="llama-3-70b", gpu="Made Up", sms=132, dtype="bfloat16", page_size=128)
WORK = Work(prefill_rows=1024)
SENT = 8192 * 2.0


def made_up() -> Profile:
    profile = Profile(HERE, Ceilings(700e12, 3e12, 150e9))
    for kernel, sms, rate in (
        ("", None, 200e9),
        ("nccl_8", None, 120e9),
        ("nccl_8", 8, 110e9),
        ("copy_engine", 8, 90e9),
    ):
        points = tuple(Point((rows,), rows * SENT / rate) for rows in (512, 1024, 2048))
        profile = profile.with_solo(Solo("o_all_reduce", "rows", sms, points, kernel, SENT))
    for kernel, sms, other_sms, kept in (
        ("copy_engine", 124, 8, 0.97),
        ("copy_engine", None, None, 0.99),
        ("", None, None, 0.8),
        ("nccl_8", 124, 8, 0.95),
    ):
        profile = profile.with_pair(Pair("down", (1024,), sms, kept, "o_all_reduce", (1024,), other_sms, 0.9, kernel))
    return profile


def test_forms_take_what_was_measured_of_them(tmp_path: Path) -> None:
    profile = made_up()
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile
    assert "wire_bytes" in (tmp_path / "p.json").read_text()
    assert json.loads((tmp_path / "p.json").read_text())["pairs"][2].get("other_kernel") is None, "as it always was"
    rates, sums, down = profile_rates(profile, 2), RANK.operation("o_all_reduce"), RANK.operation("down")

    def seconds(sms: int | None, kernel: str = "") -> float:
        return rates.seconds(sums, WORK, sms, kernel)

    sent = 1024 * SENT
    assert seconds(None) == seconds(None, "nccl") == pytest.approx(sent / 200e9)
    assert seconds(None, "nccl_8") == pytest.approx(sent / 120e9) and seconds(8, "nccl_8") == pytest.approx(
        sent / 110e9
    )
    assert seconds(8, "copy_engine") == pytest.approx(sent / 90e9)
    # The link that is not assumed: what the fastest form had. By it what was not measured is estimated.
    assert rates.base.ceilings.link_bytes_per_second == pytest.approx(200e9)
    assert seconds(None, "one_shot") == rates.base.seconds(sums, WORK, None, "one_shot")

    def kept(kernel: str, sms: int | None, other: int | None) -> float:
        return rates.kept(Running(down, WORK, sms), [Running(sums, WORK, other, kernel)])

    assert kept("copy_engine", 124, 8) == pytest.approx(0.97) and kept("nccl_8", 124, 8) == pytest.approx(0.95)
    assert kept("copy_engine", None, None) == pytest.approx(0.99) and kept("nccl", None, None) == pytest.approx(0.8)
    turned = rates.kept(Running(sums, WORK, None, "copy_engine"), [Running(down, WORK, None)])
    assert turned == pytest.approx(0.9)
    by_ceilings = rates.base.kept(Running(down, WORK, 124), [Running(sums, WORK, 8, "two_shot")])
    assert kept("two_shot", 124, 8) == by_ceilings


def test_an_operation_on_a_ranks_rows_takes_what_so_many_rows_take() -> None:
    points = (Point((512,), 1e-5), Point((1024,), 3e-5))
    rates = profile_rates(made_up().with_solo(Solo("add_norm", "rows", None, points)), 2)
    own = with_sharding(RANK, REDUCE_SCATTER).operation("add_norm")
    assert isinstance(own, OwnRows)
    assert rates.seconds(RANK.operation("add_norm"), WORK, None) == pytest.approx(3e-5)
    assert rates.seconds(own, WORK, None) == pytest.approx(1e-5)
