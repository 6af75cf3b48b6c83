"""The estimated timeline of a plan, on graphs and ceilings where the lengths can be told by hand."""

from collections import Counter
from pathlib import Path

import pytest

from nanoflow.config_schema import EngineSection, ModelSection
from nanoflow.loading import open_model
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Work
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.plan_text import parse_plan
from nanoflow.pipeline.program import compile_program
from nanoflow.plan_timeline import estimate_timeline
from nanoflow.search.cost_model import Ceilings
from tests.unit.test_engine import TWO
from tests.unit.tiny_model import save_tiny_llama

CEILINGS = Ceilings(flops=1e9, bytes_per_second=1e9)
WORK = Work(decode_rows=16, prefill_rows=16, decode_context=800, prefill_context=40, prefill_pairs=300, sampled_rows=17)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=6)
    return open_model(ModelSection(path=str(folder), dtype="float32"), EngineSection(device="cpu")).graph


def test_in_sequence_every_operation_takes_what_its_ceilings_demand(graph: Graph) -> None:
    program = compile_program(Plan.sequential(graph, 32), graph)
    entries = estimate_timeline(program, WORK, CEILINGS, 4)
    assert [entry.name for entry in entries] == [op.name for op in graph.layer]
    clock = 0.0
    for entry, op in zip(entries, graph.layer, strict=True):
        cost = op.cost(WORK, 4)
        assert entry.start == pytest.approx(clock, abs=0.01)
        clock += max(cost.flops, cost.bytes) / 1e9 * 1e6
        assert entry.end == pytest.approx(clock, abs=0.01)
        assert (entry.resource, entry.lane) == (op.resource, "main")


def test_lanes_run_side_by_side_and_never_before_what_they_wait_for(graph: Graph) -> None:
    program = compile_program(parse_plan(TWO), graph)
    entries = estimate_timeline(program, WORK, CEILINGS, 4)
    sequential = estimate_timeline(compile_program(Plan.sequential(graph, 32), graph), WORK, CEILINGS, 4)
    names = Counter(entry.name.partition("@")[0] for entry in entries)
    assert {f"{op}.{part}" for op in ("qkv", "o", "down", "decode_attention") for part in "ab"} <= set(names)
    lanes: dict[str, float] = {}
    for entry in entries:
        assert entry.start >= lanes.get(entry.lane, 0.0) - 0.01 and entry.end > entry.start
        lanes[entry.lane] = entry.end
    assert set(lanes) == {"compute", "memory"}
    at = {entry.name: entry for entry in entries}
    assert at["o.a"].start >= at["decode_attention.a"].end - 0.01
    both = [
        (x.name, y.name)
        for x in entries
        for y in entries
        if x.lane == "compute" and y.lane == "memory" and x.start < y.end - 0.01 and y.start < x.end - 0.01
    ]
    assert both, "nothing overlaps"
    # Halves of the weights' bytes are not halved: two nano-batches take longer than one batch, but less than twice.
    total = max(entry.end for entry in entries)
    assert total < 2 * max(entry.end for entry in sequential)


def test_no_work_gives_an_empty_timeline(graph: Graph) -> None:
    assert estimate_timeline(compile_program(Plan.sequential(graph, 32), graph), Work(), CEILINGS, 4) == []


def test_mean_work_of_several_iterations() -> None:
    one = Work(decode_rows=2, prefill_rows=4, decode_context=6, prefill_context=8, prefill_pairs=10, sampled_rows=12)
    assert (one + one + one).over(3) == one
    assert (one + Work()).over(2) == Work(1, 2, 3, 4, 5, 6)
    assert Work().over(0) == Work()


def test_a_tuned_plan_of_the_tests_has_a_timeline(graph: Graph) -> None:
    for path in (Path(__file__).parents[1] / "models" / "plans").glob("*.yaml"):
        plan = parse_plan(path.read_text(encoding="utf-8"))
        entries = estimate_timeline(compile_program(plan, graph), WORK, CEILINGS, 4)
        assert {entry.lane for entry in entries} == {lane for stage in plan.period for lane in stage.lanes}
