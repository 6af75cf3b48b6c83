"""Rates by ceilings, and the simulator on them and on made-up ones: lengths, joules and the power limit, by hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nanoflow.ops.gemm_waves import waves
from nanoflow.ops.operation import Operation, Work
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.pipeline.plan_text import parse_plan
from nanoflow.pipeline.program import compile_program
from nanoflow.plans.case import H100, open_case, open_graph
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.mix import Mix, mix_works, shared_works
from nanoflow.search.rates import H100_ENERGY, CeilingRates, Energy, Running
from nanoflow.search.simulate import Simulation, simulate
from nanoflow.search.space import PlanChoice, build_plan
from tests.unit.test_timeline import GRAPH, SPLIT, WORK

LLAMA = replace(open_graph("llama-3-8b", Plan(1, (), ()), "test")[2], layers=4)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "offline_throughput.json"


@dataclass(frozen=True)
class MadeUp:
    """Every operation takes a second and a joule; beside others it keeps `share` of its speed."""

    share: float = 1.0
    idle_watts: float | None = 10.0
    limit_watts: float | None = None
    device_sms: int = 100
    itemsize: int = 2

    def seconds(self, op: Operation, work: Work, sms: int | None, kernel: str = "") -> float:
        return 1.0

    def kept(self, running: Running, beside: Sequence[Running]) -> float:
        return self.share if beside else 1.0

    def joules(self, op: Operation, work: Work, sms: int | None) -> float:
        return 1.0


def split(rates: MadeUp) -> Simulation:
    plan = parse_plan(SPLIT)
    return simulate(compile_program(plan, GRAPH), shared_works(plan, WORK), rates)


def test_the_simulator_takes_any_rates() -> None:
    alone, slowed = split(MadeUp()), split(MadeUp(share=0.5))
    assert all(span.seconds == pytest.approx(1.0) for span in alone.timeline.spans)
    beside = [segment for segment in alone.timeline.segments if len(segment.loads) == 2]
    assert beside, "nothing overlaps"
    # What ran beside something takes up to twice as long, and no time is lost: at half speed two lanes do one's work.
    assert slowed.seconds > alone.seconds
    assert max(span.seconds for span in slowed.timeline.spans) == pytest.approx(2.0)
    assert slowed.seconds == pytest.approx(len(slowed.timeline.spans))


def test_joules_are_those_of_the_work_and_those_of_the_time() -> None:
    program = compile_program(Plan.sequential(GRAPH, 32), GRAPH)
    steps = len(program.steps)
    free = simulate(program, [WORK], MadeUp())
    assert free.seconds == free.limited_seconds == pytest.approx(steps)
    assert free.joules == pytest.approx(steps + 10.0 * steps)
    # A joule and ten watts for a second each: 11 W. With 10.5 W allowed, half a watt is left for a joule: 2 seconds at
    # the full clock's joules, and fewer at a lower one.
    limited = simulate(program, [WORK], MadeUp(limit_watts=10.5))
    assert limited.seconds == pytest.approx(steps)
    assert limited.limited_seconds == pytest.approx(2 ** (1 / 1.5) * steps)
    clock = steps / limited.limited_seconds
    assert limited.joules == pytest.approx(steps * clock**0.5 + 10.0 * limited.limited_seconds)
    assert limited.work_joules == pytest.approx(steps)
    assert limited.joules == pytest.approx(10.5 * limited.limited_seconds)
    assert simulate(program, [WORK], MadeUp(limit_watts=11.5)).limited_seconds == pytest.approx(steps)


def test_what_is_not_known_is_not_made_up() -> None:
    found = split(MadeUp(idle_watts=None, limit_watts=1.0))
    assert found.joules is None and found.limited_seconds == found.seconds
    with pytest.raises(ValueError, match="a power limit of 10 W is not above the 10 W"):
        split(MadeUp(limit_watts=10.0))


def test_an_operation_without_rows_takes_neither_time_nor_joules() -> None:
    found = simulate(
        compile_program(Plan.sequential(GRAPH, 32), GRAPH), [Work(decode_rows=4, decode_context=9)], MadeUp()
    )
    assert {span.seconds for span in found.timeline.spans if span.op == "prefill_attention"} == {0.0}
    assert found.joules == pytest.approx(11.0 * sum(span.seconds > 0 for span in found.timeline.spans))


def test_products_take_whole_rounds_of_tiles() -> None:
    rates, work = H100.rates, Work(decode_rows=640, decode_context=640)
    qkv = LLAMA.operation("qkv")
    plain = replace(rates, tiles=False)
    for sms in (92, 100):
        used = waves(6144, 4096, 640, sms, silu=False).used
        assert rates.seconds(qkv, work, sms) == pytest.approx(plain.seconds(qkv, work, sms) / used)
    # 100 SMs take one full round of it, and 92 two: docs/performance.md.
    assert rates.seconds(qkv, work, 92) > 1.2 * rates.seconds(qkv, work, 100)
    gate_up = LLAMA.operation("gate_up")
    used = waves(28672, 4096, 640, 100, silu=True).used
    assert rates.seconds(gate_up, work, 100) == pytest.approx(plain.seconds(gate_up, work, 100) / used, rel=1e-3)
    attention = LLAMA.operation("decode_attention")
    assert rates.seconds(attention, work, 40) == plain.seconds(attention, work, 40)


def test_attention_with_other_numbers_of_programs_reads_by_what_they_have_under_way() -> None:
    mix = Mix(500, 700, (560,))

    def attention(memory: int, kernel: str = "") -> float:
        kernels = FrozenMapping({"decode_attention": kernel} if kernel else {})
        choice = PlanChoice((8, 8), (8, 8), beside=(True, True), skew=4, memory_sms=memory, kernels=kernels)
        plan = build_plan(choice, LLAMA, mix, 1152, H100.rates)
        timeline = simulate(compile_program(plan, LLAMA), mix_works(plan, mix), H100.rates).timeline
        lanes = {load.sms for segment in timeline.segments for load in segment.loads if load.lane == "memory"}
        assert lanes == {float(memory)}, "they are the lane's all the same"
        return next(span.seconds for span in timeline.spans if span.op == "decode_attention")

    assert attention(40, "triton_3") == pytest.approx(attention(24), rel=0.02)
    assert attention(40) < attention(40, "triton_4") < attention(40, "triton_3") < attention(40, "triton_2")
    assert (
        attention(40, "triton_8") == attention(40, "triton_4") < attention(40, "triton_7") < attention(40, "triton_3")
    )


def test_lanes_that_are_not_confined_share_the_sms() -> None:
    rates = CeilingRates(Ceilings(1e9, 1e15), 100, 2)
    product = Running(GRAPH.operation("qkv"), WORK, None)
    assert rates.kept(product, []) == pytest.approx(1.0)
    assert rates.kept(product, [product]) == pytest.approx(0.5)
    assert rates.kept(product, [product, product]) == pytest.approx(1 / 3)
    # Beside a confined lane it has the device to itself: plans never mix the two in a stage.
    assert rates.kept(replace(product, sms=60), [replace(product, sms=40)]) == pytest.approx(1.0)


def test_bandwidth_is_shared_evenly_and_what_is_left_over_goes_to_the_others() -> None:
    rates = CeilingRates(Ceilings(1e15, 1e9), 100, 2)
    attention = Running(GRAPH.operation("decode_attention"), WORK, 60)
    # Each of them alone reads nearly the ceiling; two get half each, three a third.
    alone = rates.seconds(attention.op, WORK, 60)
    moved = attention.op.cost(WORK, 2).bytes / alone
    for others in (1, 2):
        assert rates.kept(attention, [attention] * others) == pytest.approx(1e9 / (1 + others) / moved)
    # One that reads little leaves more than half.
    slow = replace(rates, ceilings=Ceilings(1e9, 1e9))
    down = Running(GRAPH.operation("down"), replace(WORK, prefill_rows=4000), 40)
    needs = down.op.cost(down.work, 2).bytes / slow.seconds(down.op, down.work, 40)
    assert needs < 0.4e9
    assert slow.kept(down, [attention]) == pytest.approx(1.0)
    read = attention.op.cost(WORK, 2).bytes / slow.seconds(attention.op, WORK, 60)
    assert slow.kept(attention, [down]) == pytest.approx(min(1.0, (1e9 - needs) / read))


def test_the_power_model_gives_the_joules_of_the_recorded_runs() -> None:
    """FLOPs, bytes and seconds as they were recorded; two of the runs gave the figures, the others must follow."""
    checked = 0
    for name, run in json.loads(RESULTS.read_text(encoding="utf-8"))["runs"].items():
        steady = run["repetitions"][0]["steady"]
        if steady["iterations"] < 200 or not steady.get("joules"):
            continue
        checked += 1
        told = (
            steady["flops"] * H100_ENERGY.joules_per_flop
            + steady["bytes"] * H100_ENERGY.joules_per_byte
            + steady["seconds"] * H100_ENERGY.watts
        )
        assert told == pytest.approx(steady["joules"], rel=0.02), name
    assert checked >= 5


def test_an_iteration_of_the_recorded_run_takes_about_its_joules() -> None:
    """512-512 in steady state: 44.2 ms and 30.6 J an iteration, of 551 decode rows among 1,105. The estimate leaves out
    the head and launching, and counts 1,105 rows as nine tiles of 128."""
    graph = replace(LLAMA, layers=32)
    plan = Plan.sequential(graph, 1152)
    found = simulate(compile_program(plan, graph), mix_works(plan, Mix(551, 768, (512, 42))), H100.rates)
    assert found.joules is not None
    assert found.joules == pytest.approx(30.6, rel=0.05)
    assert found.limited_seconds == pytest.approx(44.2e-3, rel=0.05)


def test_energy_goes_by_flops_and_bytes() -> None:
    rates = CeilingRates(Ceilings(1e12, 1e12, power_limit_watts=50.0), 100, 2, energy=Energy(2.0, 3.0, 5.0))
    cost = GRAPH.operation("o").cost(WORK, 2)
    for sms in (None, 8):
        assert rates.joules(GRAPH.operation("o"), WORK, sms) == 2.0 * cost.flops + 3.0 * cost.bytes
    assert (rates.idle_watts, rates.limit_watts) == (5.0, 50.0)
    unknown = replace(rates, energy=None)
    assert (unknown.idle_watts, unknown.joules(GRAPH.operation("o"), WORK, 8)) == (None, 0.0)


def test_the_documentation_says_what_power_makes_of_its_plan(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
    path = tmp_path / "tuned.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    case = open_case(path)
    found, sequential = case.simulation, case.sequential().simulation
    text = " ".join(page.split())
    assert (
        f"{found.seconds * 1e3:.1f} ms if power limited nothing, where the sequential one takes "
        f"{sequential.seconds * 1e3:.1f};"
    ) in text
    assert (
        f"under 700 W it takes {found.limited_seconds * 1e3:.1f} ms and {found.joules:.1f} J, against "
        f"{sequential.limited_seconds * 1e3:.1f} ms and {sequential.joules:.1f} J."
    ) in text
