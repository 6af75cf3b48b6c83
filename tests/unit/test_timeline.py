"""Timelines of plans, estimated on ceilings where lengths can be told by hand, and made of measured times."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.operation import Work
from nanoflow.pipeline.plan import Entry, FrozenMapping, NanoBatch, Plan, Stage
from nanoflow.pipeline.plan_text import parse_plan
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.search.cost_model import Ceilings, work_of, works_of
from nanoflow.search.mix import shared_works
from nanoflow.search.profile import Profile
from nanoflow.search.rates import CeilingRates, bandwidth_on
from nanoflow.search.simulate import simulate
from nanoflow.search.timeline import Timeline, measured_timeline
from tests.unit.plan_strategies import batches, plans

CEILINGS = Ceilings(flops=1e9, bytes_per_second=1e9)
WORK = Work(decode_rows=16, prefill_rows=16, decode_context=800, prefill_context=40, prefill_pairs=300, sampled_rows=17)
GRAPH = build_graph(
    ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 300,
            "max_position_embeddings": 160,
        }
    )
)
PLANS = Path(__file__).parents[1] / "models" / "plans"
SPLIT = (
    (PLANS / "skewed.yaml")
    .read_text(encoding="utf-8")
    .replace("period:", "sms: 100\npartitions: {split: [70, 30]}\nperiod:")
    .replace("whole:", "split:")
)


def estimate(plan: Plan, work: Work = WORK, ceilings: Ceilings = CEILINGS, sms: int = 100) -> Timeline:
    return simulate(compile_program(plan, GRAPH), shared_works(plan, work), CeilingRates(ceilings, sms, 4)).timeline


def check(timeline: Timeline, program: Program, ceilings: Ceilings = CEILINGS) -> None:
    """What holds for every estimate."""
    spans = timeline.spans
    assert [span.step for span in spans] == list(range(len(program.steps)))
    assert timeline.seconds == pytest.approx(max(span.end for span in spans))
    for span, before in zip(spans, program.predecessors, strict=True):
        assert span.end >= span.start >= max((spans[index].end for index in before), default=0.0)
    for one, other in pairwise(timeline.segments):
        assert one.start < one.end <= other.start + 1e-15
    for segment in timeline.segments:
        assert sum(load.sms for load in segment.loads) <= timeline.device_sms * (1 + 1e-9)
        assert sum(load.bytes_per_second for load in segment.loads) <= ceilings.bytes_per_second * (1 + 1e-9)
        assert sum(load.flops_per_second for load in segment.loads) <= ceilings.flops * (1 + 1e-9)
    for kind, per_second in (("flops", "flops_per_second"), ("bytes", "bytes_per_second")):
        done = sum((s.end - s.start) * sum(getattr(load, per_second) for load in s.loads) for s in timeline.segments)
        assert done == pytest.approx(sum(getattr(span, kind) for span in spans))


def test_in_sequence_every_operation_takes_what_its_ceilings_demand() -> None:
    plan = Plan.sequential(GRAPH, 32)
    timeline = estimate(plan)
    check(timeline, compile_program(plan, GRAPH))
    clock = 0.0
    for span, op in zip(timeline.spans, GRAPH.layer * GRAPH.layers, strict=True):
        cost = op.cost(WORK, 4)
        assert span.start == pytest.approx(clock)
        clock += max(cost.flops, cost.bytes) / 1e9
        assert span.end == pytest.approx(clock)
        assert (span.name, span.resource, span.lane, span.sms) == (op.name, op.resource, "main", None)
    assert timeline.seconds == pytest.approx(clock)
    assert timeline.busy() == {"main": pytest.approx(1.0)}


def test_lanes_run_side_by_side_on_their_parts_of_the_device() -> None:
    plan = parse_plan(SPLIT)
    timeline = estimate(plan)
    check(timeline, compile_program(plan, GRAPH))
    assert {span.sms for span in timeline.spans if span.lane == "memory"} == {30}
    assert any(len(segment.loads) == 2 for segment in timeline.segments), "nothing overlaps"
    # Nothing else limits a product here but its lane's share of the FLOP/s.
    lone = estimate(plan, ceilings=Ceilings(1e9, 1e15))
    down = next(span for span in lone.spans if span.op == "down")
    assert down.seconds == pytest.approx(down.flops / (1e9 * 0.7))
    # And nothing attention but the bandwidth of its SMs.
    reading = estimate(plan, ceilings=Ceilings(1e15, 1e9))
    attention = [span for span in reading.spans if span.op == "decode_attention"]
    assert min(span.seconds for span in attention) >= attention[0].bytes / bandwidth_on(30, 100, 1e9) * (1 - 1e-9)


def test_lanes_that_read_together_share_the_bandwidth() -> None:
    lanes = FrozenMapping({"one": (Entry("qkv", "a"),), "two": (Entry("qkv", "b"),)})
    half = Fraction(1, 2)
    plan = Plan(
        capacity=32,
        nano_batches=(NanoBatch("a", half, half, 16), NanoBatch("b", half, half, 16)),
        period=(Stage("half", lanes),),
        partitions=FrozenMapping({"half": (50, 50)}),
        sms=100,
    )
    timeline = estimate(plan, ceilings=Ceilings(1e15, 1e9))
    check(timeline, compile_program(plan, GRAPH), Ceilings(1e15, 1e9))
    both = next(segment for segment in timeline.segments if len(segment.loads) == 2)
    assert [load.bytes_per_second for load in both.loads] == [pytest.approx(5e8)] * 2


@settings(max_examples=40, deadline=None)
@given(plans(GRAPH), st.floats(1e7, 1e11), st.floats(1e7, 1e11))
def test_no_estimate_exceeds_its_ceilings_or_its_waits(plan: Plan, flops: float, bandwidth: float) -> None:
    program, ceilings = compile_program(plan, GRAPH), Ceilings(flops, bandwidth)
    timeline = simulate(program, shared_works(plan, WORK), CeilingRates(ceilings, 100, 4)).timeline
    check(timeline, program, ceilings)
    again = measured_timeline(
        program, [(s.start, s.end) for s in timeline.spans], shared_works(plan, WORK), 4, timeline.device_sms
    )
    assert (again.spans, again.seconds, again.source) == (timeline.spans, timeline.seconds, "measured")
    assert again.busy() == pytest.approx(timeline.busy())
    for segment in again.segments:
        assert sum(load.sms for load in segment.loads) <= 100 * (1 + 1e-9)


def test_a_period_is_cut_where_the_next_one_begins() -> None:
    timeline = estimate(parse_plan(SPLIT))
    whole = [timeline.period(layer) for layer in range(4)]
    middle = timeline.period()
    assert middle == whole[2] and middle.layer == 2
    for one, other in pairwise(whole[1:]):
        assert one.seconds == pytest.approx(other.seconds)
    starts = {span.label(middle.layer): span.start for span in middle.spans}
    assert starts["o.a"] == pytest.approx(0.0)
    assert all(span.start < middle.seconds and span.end > 0 for span in middle.spans)
    assert middle.segments[0].start == 0.0 and middle.segments[-1].end <= middle.seconds
    # The stretches fit together: nothing is lost or counted twice at their edges.
    parts = sum(part.busy()["memory"] * part.seconds for part in whole)
    stretch = timeline.cut(
        next(s.start for s in timeline.spans if s.repetition == 0 and s.name == "o.a"),
        next(s.start for s in timeline.spans if s.repetition == 4 and s.name == "o.a"),
        0,
    )
    assert parts == pytest.approx(stretch.busy()["memory"] * stretch.seconds)


def test_the_layers_of_a_stretch() -> None:
    timeline = estimate(Plan.sequential(GRAPH, 32))
    shown = timeline.layers(2, 3)
    assert [span.label(2) for span in shown.spans] == [op.name for op in GRAPH.layer] + [
        f"{op.name}@1" for op in GRAPH.layer
    ]
    assert shown.seconds == pytest.approx(timeline.seconds / 3)
    with pytest.raises(ValueError, match="no nano-op of layers 9 to 9"):
        timeline.layers(9, 9)
    with pytest.raises(ValueError, match="no repetition 9"):
        timeline.period(9)


def test_no_work_gives_an_empty_timeline() -> None:
    timeline = estimate(Plan.sequential(GRAPH, 32), Work())
    assert (timeline.seconds, timeline.segments) == (0.0, ())
    assert timeline.busy() == {"main": 0.0} and timeline.period().spans == ()


def test_times_and_works_must_belong_to_the_program() -> None:
    program = compile_program(Plan.sequential(GRAPH, 32), GRAPH)
    with pytest.raises(ValueError, match=r"1 measured times do not belong to a program of \d+ steps"):
        measured_timeline(program, [(0.0, 1.0)], [WORK], 4, 100)
    with pytest.raises(ValueError, match="2 works do not belong to a plan of 1 nano-batches"):
        simulate(program, [WORK, WORK], CeilingRates(CEILINGS, 100, 4))


def test_bandwidth_of_a_part_meets_what_was_measured() -> None:
    """Decode attention on an H100, on parts of whole groups of SMs."""
    recorded = Profile.load(Path(__file__).parents[2] / "benchmarks" / "results" / "profile_parts.json")
    seconds = {
        solo.sms or 132: point.seconds
        for solo in recorded.solos
        for point in solo.points
        if solo.op == "decode_attention" and point.at == (550, 816)
    }
    assert {16, 24, 32, 40, 48} < set(seconds)
    for sms, took in seconds.items():
        if sms % 8 == 0:
            assert bandwidth_on(sms, 132, 1.0) == pytest.approx(seconds[132] / took, rel=0.02), sms


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_works_of_nano_batches_add_up_to_the_batch(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    batch = data.draw(batches(count))
    works = works_of(batch)
    assert len(works) == count and sum(works, Work()) == work_of(batch)
    assert [(work.decode_rows, work.prefill_rows) for work in works] == [
        (part.decode, part.prefill) for part in batch.nano_batches
    ]


def test_mean_work_of_several_iterations() -> None:
    one = Work(decode_rows=2, prefill_rows=4, decode_context=6, prefill_context=8, prefill_pairs=10, sampled_rows=12)
    assert (one + one + one).over(3) == one
    assert (one + Work()).over(2) == Work(1, 2, 3, 4, 5, 6)
    assert Work().over(0) == Work()


@pytest.mark.parametrize("name", ["skewed.yaml", "three.yaml"])
def test_lanes_that_are_not_confined_share_the_device(name: str) -> None:
    plan = parse_plan((PLANS / name).read_text(encoding="utf-8"))
    timeline = estimate(plan)
    check(timeline, compile_program(plan, GRAPH))
    assert {load.sms for segment in timeline.segments for load in segment.loads} == {50.0, 100.0}
    assert {span.lane for span in timeline.period().spans} == set(plan.lanes)
