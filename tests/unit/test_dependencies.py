"""Derived waits against the independent checker, on random plans and batches."""

import dataclasses
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from nanoflow.kv_cache import KVCache
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import KV, SCRATCH
from nanoflow.pipeline.checker import check_program
from nanoflow.pipeline.plan import WHOLE, Entry, FrozenMapping, NanoBatch, Plan, PlanError, Stage
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.pipeline.split import BatchCutter
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler import Scheduler
from nanoflow.sequence import Sequence
from tests.unit.fake_executor import FakeExecutor, run
from tests.unit.plan_graphs import FakeOperation, dense_batch, llama_graph, read, write
from tests.unit.plan_strategies import batches, full_batch, plans, stages

PAGE = 2
GRAPH = llama_graph(3, scratch=True)
RANDOM = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SKEWED = {
    "compute": "o.a gate_up.a down.a qkv.a@1 o.b gate_up.b down.b qkv.b@1",
    "memory": "decode_attention.b decode_attention.a@1",
}


def plan_of(*period: dict[str, str], nano_batches: str = "ab", rows: int = 16) -> Plan:
    share = Fraction(1, len(nano_batches))
    return Plan(
        capacity=rows * len(nano_batches),
        nano_batches=tuple(NanoBatch(name, share, share, rows) for name in nano_batches),
        period=tuple(
            Stage(WHOLE, FrozenMapping({lane: tuple(map(Entry.parse, text.split())) for lane, text in lanes.items()}))
            for lanes in period
        ),
    )


def names(program: Program, steps) -> set[str]:
    return {program.name(step) for step in steps}


def find(program: Program, name: str) -> int:
    return next(i for i in range(len(program.steps)) if program.name(i) == name)


def without_wait(program: Program, step: int, wait: int) -> Program:
    steps = list(program.steps)
    steps[step] = dataclasses.replace(steps[step], waits=tuple(w for w in steps[step].waits if w != wait))
    return Program(program.plan, program.graph, tuple(steps))


def happens_before(program: Program) -> list[set[int]]:
    result: list[set[int]] = []
    for before in program.predecessors:
        result.append(set(before).union(*(result[other] for other in before)))
    return result


# What is derived


def test_sequential_program_is_the_graph_in_order_without_waits():
    program = compile_program(Plan.sequential(GRAPH, 8), GRAPH)
    assert [(s.nano_op.layer, s.nano_op.op) for s in program.steps] == [
        (layer, op.name) for layer in range(3) for op in GRAPH.layer
    ]
    assert all(not step.waits for step in program.steps)
    assert program.lanes == {"main": tuple(range(30))}
    assert program.predecessors == ((), *((i,) for i in range(29)))


def test_skewed_plan_waits_only_across_lanes():
    program = compile_program(plan_of(SKEWED), GRAPH)
    assert names(program, program.steps[find(program, "o.a layer 1")].waits) == {"decode_attention.a layer 1"}
    assert names(program, program.steps[find(program, "decode_attention.b layer 2")].waits) == {"rope_append.b layer 2"}
    assert check_program(program, full_batch(2), PAGE) == []


def test_prefill_attention_waits_for_the_appends_of_all_earlier_nano_batches():
    lanes = {name: " ".join(f"{op.name}.{name}" for op in GRAPH.layer) for name in "abcd"}
    program = compile_program(plan_of(lanes, nano_batches="abcd"), GRAPH)
    waits = program.steps[find(program, "prefill_attention.d layer 1")].waits
    assert names(program, waits) == {f"rope_append.{n} layer 1" for n in "abc"}
    assert program.steps[find(program, "decode_attention.d layer 1")].waits == ()


def test_write_after_read_and_write_after_write_across_layers():
    ops = (
        FakeOperation("make", (read("x"), write("y"))),
        FakeOperation("use", (read("y"), write("z"))),
        FakeOperation("update", (read("x"), write("x"))),
    )
    graph = Graph({"x": 1, "y": 1, "z": 1}, ops, 2, (), ())
    program = compile_program(plan_of({"a": "make", "b": "use", "c": "update"}, nano_batches="a"), graph)
    assert names(program, program.predecessors[find(program, "make layer 1")]) == {
        "make layer 0",
        "use layer 0",  # write after read: `make` overwrites y
        "update layer 0",  # read after write
    }
    assert names(program, program.predecessors[find(program, "update layer 0")]) == {"make layer 0"}

    rewritten = (FakeOperation("first", (write("y"),)), FakeOperation("second", (write("y"),)))
    program = compile_program(
        plan_of({"a": "first", "b": "second"}, nano_batches="a"), Graph({"y": 1}, rewritten, 2, (), ())
    )
    assert [program.steps[i].waits for i in range(4)] == [(), (0,), (1,), (2,)]


def test_a_writer_waits_for_every_reader_since_the_last_write():
    ops = (
        FakeOperation("make", (write("y"),)),
        *(FakeOperation(name, (read("y"), write(name))) for name in ("left", "right")),
    )
    graph = Graph({"y": 1, "left": 1, "right": 1}, ops, 2, (), ())
    program = compile_program(plan_of({"a": "make", "b": "left", "c": "right"}, nano_batches="a"), graph)
    waits = program.steps[find(program, "make layer 1")].waits
    assert names(program, waits) == {"left layer 0", "right layer 0"}
    assert check_program(program, full_batch(1), PAGE) == []
    for wait in waits:
        assert check_program(without_wait(program, find(program, "make layer 1"), wait), full_batch(1), PAGE)


def test_kv_caches_of_two_layers_do_not_conflict():
    def waits_of_append(buffer: str) -> set[str]:
        ops = (FakeOperation("append", (write(buffer),)), FakeOperation("attend", (read(buffer),)))
        program = compile_program(plan_of({"one": "append", "two": "attend"}), Graph({"y": 1}, ops, 2, (), ()))
        return names(program, program.steps[find(program, "append layer 1")].waits)

    assert waits_of_append(KV) == set()
    assert waits_of_append("y") == {"attend layer 0"}


def test_an_unsplit_operation_waits_for_all_nano_batches_and_all_wait_for_it():
    lanes = {n: " ".join(f"{op.name}.{n}" for op in GRAPH.layer if op.name != "gate_up") for n in "ab"}
    program = compile_program(plan_of({**lanes, "whole": "gate_up"}), GRAPH)
    gate_up = find(program, "gate_up layer 1")
    assert {"add_norm.a layer 1", "add_norm.b layer 1"} <= names(program, program.steps[gate_up].waits)
    for n in "ab":
        assert gate_up in program.steps[find(program, f"down.{n} layer 1")].waits


def test_a_change_of_stage_joins_all_lanes():
    attention = [op.name for op in GRAPH.layer[:5]]
    rest = [op.name for op in GRAPH.layer[5:]]

    def lanes(part: list[str]) -> dict[str, str]:
        return {f"lane_{n}": " ".join(f"{name}.{n}" for name in part) for n in "ab"}

    program = compile_program(plan_of(lanes(attention), lanes(rest)), GRAPH)
    before = happens_before(program)
    segment = [(step.nano_op.layer, step.stage) for step in program.steps]
    assert segment == sorted(segment)
    for later in range(len(segment)):
        for earlier in range(later):
            assert segment[earlier] == segment[later] or earlier in before[later]
    # Joined stages leave nothing to wait for but the prefix of prefill attention, which lies inside a stage.
    assert {program.steps[i].nano_op.op for i, s in enumerate(program.steps) if s.waits} == {"prefill_attention"}


def test_a_period_of_one_stage_does_not_join_layers():
    lanes = {n: " ".join(f"{op.name}.{n}" for op in GRAPH.layer) for n in "ab"}
    program = compile_program(plan_of(lanes), GRAPH)
    before = happens_before(program)
    assert find(program, "add.b layer 0") not in before[find(program, "qkv.a layer 2")]


def test_followers_take_the_lane_and_the_nano_batch_of_their_producer():
    program = compile_program(plan_of(SKEWED), GRAPH)
    lane = [program.name(i) for i in program.lanes["compute"]]
    start = lane.index("o.a layer 1")
    assert lane[start : start + 8] == [
        f"{op} layer {layer}"
        for op, layer in [
            *((f"{name}.a", 1) for name in ("o", "add_norm", "gate_up", "down", "add")),
            *((f"{name}.a", 2) for name in ("input_layernorm", "qkv", "rope_append")),
        ]
    ]


# Derivation against the checker


@RANDOM
@given(st.data())
def test_random_plans_compile_clean(data):
    plan = data.draw(plans(GRAPH))
    program = compile_program(plan, GRAPH)
    count = len(plan.nano_batches)
    assert check_program(program, full_batch(count), PAGE) == []
    assert check_program(program, data.draw(batches(count)), PAGE) == []


@settings(RANDOM, max_examples=15)
@given(plans(GRAPH), st.integers(2, 5))
def test_scheduled_batches_race_nowhere(plan, page_size):
    """The batches of a whole small job, as the scheduler forms them with the plan's own split of rows."""
    scheduler = Scheduler(
        kv=KVCache(40, page_size, 4, 16),
        cut=BatchCutter([plan]),
        max_batch_tokens=plan.capacity,
        max_running=4,
        max_model_len=32,
    )
    executor = FakeExecutor(40, page_size, 4)
    prompts = [np.arange(1, length + 1, dtype=np.int32) for length in (7, 1, 20, 3, 11)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    run(scheduler, executor, {0: [Sequence(i, prompt, params, seed=i) for i, prompt in enumerate(prompts)]})
    program = compile_program(plan, GRAPH)
    assert len(executor.batches) > 3
    for batch in executor.batches[:8]:
        assert all(
            part.end - part.start <= n.rows for part, n in zip(batch.nano_batches, plan.nano_batches, strict=True)
        )
        assert check_program(program, batch, page_size) == []


def real_graph(architecture: str, fused: bool) -> Graph:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    return build_graph(ModelConfig.from_dict({"architectures": [architecture], **sizes, **heads}), fused=fused)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_plans_of_real_models_compile_clean(architecture, fused):
    graph = real_graph(architecture, fused)

    @settings(RANDOM, max_examples=15)
    @given(st.data())
    def check(data):
        plan = data.draw(plans(graph))
        program = compile_program(plan, graph)
        batch = full_batch(len(plan.nano_batches))
        assert check_program(program, batch, PAGE) == []
        every = [(step, wait) for step in range(len(program.steps)) for wait in program.steps[step].waits]
        for step, wait in data.draw(st.lists(st.sampled_from(every), max_size=4)) if every else ():
            assert check_program(without_wait(program, step, wait), batch, PAGE)

    check()


@RANDOM
@given(st.data())
def test_removing_any_wait_is_flagged(data):
    plan = data.draw(plans(GRAPH))
    program = compile_program(plan, GRAPH)
    batch = full_batch(len(plan.nano_batches))
    order = happens_before(program)
    every = [(step, wait) for step in range(len(program.steps)) for wait in program.steps[step].waits]
    if not every:
        return
    # A dozen at a time keeps an example short; over all examples every kind of wait comes up.
    for step, wait in data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=12, unique=True)):
        weaker = without_wait(program, step, wait)
        violations = check_program(weaker, batch, PAGE)
        assert violations or happens_before(weaker) == order
        assert any({v.first, v.second} == {step, wait} and v.kind == "unordered" for v in violations)


def test_every_wait_of_a_plan_is_needed():
    lanes = {n: " ".join(f"{op.name}.{n}" for op in GRAPH.layer if op.name != "down") for n in "abc"}
    program = compile_program(plan_of({**lanes, "d": "down"}, nano_batches="abc"), GRAPH)
    batch = full_batch(3)
    every = [(step, wait) for step in range(len(program.steps)) for wait in program.steps[step].waits]
    assert len(every) > 20
    for step, wait in every:
        assert check_program(without_wait(program, step, wait), batch, PAGE), (program.name(step), program.name(wait))


@RANDOM
@given(st.data())
def test_shuffled_periods_deadlock_or_compile_clean(data):
    order = [Entry(op.name, n) for op in GRAPH.layer for n in "ab"]
    entries = data.draw(st.permutations(order)) if data.draw(st.booleans()) else order
    ahead = data.draw(st.lists(st.integers(0, 1), min_size=len(order), max_size=len(order)))
    entries = [dataclasses.replace(entry, ahead=a) for entry, a in zip(entries, ahead, strict=True)]
    if not data.draw(st.booleans()):
        entries = [dataclasses.replace(entry, ahead=0) for entry in entries]
    plan = dataclasses.replace(plan_of(), period=data.draw(stages(entries)))
    try:
        program = compile_program(plan, GRAPH)
    except PlanError as error:
        assert "deadlocks" in str(error)
        assert ">>" in str(error)
    else:
        assert check_program(program, full_batch(2), PAGE) == []


@RANDOM
@given(st.data())
def test_predecessors_and_waits_are_earlier_and_in_other_lanes(data):
    program = compile_program(data.draw(plans(GRAPH)), GRAPH)
    assert sum(len(steps) for steps in program.lanes.values()) == len(program.steps)
    for index, step in enumerate(program.steps):
        assert all(before < index for before in program.predecessors[index])
        assert all(program.steps[wait].lane != step.lane for wait in step.waits)


# The checker itself


def test_checker_reports_a_reversed_pair_and_a_missing_and_a_repeated_nano_op():
    program = compile_program(Plan.sequential(GRAPH, 8), GRAPH)
    steps = list(program.steps)
    steps[1], steps[2] = steps[2], steps[1]
    found = check_program(Program(program.plan, GRAPH, tuple(steps)), full_batch(1), PAGE)
    assert {v.kind for v in found} == {"reversed"}
    assert any("qkv layer 0 runs after rope_append layer 0" in v.message for v in found)
    steps = [*program.steps[:-1], program.steps[0]]
    found = check_program(Program(program.plan, GRAPH, tuple(steps)), full_batch(1), PAGE)
    assert {"missing", "repeated"} <= {v.kind for v in found}


def test_checker_reports_a_wait_for_a_later_step():
    program = compile_program(plan_of(SKEWED), GRAPH)
    steps = list(program.steps)
    steps[3] = dataclasses.replace(steps[3], waits=(len(steps) - 1,))
    found = check_program(Program(program.plan, GRAPH, tuple(steps)), full_batch(2), PAGE)
    assert "wait" in {v.kind for v in found}


def test_scratch_memory_may_be_used_in_any_order_of_a_lane():
    def graph(buffer: str) -> Graph:
        ops = tuple(FakeOperation(name, (read(buffer), write(buffer)), scratch=1) for name in ("one", "two"))
        return Graph({"y": 1}, ops, 1, (), ())

    swapped = plan_of({"lane": "two one"}, nano_batches="a")
    program = compile_program(swapped, graph(SCRATCH))
    assert [program.name(i) for i in program.lanes["lane"]] == ["two layer 0", "one layer 0"]
    assert check_program(program, full_batch(1), PAGE) == []
    with pytest.raises(PlanError, match="deadlocks"):
        compile_program(swapped, graph("y"))


def test_checker_takes_kv_reads_from_the_page_tables():
    """An append that a later piece of the prompt reads is a race only if a prompt straddles the two nano-batches."""
    lanes = {n: " ".join(f"{op.name}.{n}" for op in GRAPH.layer) for n in "ab"}
    program = compile_program(plan_of(lanes), GRAPH)
    attention = find(program, "prefill_attention.b layer 1")
    (append,) = program.steps[attention].waits
    weaker = without_wait(program, attention, append)
    straddling = dense_batch([(1, [3], 1), (1, [2], 1)])
    apart = dense_batch([(1, [3], 1), (1, [], 1)])
    assert [(v.first, v.second) for v in check_program(weaker, straddling, PAGE)] == [(append, attention)]
    assert check_program(weaker, apart, PAGE) == []


def test_padding_rows_of_two_nano_batches_share_the_reserved_page_without_a_race():
    program = compile_program(plan_of({n: " ".join(f"{op.name}.{n}" for op in GRAPH.layer) for n in "ab"}), GRAPH)
    assert check_program(program, dense_batch([(0, [], 4), (0, [], 4)]), PAGE) == []


def test_checker_refuses_a_batch_of_another_plan():
    program = compile_program(plan_of(SKEWED), GRAPH)
    with pytest.raises(ValueError, match="3 nano-batches, the plan has 2"):
        check_program(program, full_batch(3), PAGE)


def test_four_nano_batches_and_eighty_layers_compile_in_a_second():
    graph = llama_graph(80)
    lanes = {n: " ".join(f"{op.name}.{n}" for op in graph.layer) for n in "abcd"}
    started = time.process_time()
    program = compile_program(plan_of(lanes, nano_batches="abcd"), graph)
    assert time.process_time() - started < 1.0
    assert len(program.steps) == 80 * len(GRAPH.layer) * 4
