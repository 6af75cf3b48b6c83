"""`sharding: reduce_scatter` on a CPU: the tokens of one rank, whatever the plan, the order drawn and the rows.

Ranks are threads here: see `rank_threads`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanoflow import LLM, RequestOutput, loading
from nanoflow.checkpoints import open_checkpoint
from nanoflow.engine import planned_programs
from nanoflow.ops.batch import NanoBatchRows
from nanoflow.ops.graph import Graph
from nanoflow.ops.linear import Linear
from nanoflow.ops.operation import Work
from nanoflow.ops.row_sharding import shardings_of, with_sharding
from nanoflow.ops.row_shares import own_rows, row_share, share_rows
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.checker import check_program
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.plan import SMALL_ROWS, FrozenMapping, Plan, PlanError
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.pipeline.validate import validate
from nanoflow.plan_choice import choose_plans
from nanoflow.search.fingerprint import Fingerprint, graph_shape
from nanoflow.weights import load_weights
from tests.unit.ops_harness import Pages, Piece, dense_batch
from tests.unit.plan_strategies import full_batch, plans
from tests.unit.rank_jobs import BASE, FEW, MIX, MODELS, generate, rows_of, shares, step_logits
from tests.unit.rank_models import graph_of, save
from tests.unit.rank_threads import CPU, ThreadRanks
from tests.unit.test_engine import assert_same

REDUCE_SCATTER, FUSED = "reduce_scatter", "fused_reduce_scatter"
ROWS = ("o_reduce_scatter", "add_norm_all_gather", "down_reduce_scatter", "input_layernorm_all_gather")
COLLECTIVES = {REDUCE_SCATTER: ROWS, FUSED: ("o_add_norm", "down_add", "input_layernorm_gather")}


def scattered(graph: Graph, rows: int, kernels: dict[str, str] | None = None, sharding: str = REDUCE_SCATTER) -> Plan:
    """All in sequence, the residual divided among the ranks of `graph`."""
    names = " ".join(f"{op.name}," for op in with_sharding(graph, sharding).layer)
    text = f"{{sharding: {sharding}, capacity: {rows}, nano_batches: {{a: {{decode: 1, prefill: 1, rows: {rows}}}"
    plan = Plan.loads(f"{text}}}, period: [whole: {{main: [{names}]}}]}}", graph)
    return replace(plan, kernels=FrozenMapping(kernels))


def use_plans(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    whole: Graph,
    size: int,
    plans: Callable[[Graph], Sequence[Plan]],
    make: Any = ReferenceExecutor,
    **options: Any,
) -> list[ThreadRanks]:
    """Engines have `size` ranks from now on, which run `plans` of a rank's graph; the list gets their executors."""
    made: list[ThreadRanks] = []

    def executor(_: Any, weights: Any, kv: KVLayout, **sizes: Any) -> ThreadRanks:
        graphs, each = shares(folder, whole, size)
        ranks = [[compile_program(plan, graph) for plan in plans(graph)] for graph in graphs]
        made.append(ThreadRanks(make, ranks, each, kv, **sizes, **options))
        return made[-1]

    monkeypatch.setattr(loading, "ReferenceExecutor", executor)
    return made


@pytest.mark.parametrize(
    ("sharding", "kernel"), [(REDUCE_SCATTER, "reference"), (REDUCE_SCATTER, "nccl"), (FUSED, "nccl")]
)
@pytest.mark.parametrize(
    ("name", "size"), [("llama", 2), ("llama", 4), ("biases", 4), ("shared-heads", 4), ("qwen2", 2), ("qwen3", 4)]
)
def test_tokens_are_those_of_one_rank(
    rank_model: Callable[[str], Path],
    of_one_rank: Callable[[str], list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    size: int,
    sharding: str,
    kernel: str,
) -> None:
    expected = of_one_rank(name)
    kernels = dict.fromkeys((*COLLECTIVES[sharding], "sampled_all_reduce"), kernel)
    whole = graph_of(**BASE, **MODELS[name])
    use_plans(
        monkeypatch, rank_model(name), whole, size, lambda graph: [scattered(graph, 48, kernels, sharding)], seed=1
    )
    assert_same(generate(rank_model(name), MIX), expected)


def test_unfused_operations_too(
    rank_model: Callable[[str], Path],
    of_one_rank: Callable[[str], list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = of_one_rank("llama")
    whole = graph_of(fused=False, **BASE)
    use_plans(monkeypatch, rank_model("llama"), whole, 2, lambda graph: [scattered(graph, 48)], seed=1)
    assert_same(generate(rank_model("llama"), MIX), expected)


def test_launches_of_a_gpu_are_in_one_order(
    rank_model: Callable[[str], Path],
    of_one_rank: Callable[[str], list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other executor, with plans of all shardings: batches of fewer than 9 rows have all-reduces."""
    expected = of_one_rank("llama")

    def each(graph: Graph) -> list[Plan]:
        fused = replace(scattered(graph, 48, sharding=FUSED), least_rows=12)
        return [fused, replace(scattered(graph, 48), least_rows=9), Plan.sequential(graph, 48)]

    made = use_plans(monkeypatch, rank_model("llama"), graph_of(**BASE), 2, each, CudaExecutor, graphs=False)
    assert_same(generate(rank_model("llama"), MIX), expected)
    bound = made[0].ranks[0].bound
    assert bound.heads == (0, 1, 2) and not bound.buffers["x"][-1].any()
    assert len({id(program.graph) for program in bound.programs}) == 3


def test_random_plans_give_the_same_tokens(rank_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives in several lanes, and an order of its own on every rank."""
    expected = generate(rank_model("llama"), FEW)
    rank = shard_graph(graph_of(**BASE), 0, 2)
    several_lanes = []

    @settings(max_examples=6, derandomize=True)
    @given(data=st.data(), kernel=st.sampled_from(["reference", "nccl", "nccl_4"]))
    def check(sharding: str, data: st.DataObject, kernel: str) -> None:
        plan = data.draw(plans(with_sharding(rank, sharding)))
        kernels = FrozenMapping(dict.fromkeys(COLLECTIVES[sharding][:2], kernel))
        plan = replace(rows_of(plan, 11), sharding=sharding, kernels=kernels)
        program = compile_program(plan, rank)
        assert not check_program(program, full_batch(len(plan.nano_batches)), page_size=2)
        several_lanes.append(len({program.steps[i].lane for i in program.collectives}) > 1)
        use_plans(monkeypatch, rank_model("llama"), graph_of(**BASE), 2, lambda _: [plan], seed=len(several_lanes))
        assert_same(generate(rank_model("llama"), FEW), expected)

    for sharding in COLLECTIVES:
        check(sharding)
    assert sum(several_lanes) >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_have_the_same_bits(rank_model: Callable[[str], Path], size: int, dtype: torch.dtype) -> None:
    """Logits of prompts and decode rows: the bits of the plan with all-reduces, also where a nano-batch has one row or
    none, where rows do not divide, and where an operation is left whole."""
    whole = graph_of(**BASE)
    source = open_checkpoint(str(rank_model("llama")))
    pages = Pages(page_size=8, requests=2, columns=4)
    batches = [
        dense_batch([[Piece(0, 0, range(20, 31))], [Piece(1, 0, range(6))]], pages),
        dense_batch([[Piece(0, 11, [77], decode=True)], []], pages),
        dense_batch([[Piece(0, 12, [78], decode=True)], [Piece(1, 6, [8, 9, 10])]], pages, padding=1),
        dense_batch([[], [Piece(1, 9, [8, 9, 10, 12, 13])]], pages),
    ]
    text = "{sharding: SHARDING, capacity: 32, nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: "
    text += "1/2, prefill: 1/2, rows: 16}}, period: [whole: {main: [qkv.a, qkv.b, gate_up.a, gate_up.b, down]}]}"
    graphs = [shard_graph(whole, rank, size) for rank in range(size)]
    weights = [load_weights(graph, source, dtype, "cpu") for graph in graphs]

    def run(sharding: str) -> list[list[torch.Tensor]]:
        programs = [[compile_program(Plan.loads(text.replace("SHARDING", sharding), g), g)] for g in graphs]
        sizes: dict[str, Any] = {"slots": 2, "dtype": dtype, "device": CPU, "seed": 0}
        ranks = ThreadRanks(ReferenceExecutor, programs, weights, KVLayout(pages.pool, pages.page_size), **sizes)
        found = [step_logits(ranks.ranks, batch) for batch in batches]
        ranks.close()
        return found

    whole_rows = run("all_reduce")
    for sharding in COLLECTIVES:
        for logits, expected in zip(run(sharding), whole_rows, strict=True):
            assert all(torch.equal(each, expected[0]) for each in logits), sharding


def test_shares_of_rows_are_a_partition() -> None:
    for ranks in (2, 3, 4, 8):
        for start in (0, 5):
            for count in range(20):
                rows = slice(start, start + count)
                each = [row_share(rows, rank, ranks) for rank in range(ranks)]
                assert [n for share in each for n in range(share.start, share.stop)] == list(
                    range(start, start + count)
                )
                assert max(share.stop - share.start for share in each) == share_rows(count, ranks)
    nano_batches = [NanoBatchRows(0, 1, 2), NanoBatchRows(3, 0, 0), NanoBatchRows(3, 0, 3, 1)]
    assert own_rows(nano_batches, 0, 2).tolist() == [True, True, False, True, True, False, False]
    assert (own_rows(nano_batches, 0, 2) ^ own_rows(nano_batches, 1, 2)).all()
    assert own_rows([], 0, 2).dtype == np.bool_


def test_a_graph_of_shares_has_the_weights_and_half_of_the_rest() -> None:
    whole = graph_of()
    for size in (2, 4):
        graph = shard_graph(whole, 0, size)
        other = with_sharding(graph, REDUCE_SCATTER)
        assert other is with_sharding(graph, REDUCE_SCATTER) and with_sharding(graph, "all_reduce") is graph
        assert [op.name for op in other.layer] == [
            "input_layernorm", "input_layernorm_all_gather", "qkv", "rope_append", "decode_attention",
            "prefill_attention", "o", "o_reduce_scatter", "add_norm", "add_norm_all_gather", "gate_up", "down",
            "down_reduce_scatter", "add",
        ]  # fmt: skip
        assert [op.weights for op in graph.layer if op.weights] == [op.weights for op in other.layer if op.weights]
        work = Work(prefill_rows=200, prefill_pairs=100, sampled_rows=10)
        wire = other.cost(work, 2).wire_bytes - graph.cost(work, 2).wire_bytes
        assert wire == pytest.approx(2 * (size - 1) / size * 10 * 64 * 2), "the sampled rows alone"
        for name in ("input_layernorm", "add_norm", "add"):
            assert other.operation(name).cost(work, 2) * size == graph.operation(name).cost(work, 2)
        one = Work(decode_rows=1)
        assert other.operation("add").cost(one, 2) == graph.operation("add").cost(one, 2)
        assert graph_shape(graph) != graph_shape(other)
        fused = with_sharding(graph, FUSED)
        assert [op.name for op in fused.layer] == [
            "input_layernorm_gather", "qkv", "rope_append", "decode_attention", "prefill_attention", "o", "o_add_norm",
            "gate_up", "down", "down_add",
        ]  # fmt: skip
        assert [op.weights for op in graph.layer if op.weights] == [op.weights for op in fused.layer if op.weights]
        assert fused.cost(work, 2).wire_bytes == other.cost(work, 2).wire_bytes
        assert fused.cost(work, 2).flops == other.cost(work, 2).flops
        # Neither written nor read: two sums of a rank's rows, and twice the normed rows that go to each other rank.
        rows = 200 // size * 64 * 2
        assert other.cost(work, 2).bytes - fused.cost(work, 2).bytes == 2 * graph.layers * rows * size


def test_a_layer_that_needs_all_rows_of_the_residual_has_all_reduces() -> None:
    whole = graph_of(fused=False)
    gate_up = whole.operation("gate_up")
    assert isinstance(gate_up, Linear)
    gate_up.source = "x"
    graph = shard_graph(whole, 0, 2)
    assert shardings_of(graph) == ("all_reduce",) and shardings_of(whole) == ("all_reduce",)
    with pytest.raises(PlanError, match="sharding: gate_up needs all rows of the residual, or of a sum over ranks"):
        Plan(8, (), (), sharding=REDUCE_SCATTER).graph(graph)
    assert shardings_of(shard_graph(graph_of(), 0, 2)) == ("all_reduce", REDUCE_SCATTER, FUSED)
    assert shardings_of(shard_graph(graph_of(), 0, 2, "all_gather")) == ("all_gather",)


def test_plans_say_their_sharding() -> None:
    whole = graph_of()
    graph = shard_graph(whole, 0, 2)
    plan = scattered(graph, 32)
    assert "sharding: reduce_scatter\n" in plan.dumps() and Plan.loads(plan.dumps()) == plan
    sequential = Plan.sequential(graph, 32)
    assert "sharding" not in sequential.dumps() and Plan.loads(sequential.dumps()) == sequential
    validate(plan, graph)
    with pytest.raises(PlanError, match=r"sharding: unknown sharding 'reduce_scater'; did you mean 'reduce_scatter'\?"):
        Plan.loads(plan.dumps().replace("reduce_scatter\n", "reduce_scater\n", 1))
    with pytest.raises(PlanError, match=r"sharding: reduce_scatter is for ranks that share .*parallel\.tensor"):
        validate(plan, whole)
    named = replace(sequential, kernels=FrozenMapping({"o_reduce_scatter": "nccl"}))
    told = (
        r"kernels\.o_reduce_scatter: unknown operation 'o_reduce_scatter'; it is there with `sharding: reduce_scatter`"
    )
    with pytest.raises(PlanError, match=told):
        validate(named, graph)
    named = replace(plan, kernels=FrozenMapping({"o_all_reduce": "nccl"}))
    with pytest.raises(PlanError, match=r"it is there with `sharding: all_reduce`, and the plan has reduce_scatter"):
        validate(named, graph)
    with pytest.raises(PlanError, match=r"period.*main\[1\]: input_layernorm_all_gather: unknown operation .* with"):
        validate(replace(plan, sharding="all_reduce"), graph)
    with pytest.raises(
        PlanError, match=r"unknown operation 'input_layernorm'; did you mean 'input_layernorm_gather'\?"
    ):
        validate(replace(plan, sharding=FUSED), graph)
    fused = scattered(graph, 32, sharding=FUSED)
    with pytest.raises(PlanError, match=r"input_layernorm_gather: .* with `sharding: fused_reduce_scatter`, .* reduce"):
        validate(replace(fused, sharding=REDUCE_SCATTER), graph)
    for name, sharding in (
        ("o_add_norm", FUSED),
        ("add_norm_all_gather", REDUCE_SCATTER),
        ("attention_all_gather", "all_gather"),
    ):
        own = sequential if sharding == FUSED else fused
        with pytest.raises(PlanError, match=f"unknown operation '{name}'; it is there with `sharding: {sharding}`"):
            validate(replace(own, kernels=FrozenMapping({name: "nccl"})), graph)
    with pytest.raises(PlanError, match=r"kernels\.o_reduce_scatter: unknown kernel 'two_shot'; known: reference"):
        validate(replace(plan, kernels=FrozenMapping({"o_reduce_scatter": "two_shot"})), graph)


def test_a_run_needs_no_plan_for_it(tmp_path: Path) -> None:
    """What one rank has: nothing to divide."""
    folder = save(tmp_path, **BASE)
    text = scattered(shard_graph(graph_of(**BASE), 0, 2), 48).dumps()
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError, match=r"plan\.yaml: sharding: reduce_scatter is for ranks that share the model"):
        LLM(model=folder, dtype="float32", device="cpu", kv_memory="1MiB", plan=str(tmp_path / "plan.yaml"))


def test_ranks_that_reach_each_others_memory_run_in_sequence_as_was_measured_to_be_fastest() -> None:
    graph = shard_graph(graph_of(**BASE, **MODELS["llama"]), 0, 2)
    there = replace(graph, peers=True)
    here = Fingerprint(gpu="a GPU")
    assert [plan.sharding for plan in choose_plans("sequential", graph, here, 4096).plans] == ["all_reduce"]
    (small,) = choose_plans("sequential", there, here, SMALL_ROWS).plans
    large, rest = choose_plans("sequential", there, here, 4096).plans
    assert {plan.sharding for plan in (small, large, rest)} == {REDUCE_SCATTER}
    assert dict(small.kernels) == dict(rest.kernels) == dict.fromkeys(ROWS, "push")
    assert dict(large.kernels) == dict.fromkeys(ROWS, "copy_engine")
    assert (large.least_rows, large.capacity, rest.least_rows, rest.capacity) == (SMALL_ROWS + 1, 4096, 0, 4096)
    both = tuple(compile_program(plan, there) for plan in (large, rest))
    assert planned_programs(both) == both
    other = compile_program(Plan.sequential(there, 64, sharding="all_reduce"), there)
    assert planned_programs((other, *both)) == (other,)
    four = replace(shard_graph(graph_of(**BASE, **MODELS["llama"]), 0, 4), peers=True)
    assert not choose_plans("sequential", four, here, 4096).plans[0].kernels
