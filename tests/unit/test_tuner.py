"""The search on devices that are made up: what it finds, what it measures, and what a kill leaves of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.plan import Plan, PlanError
from nanoflow.pipeline.validate import validate
from nanoflow.plans.case import H100, H200, open_graph
from nanoflow.search.favourites import favourites
from nanoflow.search.journal import Journal
from nanoflow.search.mix import Mix
from nanoflow.search.space import PlanChoice, build_plan, collective_forms
from nanoflow.search.tuner import ROUND, Outcome, PlanSearch, Target, search

GRAPH = open_graph("llama-3-8b", Plan(1, (), ()), "a test")[2]
MIX = Mix(200, 700, (184,))
ROWS = 384
TARGET = Target(GRAPH, MIX, ROWS, H100.rates, 132, ("triton_3",))


def memory_sms(plan: Plan) -> int | None:
    return plan.partitions["split"][1] if "split" in plan.partitions else None


def made_up(plan: Plan) -> float:
    """The ratio of a device whose best plan has two nano-batches of 5 and 11 sixteenths, and 44 SMs for memory."""
    if len(plan.nano_batches) == 1:
        return 1.0
    shares = [float(nano_batch.decode) * 16 for nano_batch in plan.nano_batches]
    sms = memory_sms(plan)
    lost = abs(len(shares) - 2) * 0.02 + abs(shares[0] - 5) * 0.005 + 0.01 * (len(plan.period) > 1)
    return 1.06 - lost - (0.03 if sms is None else abs(sms - 44) * 0.001)


class Device:
    """Measures as `made_up` says, and notes what it was asked for."""

    def __init__(self) -> None:
        self.rounds: list[list[Plan]] = []

    def __call__(self, plans: Sequence[Plan]) -> list[Outcome]:
        self.rounds.append(list(plans))
        return [Outcome(made_up(plan), figures={"iteration_ms": 40 / made_up(plan)}) for plan in plans]

    @property
    def plans(self) -> list[Plan]:
        return [plan for each in self.rounds for plan in each]


def test_the_optimum_of_a_made_up_device_is_found() -> None:
    device, plans = Device(), PlanSearch(TARGET, seed=1)
    search(plans, device, trials=60)
    (best,) = plans.best(1)
    assert plans.measured == len(device.plans) == 60
    assert best.ratio == made_up(best.plan) > 1.06 - 0.012, "two nano-batches, a share next to it, SMs next to them"
    assert best.ratio > max(made_up(plan) for plan in device.plans[: 3 * ROUND]) + 0.005, "more than the favourites"
    assert all(len(each) <= ROUND for each in device.rounds)


def test_every_proposal_is_valid_and_none_is_measured_twice() -> None:
    device = Device()
    search(PlanSearch(TARGET, seed=2), device, trials=30)
    texts = [plan.dumps() for plan in device.plans]
    assert len(texts) == len(set(texts)) == 30
    assert Plan.sequential(GRAPH, ROWS).dumps() not in texts, "it is what all of them are compared with"
    for plan in device.plans:
        validate(plan, GRAPH)
        assert plan.capacity == ROWS


def test_a_small_space_is_searched_to_its_best_as_a_grid_of_it_says() -> None:
    """Two nano-batches at most, no SMs to set apart: every cut of a grid, against what the search finds."""
    small = Target(GRAPH, Mix(100, 700, (28,)), 128, H100.rates, 0)

    def ratio(plan: Plan) -> float:
        return small.predict(Plan.sequential(small.graph, 128)) / small.predict(plan)

    grid = [
        build_plan(
            PlanChoice((cut, 16 - cut), (cut, 16 - cut), 64, whole=whole, beside=(True, True), skew=skew),
            small.graph,
            small.mix,
            128,
            small.rates,
        )
        for cut, whole, skew in product(range(2, 15, 2), (frozenset[str](), frozenset({"gate_up", "down"})), (0, 2, 4))
    ]
    plans = PlanSearch(small, seed=3)
    search(plans, lambda asked: [Outcome(ratio(plan)) for plan in asked], trials=18)
    assert plans.best(1)[0].ratio >= 0.99 * max(map(ratio, grid))


def test_the_favourites_come_first_and_the_simulator_rejects_none_of_them() -> None:
    plans = PlanSearch(TARGET)
    first = plans.propose()
    assert len(first) == ROUND and memory_sms(first[0].plan) == 32
    assert any(candidate.predicted < 1 for candidate in first)
    sizes = {parameters.get("memory_sms") for parameters in favourites(GRAPH, ROWS, 132)}
    assert {24, 28, 32, 36, 40} <= sizes
    kernels = [parameters["kernel_decode_attention"] for parameters in favourites(GRAPH, ROWS, 132, ("triton_3", "no"))]
    assert "triton_3" in kernels and "" in kernels and "no" not in kernels
    assert favourites(GRAPH, 100, 132) == [], "too few rows to cut"
    assert all("memory_sms" not in parameters for parameters in favourites(GRAPH, ROWS, 0))


def test_ranks_begin_with_sums_beside_products_of_the_other_half() -> None:
    rank = shard_graph(open_graph("llama-3-70b", Plan(1, (), ()), "a test")[2], 0, 2)
    target = Target(rank, Mix(500, 768, (512, 12)), 1024, H200.rates, 132, collective_forms(rank))
    search = PlanSearch(target)
    first = [candidate.plan for candidate in search.propose(15)]
    for plan in first:
        validate(plan, rank)
    shardings = ("all_reduce", "reduce_scatter", "fused_reduce_scatter")
    sequential, lanes = first[:6], first[6:]
    assert [plan.sharding for plan in sequential] == [sharding for sharding in shardings for _ in range(2)]
    forms = ("two_shot", "copy_engine", *("push_64", "copy_engine") * 2)
    for plan, form in zip(sequential, forms, strict=True):
        bare = Plan.sequential(rank, 1024, sharding=plan.sharding)
        assert replace(plan, kernels=bare.kernels) == bare and set(plan.kernels.values()) == {form}
        assert len(plan.kernels) == (2, 4, 3)[shardings.index(plan.sharding)]
    turns, apart = ("compute", "network"), ("compute", "memory", "network")
    assert [plan.lanes for plan in lanes] == [turns, apart, turns] * 3
    assert [plan.sharding for plan in lanes] == [sharding for sharding in shardings for _ in range(3)]
    assert [plan.partitions.get("split") for plan in lanes] == [None, None, (124, 8)] * 3
    assert set(lanes[0].kernels) == {"o_all_reduce", "down_all_reduce"}
    assert {kernel for plan in lanes for kernel in plan.kernels.values()} == {"copy_engine"}
    later = [candidate.plan for candidate in search.propose()]
    assert any(plan.lanes == ("compute", "memory", "network") for plan in later), "the families of one device"
    told = [step.plan for step in search.steps]
    assert not told and search.sequential.sharding == "all_reduce"


def test_what_is_predicted_worst_is_not_measured_but_for_one_a_round() -> None:
    plans, device = PlanSearch(TARGET, seed=4), Device()
    search(plans, device, trials=len(favourites(GRAPH, ROWS, 132, TARGET.kernels)) // ROUND * ROUND + ROUND)
    candidates = plans.propose()
    predicted = [candidate.predicted for candidate in candidates]
    assert len(candidates) == ROUND and predicted[:-1] == sorted(predicted[:-1], reverse=True)
    rejected = [trial for trial in plans._study.trials if trial.state.name == "FAIL"]
    assert len(rejected) >= 2 * ROUND and all(trial.value is None for trial in rejected)


def test_wrong_outputs_never_win() -> None:
    def measure(plans: Sequence[Plan]) -> list[Outcome]:
        wrong = Outcome(None, "its outputs are wrong")
        return [wrong if memory_sms(plan) == 36 else Outcome(made_up(plan)) for plan in plans]

    plans = PlanSearch(TARGET, seed=5)
    search(plans, measure, trials=30)
    assert plans.measured == 30 and "its outputs are wrong" in plans.failures
    assert all(memory_sms(tried.plan) != 36 for tried in plans.best(30))


def test_a_second_start_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a" / "plans.journal"
    first = Device()
    plans = PlanSearch(TARGET, Journal(path))
    search(plans, first, trials=14)
    again, second = PlanSearch(TARGET, Journal(path)), Device()
    assert again.measured == 14 and again.best(3) == plans.best(3)
    search(again, second, trials=20)
    assert len(second.plans) == 6, "what earlier starts measured counts"
    assert not {plan.dumps() for plan in first.plans} & {plan.dumps() for plan in second.plans}
    trials = Journal(path).trials
    assert trials[0].params["nano_batches"] == 1 and trials[0].value == 1.0
    assert len(trials) == 21 and trials[1].user_attrs["iteration_ms"] == pytest.approx(40 / trials[1].value)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from nanoflow.search.journal import Journal
from nanoflow.search.tuner import PlanSearch, search
from tests.unit.test_tuner import TARGET, Device
plans = PlanSearch(TARGET, Journal(Path(sys.argv[1])))
told = 0
def tell(candidate, outcome, own=plans.tell):
    global told
    if told == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    own(candidate, outcome)
    told += 1
    print(candidate.plan.dumps().__hash__(), flush=True)
plans.tell = tell
search(plans, Device())
"""


def test_a_kill_between_two_plans_loses_nothing_that_was_told(tmp_path: Path) -> None:
    path, root = tmp_path / "plans.journal", str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), root],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(done.stdout.split()) == 8
    plans = PlanSearch(TARGET, Journal(path))
    assert plans.measured == 8
    assert all(trial.state.is_finished() for trial in Journal(path).trials)
    search(plans, Device(), trials=10)
    assert plans.measured == 10


def test_a_torn_line_is_cut_off_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plans.journal"
    search(PlanSearch(TARGET, Journal(path)), Device(), trials=3)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "wor')
    plans = PlanSearch(TARGET, Journal(path))
    assert path.read_bytes().startswith(whole) and plans.measured == 3
    search(plans, Device(), trials=4)
    assert PlanSearch(TARGET, Journal(path)).measured == 4
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(PlanError, match=r"plans\.journal: the file is damaged .*delete it"):
        Journal(path)
    path.write_text(json.dumps({"nothing": 1}) + "\n")
    with pytest.raises(PlanError, match=r"plans\.journal: the file is damaged"):
        Journal(path)


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"file/x\.journal: the search cannot be kept: .*--out"):
        Journal(tmp_path / "file" / "x.journal")
