"""Rows and buffers of a plan's nano-batches."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.pipeline.buffers import BufferSpec, assign_buffers, assign_scratch
from nanoflow.pipeline.capture_batch import capture_batch
from nanoflow.pipeline.plan import Entry, FrozenMapping, NanoBatch, Plan, Stage
from nanoflow.pipeline.plan_mix import NEAR_MIX, PlanMix
from nanoflow.pipeline.split import BatchCutter, nano_batch_rows, split_rows
from tests.unit.plan_graphs import FakeOperation, llama_graph, read
from tests.unit.plan_strategies import plans

GRAPH = llama_graph(2, scratch=True)


def plan_with(*nano_batches: tuple[str, str, int], capacity: int | None = None) -> Plan:
    parts = tuple(
        NanoBatch(name, Fraction(decode), Fraction(prefill), rows)
        for name, (decode, prefill, rows) in zip("abcd", nano_batches, strict=False)
    )
    return Plan(capacity=capacity or sum(part.rows for part in parts), nano_batches=parts, period=())


def test_shares_with_largest_remainders():
    plan = plan_with(("1/2", "1/3", 100), ("1/2", "2/3", 100))
    assert split_rows(plan, 10, 9) == ([5, 5], [3, 6])
    assert split_rows(plan, 11, 10) == ([6, 5], [3, 7])
    assert split_rows(plan, 1, 1) == ([1, 0], [0, 1])
    assert split_rows(plan, 0, 0) == ([0, 0], [0, 0])


def test_what_does_not_fit_spills_by_the_shares_of_the_others():
    plan = plan_with(("1/2", "1", 10), ("1/4", "0", 100), ("1/4", "0", 100))
    assert split_rows(plan, 100, 0) == ([10, 45, 45], [0, 0, 0])
    # Decode rows come first; prefill rows that find the nano-batch full go evenly to those without a share.
    assert split_rows(plan, 8, 16) == ([4, 2, 2], [6, 5, 5])


def test_a_full_plan_is_filled_to_the_last_row():
    plan = plan_with(("1/16", "15/16", 7), ("15/16", "1/16", 9))
    decode, prefill = split_rows(plan, 5, 11)
    assert [d + p for d, p in zip(decode, prefill, strict=True)] == [7, 9]


@pytest.mark.parametrize(("decode", "prefill"), [(9, 0), (4, 5), (-1, 2), (2, -1)])
def test_rows_beyond_the_capacity_are_refused(decode, prefill):
    with pytest.raises(ValueError, match="do not fit the plan's capacity, 8 rows"):
        split_rows(plan_with(("1", "1", 16), capacity=8), decode, prefill)


@pytest.mark.parametrize(
    ("capacities", "rows", "expected"),
    [
        ((640, 640), 1280, [640, 640]),
        ((640, 640), 1152, [640, 512]),
        ((640, 640), 1024, [512, 512]),
        ((640, 640), 256, [128, 128]),
        ((640, 640), 128, [64, 64]),
        ((640, 640), 8, [4, 4]),
        ((896, 384), 1024, [768, 256]),
        ((896, 384), 128, [64, 64]),
        ((1000, 200, 80), 1280, [1000, 200, 80]),
        ((1000, 200, 80), 1152, [896, 192, 64]),
        ((1000, 1000), 1920, [960, 960]),
        ((100, 100), 192, [96, 96]),
        ((192, 208), 384, [192, 192]),
        ((600, 500), 1000, [512, 488]),
        ((1280,), 777, [777]),
    ],
)
def test_rows_of_padded_nano_batches(capacities: tuple[int, ...], rows: int, expected: list[int]):
    parts = tuple(
        NanoBatch(name, Fraction(0), Fraction(0), count) for name, count in zip("abc", capacities, strict=False)
    )
    assert nano_batch_rows(Plan(sum(capacities), parts, ()), rows) == expected


@given(st.lists(st.integers(1, 1100), min_size=1, max_size=4), st.data())
def test_no_padded_nano_batch_has_more_rows_than_the_plan_gives_it(capacities: list[int], data: st.DataObject):
    """Buffers, arrays of graphs and what ranks meet in are sized by that."""
    parts = tuple(NanoBatch(str(n), Fraction(0), Fraction(0), rows) for n, rows in enumerate(capacities))
    capacity = data.draw(st.integers(max(1, sum(capacities) - 100), sum(capacities)))
    rows = data.draw(st.integers(1, capacity))
    found = nano_batch_rows(Plan(capacity, parts, ()), rows)
    assert sum(found) == rows or found == capacities
    assert all(0 <= count <= most for count, most in zip(found, capacities, strict=True))


def test_a_batch_takes_the_first_plan_that_is_meant_for_it():
    lanes = replace(plan_with(("1/2", "1/4", 96), ("1/2", "3/4", 64), capacity=128), least_rows=64)
    cut = BatchCutter([lanes, plan_with(("1", "1", 256))], [32, 64, 96, 128, 192])
    assert cut.capacity == 256
    assert cut.buckets(0) == (64, 96, 128) and cut.buckets(1) == (32, 64, 96, 128, 192, 256)
    found = {rows: cut(rows - rows // 3, rows // 3, 99) for rows in (1, 32, 33, 63, 64, 65, 97, 128, 129, 200, 256)}
    assert {rows: (c.program, list(c.rows)) for rows, c in found.items()} == {
        1: (1, [32]), 32: (1, [32]), 33: (1, [64]), 63: (1, [64]), 64: (0, [32, 32]), 65: (0, [64, 32]),
        97: (0, [96, 64]), 128: (0, [96, 64]), 129: (1, [192]), 200: (1, [256]), 256: (1, [256]),
    }  # fmt: skip
    for rows, c in found.items():
        assert sum(c.decode) == rows - rows // 3 and sum(c.prefill) == rows // 3
        assert all(d + p <= room for d, p, room in zip(c.decode, c.prefill, c.rows, strict=True))
    with pytest.raises(ValueError, match="fit none of the run's plans"):
        cut(200, 57, 99)
    unpadded = BatchCutter([plan_with(("1/2", "1/2", 8), ("1/2", "1/2", 8))])
    assert unpadded(5, 4, 99).rows == [5, 4] and unpadded(0, 0, 0).rows == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_captured_graph_serves_every_batch_with_its_rows(data: st.DataObject):
    """Whatever the shares: what spills over to a nano-batch that has no share of it must be in its graph."""
    plan = data.draw(plans(GRAPH))
    cut = BatchCutter([plan], [rows for rows in (1, 8, 16, 64) if rows <= plan.capacity])
    decode = data.draw(st.integers(0, plan.capacity))
    prefill = data.draw(st.integers(int(not decode), plan.capacity - decode))
    found = cut.of(0, decode, prefill)
    captured = capture_batch(plan, 0, next(rows for rows in cut.buckets(0) if rows >= decode + prefill))
    assert [n.end - n.start for n in captured.nano_batches] == list(found.rows)
    for own, decoding, reading in zip(captured.nano_batches, found.decode, found.prefill, strict=True):
        if own.end - own.start > 1:
            assert own.decode >= (decoding > 0) and own.prefill >= (reading > 0)


def for_mix(decode: int, prefill: int, context: int, least_rows: int = 0) -> Plan:
    plan = plan_with(("1/2", "1/2", 1024), ("1/2", "1/2", 1024))
    return replace(plan, mix=PlanMix(decode, prefill, context), least_rows=least_rows)


def test_a_batch_takes_the_plan_of_the_nearest_mix_that_is_near_enough():
    own, other, third = for_mix(551, 554, 768), for_mix(341, 685, 1280), for_mix(421, 215, 1024, least_rows=600)
    anything = plan_with(("1", "1", 2048))
    cut = BatchCutter([own, other, third, anything])
    assert cut.choose(551, 554, 551 * 768) == 0
    assert cut.choose(341, 685, 341 * 1280) == 1
    assert cut.choose(421, 215, 421 * 1024) == 2
    assert cut.choose(500, 570, 500 * 800) == 0 and cut.choose(380, 660, 380 * 1200) == 1
    # The same rows over other contexts are another mix, and so is half the batch; so is a batch below `least_rows`.
    assert cut.choose(551, 554, 551 * 300) == 3
    assert cut.choose(270, 270, 270 * 768) == 3
    assert cut.choose(400, 199, 400 * 1024) == 3
    assert cut(551, 554, 551 * 768).program == 0 and cut(0, 0, 0).program == 3
    # The order decides between two of one mix, and so it does between plans for any.
    assert BatchCutter([anything, own, own, anything]).choose(551, 554, 551 * 768) == 1
    assert BatchCutter([own, anything, anything]).choose(9, 9, 9) == 1
    with pytest.raises(ValueError, match="fit none of the run's plans"):
        BatchCutter([own])(9, 9, 9)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 600), st.integers(1, 4000)), min_size=1, max_size=8),
    st.integers(0, 600), st.integers(0, 600), st.integers(1, 4000),
)  # fmt: skip
def test_no_plan_within_reach_is_nearer_than_the_one_chosen(mixes, decode, prefill, context):
    tokens = decode * context
    chosen = BatchCutter([*(for_mix(*mix) for mix in mixes), plan_with(("1", "1", 2048))]).choose(
        decode, prefill, tokens
    )
    distances = [*(PlanMix(*mix).distance(decode, prefill, tokens) for mix in mixes), NEAR_MIX]
    assert distances[chosen] == min(distances) and distances.index(distances[chosen]) == chosen


def test_the_distance_between_mixes():
    mix = PlanMix(300, 100, 1000)
    assert mix.distance(300, 100, 300_000) == 0
    assert mix.distance(310, 90, 300_000) == 20 / 400
    assert mix.distance(300, 100, 400_000) == 1 / 4 and mix.distance(300, 100, 150_000) == 1 / 2
    assert mix.distance(0, 0, 0) == 2 and PlanMix(0, 100, 0).distance(0, 100, 0) == 0


@settings(max_examples=100, deadline=None)
@given(plans(llama_graph(1)), st.data())
def test_padded_nano_batches_hold_their_rows(plan, data):
    buckets = data.draw(st.sampled_from([(1, 2, 3, 4, 8, 16), (8, 16, 32, 64, 96, 128), (5, 50)]))
    total = data.draw(st.integers(1, plan.capacity))
    decode = data.draw(st.integers(0, total))
    c = BatchCutter([plan], buckets)(decode, total - decode, 7 * decode)
    assert sum(c.decode) == decode and sum(c.prefill) == total - decode
    assert all(d + p <= rows for d, p, rows in zip(c.decode, c.prefill, c.rows, strict=True))
    bucket = next((rows for rows in buckets if total <= rows < plan.capacity), plan.capacity)
    assert sum(c.rows) == (plan.rows if bucket == plan.capacity else bucket)


@settings(max_examples=200, deadline=None)
@given(plans(llama_graph(1)), st.data())
def test_every_row_is_placed_and_none_beyond_its_nano_batch(plan, data):
    total = data.draw(st.integers(0, plan.capacity))
    decode_rows = data.draw(st.integers(0, total))
    decode, prefill = split_rows(plan, decode_rows, total - decode_rows)
    assert sum(decode) == decode_rows
    assert sum(prefill) == total - decode_rows
    for nano_batch, d, p in zip(plan.nano_batches, decode, prefill, strict=True):
        assert d >= 0
        assert p >= 0
        assert d + p <= nano_batch.rows
    exact = [decode_rows * nano_batch.decode for nano_batch in plan.nano_batches]
    if all(share + 1 <= nano_batch.rows for share, nano_batch in zip(exact, plan.nano_batches, strict=True)):
        assert all(abs(d - share) < 1 for d, share in zip(decode, exact, strict=True))


def two_lanes() -> Plan:
    compute = "input_layernorm qkv.a qkv.b rope_append o add_norm gate_up down.a down.b add"
    lanes = {"compute": compute, "memory": "decode_attention prefill_attention"}
    stage = Stage("split", FrozenMapping({lane: tuple(map(Entry.parse, ops.split())) for lane, ops in lanes.items()}))
    parts = (NanoBatch("a", Fraction(1, 2), Fraction(1, 2), 8), NanoBatch("b", Fraction(1, 2), Fraction(1, 2), 12))
    return Plan(
        capacity=16, nano_batches=parts, period=(stage,), partitions=FrozenMapping({"split": (100, 32)}), sms=132
    )


def test_buffers_hold_every_nano_batch_full():
    buffers = assign_buffers(GRAPH, two_lanes(), sampled_rows=4)
    assert buffers["gate_up"] == BufferSpec(columns=32, rows=20)
    assert buffers["x"] == BufferSpec(columns=8, rows=20)
    assert buffers["sampled_norm"] == BufferSpec(columns=8, rows=4)
    assert set(buffers) == set(GRAPH.values)
    assert assign_buffers(GRAPH, two_lanes())["sampled"].rows == 20


def test_an_access_to_an_unknown_value_is_refused():
    graph = llama_graph(1)
    values = {name: columns for name, columns in graph.values.items() if name != "h"}
    broken = type(graph)(values, graph.layer, 1, graph.prologue, graph.epilogue)
    with pytest.raises(ValueError, match="operation input_layernorm accesses 'h', which is no value"):
        assign_buffers(broken, two_lanes())
    epilogue = (FakeOperation("head", (read("logits"),)),)
    broken = type(graph)(graph.values, graph.layer, 1, graph.prologue, epilogue)
    with pytest.raises(ValueError, match="operation head accesses 'logits'"):
        assign_buffers(broken, two_lanes())


def test_scratch_is_what_the_neediest_nano_op_of_a_lane_takes():
    # `down` takes 6 bytes a row and SM, on 12 rows and 100 SMs; decode attention 4, unsplit, on 20 rows and 32 SMs.
    assert assign_scratch(GRAPH, two_lanes()) == {"compute": 6 * 12 * 100, "memory": 4 * 20 * 32}
    assert assign_scratch(GRAPH, Plan.sequential(GRAPH, 10), device_sms=132) == {"main": 6 * 10 * 132}
