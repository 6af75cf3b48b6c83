"""Which stream a step is launched on and what it waits for there."""

from dataclasses import replace

import torch
from hypothesis import given, settings, strategies as st

from nanoflow.pipeline.lanes import BEGIN, Lanes, LaunchOrder, launch_order
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.pipeline.program import Program, compile_program
from tests.unit.plan_graphs import llama_graph
from tests.unit.plan_strategies import plans

GRAPH = llama_graph(3)
SKEWED = """
capacity: 64
sms: 132
nano_batches:
  a: {decode: 0.5, prefill: 0.5, rows: 32}
  b: {decode: 0.5, prefill: 0.5, rows: 32}
partitions: {split: [92, 40]}
period:
  - split:
      compute: [o.a, gate_up.a, down.a, qkv.a@1, o.b, gate_up.b, down.b, qkv.b@1]
      memory: [decode_attention.b, decode_attention.a@1]
"""


@st.composite
def confined(draw: st.DrawFn) -> Program:
    """Random plans, some of whose stages are on partitions."""
    plan = draw(plans(GRAPH))
    period, partitions = [], {}
    for stage in plan.period:
        if draw(st.booleans()):
            count = len(stage.lanes)
            parts = draw(st.sampled_from([(8,) * count, (16,) * count, (24 // count,) * count]))
            name = f"p{'_'.join(map(str, parts))}"
            partitions[name] = parts
            stage = replace(stage, partition=name)
        period.append(stage)
    plan = replace(plan, period=tuple(period), partitions=FrozenMapping(partitions), sms=24)
    return compile_program(plan, GRAPH)


def closure(before: list[set[int]]) -> list[set[int]]:
    result: list[set[int]] = []
    for direct in before:
        result.append(direct | set().union(*(result[other] for other in direct)))
    return result


def ordered(order: LaunchOrder) -> list[set[int]]:
    """For every step, those that streams and events have done before it; `BEGIN` if it is after the begin."""
    last: dict[int, int] = {}
    before: list[set[int]] = []
    for launch in order.launches:
        direct = {step for step in launch.waits if step != BEGIN}
        if launch.stream in last:
            direct.add(last[launch.stream])
        last[launch.stream] = launch.step
        before.append(direct)
    return closure(before)


@settings(max_examples=150, deadline=None)
@given(confined())
def test_streams_and_events_order_what_the_program_orders(program: Program) -> None:
    order = launch_order(program)
    assert [launch.step for launch in order.launches] == list(range(len(program.steps)))
    for index, launch in enumerate(order.launches):
        step = program.steps[index]
        place = program.plan.place(step.stage, step.lane)
        assert order.places[launch.stream] == place
        assert all(order.launches[other].records for other in launch.waits if other != BEGIN)
    there = ordered(order)
    wanted = closure([set(before) for before in program.predecessors])
    assert all(needed <= have for needed, have in zip(wanted, there, strict=True))
    # Nothing begins before the iteration does: each stream starts with a wait.
    begun: set[int] = {0}
    for launch in order.launches:
        assert launch.stream in begun or launch.waits
        begun.add(launch.stream)
    # And nothing outlives it: the main stream has waited for the last step of every other.
    main = [launch.step for launch in order.launches if launch.stream == 0]
    done = set(order.ends).union(*(there[end] for end in order.ends), main, *(there[step] for step in main[-1:]))
    assert done >= {launch.step for launch in order.launches}
    assert all(order.launches[end].records for end in order.ends)


@settings(max_examples=60, deadline=None)
@given(confined())
def test_no_event_is_waited_for_without_need(program: Program) -> None:
    order = launch_order(program)
    there = ordered(order)
    for launch in order.launches:
        same = [other.step for other in order.launches[: launch.step] if other.stream == launch.stream]
        implied = there[same[-1]] if same else set()
        for step in launch.waits:
            others = [other for other in launch.waits if other not in (step, BEGIN)]
            assert step not in implied.union(*(there[other] for other in others))
        streams = [order.launches[step].stream for step in launch.waits if step != BEGIN]
        assert len(streams) == len(set(streams)) and launch.stream not in streams


def test_a_plan_of_one_lane_needs_no_event() -> None:
    order = launch_order(compile_program(Plan.sequential(GRAPH, 64), GRAPH))
    assert order.places == (((), 0),) and order.ends == ()
    assert not any(launch.waits or launch.records for launch in order.launches)


def test_lanes_on_parts_leave_the_main_stream_to_begin_and_end() -> None:
    program = compile_program(Plan.loads(SKEWED, GRAPH), GRAPH)
    order = launch_order(program)
    assert order.places == (((), 0), ((92, 40), 0), ((92, 40), 1))
    assert {launch.stream for launch in order.launches} == {1, 2}
    assert order.launches[0].waits == (BEGIN,)
    assert len(order.ends) == 1, "the last step of the last layer waits for all others"
    # In steady state decode attention waits for its own rows' keys, and `o` for decode attention: two events a part.
    middle = [launch for launch in order.launches if program.steps[launch.step].nano_op.layer == 1]
    assert sum(len(launch.waits) for launch in middle) == 4


def test_a_partition_of_one_part_with_all_sms_is_the_whole_device() -> None:
    text = SKEWED.replace("{split: [92, 40]}", "{split: [92, 40], all: [132]}")
    text += "  - all:\n      compute: [input_layernorm.a@1, input_layernorm.b@1]\n"
    plan = Plan.loads(text)
    assert plan.lane_sms(0, "memory") == 40 and plan.lane_sms(1, "compute") is None
    assert plan.place(1, "compute") == ((), 0)


def test_without_a_gpu_steps_run_in_the_order_of_their_launches() -> None:
    program = compile_program(Plan.loads(SKEWED, GRAPH), GRAPH)
    run: list[int] = []
    Lanes([program], torch.device("cpu")).launch(0, run.append)
    assert run == list(range(len(program.steps)))
