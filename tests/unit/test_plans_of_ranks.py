"""Plans for ranks that share a model: estimates with a network lane, what the commands show, who may run them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner, Result

from benchmarks.network_lanes import candidates, in_sequence
from nanoflow.cli import app
from nanoflow.ops.collectives import AllReduce
from nanoflow.ops.operation import Operation, Work
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.plan import FrozenMapping, Plan, PlanError
from nanoflow.pipeline.program import compile_program
from nanoflow.plans.case import H100, H200, NVLINK4, open_case, open_graph
from nanoflow.plans.chrome_trace import read_trace, trace_events
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.fingerprint import Fingerprint, graph_shape, ranks_of
from nanoflow.search.mix import Mix, mix_works
from nanoflow.search.profile import Profile
from nanoflow.search.rates import LINK_SMS, CeilingRates, Running, collective_sms, shared_sms, wire_share
from nanoflow.search.simulate import Simulation, simulate
from nanoflow.search.space import PlanChoice, build_plan
from nanoflow.search.timeline import measured_timeline
from nanoflow.search.tuner import Target
from nanoflow.tuning import simulated as simulated_jobs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WHOLE = replace(open_graph("llama-3-70b", Plan(1, (), ()), "test")[2], layers=4)
RANK = shard_graph(WHOLE, 0, 2)
WORK = Work(decode_rows=1024, prefill_rows=1024, decode_context=1024 * 768)
MIX = Mix(1024, 768, (512, 512))
RATES = CeilingRates(Ceilings(flops=1e15, bytes_per_second=4e12, link_bytes_per_second=200e9), 132, 2)
SUMS, GATE_UP = RANK.operation("o_all_reduce"), RANK.operation("gate_up")
FORMS = FrozenMapping({"o_all_reduce": "nccl_8", "down_all_reduce": "nccl_8"})
HALVES = PlanChoice((8, 8), (8, 8), skew=1, network=True, kernels=FORMS)


def halves(choice: PlanChoice = HALVES) -> Plan:
    return build_plan(choice, RANK, MIX, 2048, H200.rates)


def simulated(plan: Plan, rates: CeilingRates = RATES) -> Simulation:
    return simulate(compile_program(plan, RANK), mix_works(plan, MIX), rates)


def test_a_collective_takes_its_bytes_on_the_wire_at_the_link() -> None:
    sent = 2048 * 8192 * 2  # of two ranks, each sends as much as the buffer holds
    assert SUMS.cost(WORK, 2).wire_bytes == sent
    assert RATES.seconds(SUMS, WORK, None) == pytest.approx(sent / 200e9)
    assert RATES.seconds(SUMS, WORK, 100) == pytest.approx(sent / 200e9)
    assert RATES.seconds(SUMS, WORK, None, "copy_engine") == pytest.approx(sent / 200e9)
    few = RATES.seconds(SUMS, WORK, None, "nccl_8")
    assert few == RATES.seconds(SUMS, WORK, 8) == pytest.approx(sent / (200e9 * wire_share(8)))
    unknown = replace(RATES, ceilings=replace(RATES.ceilings, link_bytes_per_second=None))
    assert unknown.seconds(SUMS, WORK, None) == pytest.approx(SUMS.cost(WORK, 2).bytes / 4e12)


def test_few_sms_fill_the_share_of_the_link_that_was_measured() -> None:
    measured = {2: 46.5, 4: 90, 8: 167.3, 16: 239.8, LINK_SMS: 264.6}
    for sms, rate in measured.items():
        assert wire_share(sms) == pytest.approx(rate / 264.6, rel=0.025)
    assert wire_share(0) == 1.0, "copy engines take none"
    assert all(wire_share(sms) < wire_share(sms + 1) for sms in range(1, LINK_SMS))


def test_all_reduces_take_what_was_measured() -> None:
    """Of 1 to 64 MiB between two H200s, in each form; NCCL jumps where it changes its ways."""
    recorded = json.loads((RESULTS / "collectives.json").read_text())["alone"]
    op = AllReduce("sum", "x", 8192, 2)
    for size, forms in recorded.items():
        work = Work(prefill_rows=int(size.split()[0]) * 64)
        for form, limit in {
            "nccl": 0.25,
            "nccl_8": 0.25,
            "nccl_16": 0.25,
            "copy_engine": 0.15,
            "two_shot": 0.2,
        }.items():
            predicted = H200.rates.seconds(op, work, None, form)
            assert predicted == pytest.approx(forms[form]["milliseconds"] / 1e3, rel=limit), (size, form)


@pytest.mark.parametrize(
    ("kernel", "lane", "sms"),
    [
        ("", None, 24),
        ("nccl", 8, 8),
        ("nccl_4", None, 4),
        ("nccl_4", 2, 2),
        ("copy_engine", 8, 0),
        ("one_shot", 20, 20),
        ("two_shot", None, 16),
    ],
)
def test_the_sms_that_a_collective_takes(kernel: str, lane: int | None, sms: int) -> None:
    assert collective_sms(kernel, lane) == sms


def test_a_product_beside_a_collective_keeps_all_sms_but_those_that_it_takes() -> None:
    def kept(form: str) -> float:
        return RATES.kept(Running(GATE_UP, WORK, None), [Running(SUMS, WORK, None, form)])

    assert kept("copy_engine") == pytest.approx(1.0), "copy engines take none"
    assert kept("nccl_16") == pytest.approx(116 / 132), "and no collective takes half of the device"
    assert RATES.kept(Running(SUMS, WORK, None), [Running(GATE_UP, WORK, None)]) == pytest.approx(1.0)
    assert shared_sms(132, [None, None, 12]) == 60 and shared_sms(132, [100, 32]) == 0


def test_collectives_beside_each_other_share_the_link() -> None:
    both = Running(SUMS, WORK, None), Running(RANK.operation("down_all_reduce"), WORK, None, "copy_engine")
    assert RATES.kept(both[0], [both[1]]) == pytest.approx(0.5)
    few = replace(both[1], kernel="nccl_4")  # takes a third of the link, and leaves the rest
    assert RATES.kept(both[0], [few]) == pytest.approx(1 - wire_share(4))
    assert RATES.kept(few, [both[0]]) == pytest.approx(1.0)


def test_a_network_lane_hides_what_a_sequence_waits_for() -> None:
    """Sums of 2,048 rows take 168 us a piece, twice a layer. Beside products on all SMs but eight, they are hidden."""
    sequential = simulated(Plan.sequential(RANK, 2048))
    sums = [span for span in sequential.timeline.spans if span.resource == "network"]
    assert sum(span.seconds for span in sums) == pytest.approx(2 * 4 * 2048 * 8192 * 2 / 200e9)
    assert {load.sms for segment in sequential.timeline.segments for load in segment.loads} == {132, LINK_SMS}
    overlapped = simulated(halves())
    follows = simulated(halves(replace(HALVES, network=False)))
    assert overlapped.seconds < sequential.seconds * 0.96 < follows.seconds
    fullest = max(sum(load.sms for load in segment.loads) for segment in overlapped.timeline.segments)
    assert fullest == pytest.approx(132)
    sent = max(load.wire_bytes_per_second for each in overlapped.timeline.segments for load in each.loads)
    assert sent == pytest.approx(200e9 * wire_share(8)), "eight thread blocks do not fill the link"


def test_a_measured_timeline_has_the_wire_too() -> None:
    plan = halves()
    program, found = compile_program(plan, RANK), simulated(plan).timeline
    times = [(span.start, span.end) for span in found.spans]
    measured = measured_timeline(program, times, mix_works(plan, MIX), 2, 132)
    assert measured.has_wire
    events = list(trace_events(measured, "a device"))
    sums = [event for event in events if event.get("cat") == "network" and event["ph"] == "X"]
    assert len(sums) == 4 * 4
    # Of half the rows: it is slowed by nothing, so this is the share of the link that its thread blocks fill.
    assert sums[0]["args"]["wire bytes"] == 1024 * 8192 * 2
    (rate,) = {event["args"]["wire GB/s"] for event in sums}
    assert rate == pytest.approx(200 * wire_share(8), abs=0.1)
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"wire GB/s"}
    shared = [sum(load.sms for load in each.loads) for each in measured.segments if len(each.loads) == 2]
    assert shared and max(shared) == pytest.approx(132)


def test_what_is_known_of_the_link() -> None:
    assert H200.ceilings.link_bytes_per_second == H100.ceilings.link_bytes_per_second == NVLINK4
    profile = Profile(Fingerprint(sms=132), Ceilings(1e15, 3e12), None)
    profiled = replace(H100, profile=profile).rates_ceilings
    assert profiled.link_bytes_per_second == NVLINK4 and profiled.flops == 1e15


def test_h200s_of_the_shape_that_was_measured_take_what_was_measured() -> None:
    """Two H200s, Llama-3-70B: the products of 2,048 rows 2.57 ms, attention 0.39 ms, both sums 0.28 ms."""
    seconds = {op.name: H200.rates.seconds(op, WORK, None) for op in RANK.layer}
    assert sum(seconds[name] for name in ("qkv", "o", "gate_up", "down")) == pytest.approx(2.57e-3, rel=0.01)
    assert seconds["decode_attention"] == pytest.approx(0.39e-3, rel=0.02)
    assert seconds["o_all_reduce"] + seconds["down_all_reduce"] == pytest.approx(0.282e-3, rel=0.02)


def test_plans_of_two_h200s_are_predicted_as_they_were_measured() -> None:
    """Whole iterations of Llama-3-70B: all a little too fast, and their ratios right."""
    recorded = json.loads((RESULTS / "network_lanes.json").read_text())
    mixed = {label: each["milliseconds"] for label, each in recorded["mixed"]["printed"].items()}
    middle = {
        label: median(block["seconds"] for block in each["blocks"]) * 1e3
        for label, each in recorded["512-512"]["final"].items()
    }
    ratios = []
    for name, measured, base, label in (
        ("mixed", mixed, "sequential rs copy_engine", "turns ar copy_engine shared light"),
        ("512-512", middle, "sequential rs push", "turns ar copy_engine shared light"),
    ):
        mix = Mix(**{**recorded[name]["mix"], "prompts": tuple(recorded[name]["mix"]["prompts"])})
        plans = {**in_sequence(RANK, mix.rows, True), **candidates(mix.rows, True, True)}
        found = {}
        for each in (base, label):
            target = Target(RANK, mix, mix.rows, H200.rates, 132)
            found[each] = target.predict(plans[each]) * 80e3
            assert 0.92 < found[each] / measured[each] < 1.0, (name, each)
        ratios.append((found[base] / found[label], measured[base] / measured[label]))
    for predicted, ratio in ratios:
        assert predicted == pytest.approx(ratio, abs=0.02)


# Whose plan it is.


def shape(ranks: int) -> str:
    return graph_shape(shard_graph(WHOLE, 0, ranks))


def test_a_plan_for_other_ranks_is_refused_with_the_key() -> None:
    assert [ranks_of(shape(ranks)) for ranks in (1, 2, 4)] == [1, 2, 4]
    assert "ranks" not in shape(1) and ranks_of("") == 1
    here = Fingerprint(model="llama-3-70b", shape=shape(2))
    own = here.stamp(halves())
    assert here.refusals(own) == []
    (line,) = replace(here, shape=shape(4)).refusals(own)
    assert line.endswith("(parallel.tensor: the plan is for 2, the run has 4)")
    with pytest.raises(PlanError, match=r"parallel\.tensor: the plan is for 2, the run has 1"):
        replace(here, shape=shape(1)).refuse(own)
    other = replace(here, shape=shape(2) + "0").refusals(own)
    assert len(other) == 1 and "parallel" not in other[0], "another model of as many ranks"


# The commands.


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    own = Fingerprint(model="llama-3-70b", gpu=H200.name, sms=132, shape=shape(2), dtype="bfloat16").stamp(halves())
    (tmp_path / "net.yaml").write_text(own.dumps())
    (tmp_path / "any.yaml").write_text(replace(own, fingerprint=FrozenMapping()).dumps())
    return "net.yaml"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_show_takes_the_plans_ranks(plan: str) -> None:
    shown = run("show", plan, "--layers", "4")
    assert shown.exit_code == 0, shown.output
    assert "llama-3-70b, 4 layers on 2 ranks: " in shown.output
    assert re.search(r"\n +network +\|.*oar\.a.*\|", shown.output)
    assert "746 TFLOP/s, 4,130 GB/s, 265 GB/s on the wire, 132 SMs" in shown.output
    assert shown.output == run("show", "any.yaml", "--tensor", "2", "--layers", "4").output.replace("any", "net")
    four = run("show", plan, "--tensor", "4", "--layers", "4")
    assert "4 layers on 4 ranks: " in four.output, "what if"


def test_show_says_so_where_the_link_is_not_known(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(H200, ceilings=replace(H200.ceilings, link_bytes_per_second=None))
    monkeypatch.setitem(__import__("nanoflow.plans.case", fromlist=["DEVICES"]).DEVICES, H200.name, bare)
    text = run("show", plan, "--layers", "4").output
    assert "the link between ranks is not known: collectives take what their bytes take in memory" in text
    assert "4,130 GB/s, link not known, 132 SMs" in text


def test_check_is_for_the_plans_own_ranks(plan: str) -> None:
    checked = run("check", plan, "--layers", "3")
    assert checked.exit_code == 0, checked.output
    assert "3 layers of 12 operations, on each of 2 ranks" in checked.output and "network" in checked.output
    refused = run("check", plan, "--tensor", "4")
    assert refused.exit_code == 2
    assert "the plan was tuned for parallel.tensor: 2, not for 4" in refused.output
    unnamed = run("check", "any.yaml")
    assert unnamed.exit_code == 2 and "set parallel.tensor (plan check: --tensor)" in unnamed.output


def test_a_plan_of_ranks_that_fits_one_is_still_refused_there(plan: str) -> None:
    """It names no collective, so one rank could run it; but it was measured with several."""
    follows = build_plan(replace(HALVES, network=False, kernels=FrozenMapping()), RANK, MIX, 2048, H200.rates)
    Path(plan).write_text(Fingerprint(model="llama-3-70b", shape=shape(2)).stamp(follows).dumps())
    refused = run("check", plan, "--tensor", "1")
    assert refused.exit_code == 2 and "parallel.tensor: 2, not for 1" in refused.output


def test_plot_draws_the_wire(plan: str, tmp_path: Path) -> None:
    drawn = run("plot", plan, "--layers", "4", "--compare", "--out", "net.svg")
    assert drawn.exit_code == 0, drawn.output
    text = (tmp_path / "net.svg").read_text()
    assert "wire GB/s" in text and "265" in text
    assert run("plot", plan, "--layers", "4", "--model", "llama-3-70b", "--out", "again.svg").exit_code == 0
    alone = open_case(plan, layers=4).sequential()
    (tmp_path / "one.yaml").write_text(Plan.sequential(WHOLE, 2048, model="llama-3-70b").dumps())
    assert run("plot", "one.yaml", "--layers", "2", "--out", "one.svg").exit_code == 0
    assert "wire" not in (tmp_path / "one.svg").read_text()
    assert alone.timeline.has_wire


JOB = """\
model: {path: MODEL, weights: random}
parallel: {tensor: 2}
engine: {max_batch_tokens: 512, max_running: 128}
workload: {synthetic: {input_len: 256, output_len: 16, requests: 60}}
output: {path: out.jsonl}
"""


def test_tune_simulates_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(__file__).parents[2] / "configs" / "models" / "llama-3-8b"
    Path("job.yaml").write_text(JOB.replace("MODEL", str(model)))
    arguments = ["tune", "job.yaml", "--simulate", "--gpu", "h200", "--trials", "2", "--out", "best"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "plans estimated for each of 2 NVIDIA H200; nothing was measured" in found.output
    best = Plan.load("best/mix-1-plan-01.yaml")
    assert ranks_of(str(best.fingerprint["shape"])) == 2
    case = open_case("best/mix-1-plan-01.yaml", str(model))
    assert case.graph.ranks == 2 and best.model == "llama-3-8b"


def test_plans_that_are_estimated_alike_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(target: Target, *_: object) -> tuple[list[Plan], int]:
        return [Plan.sequential(target.graph, target.rows)] * 2, 2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simulated_jobs, "_search", alike)
    model = Path(__file__).parents[2] / "configs" / "models" / "llama-3-8b"
    Path("job.yaml").write_text(JOB.replace("MODEL", str(model)))
    found = CliRunner().invoke(app, ["tune", "job.yaml", "--simulate", "--out", "best"])
    assert found.exit_code == 0, found.output
    assert [path.name for path in Path("best").glob("mix-1-*.yaml")] == ["mix-1-plan-01.yaml"]


def test_nothing_but_collectives_goes_over_the_wire() -> None:
    def sends(op: Operation) -> bool:
        return op.cost(WORK, 2).wire_bytes > 0

    assert [op.name for op in RANK.layer if sends(op)] == ["o_all_reduce", "down_all_reduce"]
    assert not any(map(sends, WHOLE.layer))


TINY = """\
model: tiny-llama
capacity: 32
nano_batches:
  a: {decode: 0.5, prefill: 0.5, rows: 16}
  b: {decode: 0.5, prefill: 0.5, rows: 16}
period:
- whole:
    compute: [o.a, o.b, add_norm.a, gate_up.a, down.a, add_norm.b, gate_up.b, down.b, add.a, qkv.a@1, add.b, qkv.b@1,
              decode_attention.a@1, decode_attention.b@1]
    network: [o_all_reduce.a, o_all_reduce.b, down_all_reduce.a, down_all_reduce.b]
"""
SMALL = ["--tensor", "2", "--layers", "2", "--decode", "9", "--context", "30", "--prompts", "7,8"]


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose end ends its ranks: nothing can hang longer than this."""
    command = [sys.executable, "-m", "nanoflow", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_plan_is_traced_and_ablated_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    traced = started("trace", "tiny.yaml", *SMALL, "--device", "cpu", "--iterations", "2")
    assert traced.returncode == 0, traced.stderr
    trace = read_trace(tmp_path / "tiny.trace.json")
    program = open_case("tiny.yaml", layers=2, tensor=2).program
    timeline = trace.timeline(program)
    sums = [span for span in timeline.spans if span.resource == "network"]
    assert len(sums) == 2 * 2 * 2 and all(span.lane == "network" and span.seconds > 0 for span in sums)
    for span, before in zip(timeline.spans, program.predecessors, strict=True):
        assert span.start >= max((timeline.spans[index].end for index in before), default=0.0) - 1e-9
    drawn = run("plot", "tiny.yaml", "--tensor", "2", "--trace", "tiny.trace.json", "--out", "measured.svg")
    assert drawn.exit_code == 0, drawn.output
    assert "wire GB/s" in Path("measured.svg").read_text()

    blocks = ["--seconds", "0.05", "--pairs", "2", "--out", "found.json"]
    ablated = started("ablate", "tiny.yaml", *SMALL, "--device", "cpu", *blocks)
    assert ablated.returncode == 0, ablated.stderr
    assert "tiny-llama on 2 x cpu" in ablated.stdout
    found = json.loads(Path("found.json").read_text())
    assert found["ranks"] == 2 and list(found["plans"]) == ["sequential", "nano-batches", "overlapped"]
    assert all(each["output_error"] < 1e-4 and len(each["blocks"]) == 2 for each in found["plans"].values())


def test_too_many_ranks_for_the_model_are_refused_before_any_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    refused = run("trace", "tiny.yaml", "--tensor", "3", "--device", "cpu")
    assert refused.exit_code == 2 and "--tensor 3: parallel.tensor: 3 ranks cannot share this model" in refused.output
