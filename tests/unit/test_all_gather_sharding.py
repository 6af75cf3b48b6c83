"""`sharding: all_gather` on a CPU: other weights, the tokens of one rank, whatever the plan and the order drawn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanoflow import RequestOutput, loading
from nanoflow.checkpoints import open_checkpoint
from nanoflow.ops.collectives import LayerAllGather
from nanoflow.ops.operation import Work
from nanoflow.ops.row_sharding import ALL_GATHER, layout_of
from nanoflow.ops.sharding import ShardError, shard_graph
from nanoflow.pipeline.bound_programs import BoundPrograms
from nanoflow.pipeline.checker import check_program
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.plan import FrozenMapping, Plan, PlanError
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.pipeline.validate import validate
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.fingerprint import Fingerprint, graph_shape, ranks_of
from nanoflow.search.rates import CeilingRates, Running, wire_share
from nanoflow.weights import load_weights
from tests.unit.plan_strategies import full_batch, plans
from tests.unit.rank_jobs import BASE, FEW, MIX, MODELS, generate, rows_of
from tests.unit.rank_models import graph_of, save
from tests.unit.rank_threads import CPU, ThreadRanks, connect, on_all
from tests.unit.test_engine import assert_same
from tests.unit.test_sharding import weights_of

FORMS_ON = (("copy_engine", None, 0), ("copy_engine", 8, 0), ("push", None, 16), ("push_64", None, 64), ("push", 8, 8))
"""Forms on the SMs of a lane, or on a plain stream, and the SMs that they take."""
COLLECTIVES = ("attention_all_gather", "o_all_gather", "down_all_reduce")


def use_ranks(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, size: int, plan: Plan | None, make, **options
) -> None:
    """Engines have `size` ranks from now on, which run `plan`, or in sequence."""
    graphs = [shard_graph(graph_of(**BASE, **MODELS[name]), rank, size, ALL_GATHER) for rank in range(size)]
    source = open_checkpoint(str(folder))
    each = [load_weights(graph, source, torch.float32, "cpu") for graph in graphs]

    def executor(_, weights, kv: KVLayout, **sizes) -> ThreadRanks:
        ranks = [[compile_program(plan or Plan.sequential(graph, 48), graph)] for graph in graphs]
        return ThreadRanks(make, ranks, each, kv, **sizes, **options)

    monkeypatch.setattr(loading, "ReferenceExecutor", executor)


@pytest.mark.parametrize(
    ("name", "size"),
    [("llama", 2), ("llama", 4), ("biases", 4), ("shared-heads", 4), ("shared-heads", 8), ("qwen2", 2), ("qwen3", 4)],
)
def test_tokens_are_those_of_one_rank(
    rank_model: Callable[[str], Path],
    of_one_rank: Callable[[str], list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    size: int,
) -> None:
    expected = of_one_rank(name)
    use_ranks(monkeypatch, rank_model(name), name, size, None, ReferenceExecutor, seed=1)
    assert_same(generate(rank_model(name), MIX), expected)


def test_launches_of_a_gpu_are_in_one_order(
    rank_model: Callable[[str], Path],
    of_one_rank: Callable[[str], list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = of_one_rank("llama")
    use_ranks(monkeypatch, rank_model("llama"), "llama", 2, None, CudaExecutor, graphs=False)
    assert_same(generate(rank_model("llama"), MIX), expected)


def test_random_plans_give_the_same_tokens(rank_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives in several lanes, of nano-batches side by side, and an order of its own on every rank."""
    expected = generate(rank_model("llama"), FEW)
    rank = shard_graph(graph_of(**BASE), 0, 2, ALL_GATHER)
    several_lanes = []

    @settings(max_examples=10, derandomize=True)
    @given(plan=plans(rank), kernel=st.sampled_from(["reference", "nccl", "nccl_4"]))
    def check(plan: Plan, kernel: str) -> None:
        kernels = FrozenMapping(dict.fromkeys(COLLECTIVES, kernel))
        plan = replace(rows_of(plan, 11), sharding=ALL_GATHER, kernels=kernels)
        program = compile_program(plan, rank)
        assert not check_program(program, full_batch(len(plan.nano_batches)), page_size=2)
        several_lanes.append(len({program.steps[i].lane for i in program.collectives}) > 1)
        use_ranks(monkeypatch, rank_model("llama"), "llama", 2, plan, ReferenceExecutor, seed=len(several_lanes))
        assert_same(generate(rank_model("llama"), FEW), expected)

    check()
    assert sum(several_lanes) >= 3


def test_the_graph_and_its_cost() -> None:
    whole = graph_of(attention_bias=True, num_key_value_heads=2)
    for size in (2, 4, 8):
        graph = shard_graph(whole, size - 1, size, ALL_GATHER)
        assert graph.sharding == ALL_GATHER and Plan.sequential(graph, 8).sharding == ALL_GATHER
        names = [op.name for op in graph.layer]
        at = names.index("o")
        assert names[at - 1 : at + 2] == ["attention_all_gather", "o", "o_all_gather"]
        assert names[names.index("down") + 1] == "down_all_reduce"
        weight, bias = graph.operation("o").weights
        assert weight.shape == (64 // size, 64) and bias.shape == (64 // size,)
        assert weight.slice is not None and weight.slice.ranges == ((64 - 64 // size, 64),)
        work = Work(decode_rows=100)
        wire = sum(graph.operation(name).cost(work, 2).wire_bytes for name in COLLECTIVES)
        assert wire == pytest.approx(4 * (size - 1) / size * 100 * 64 * 2), "as much as two all-reduces"
        for op in map(graph.operation, COLLECTIVES[:2]):
            assert isinstance(op, LayerAllGather) and op.cost_with("copy_engine", work, 2) == op.cost(work, 2)
            pushed = op.cost_with("push", work, 2)
            assert pushed.wire_bytes == op.cost(work, 2).wire_bytes
            assert pushed.bytes == (size + 1) * 100 * 64 / size * 2, "a share is read, and written on each rank"
        product = graph.operation("o").cost(work, 2).flops
        assert product * size == pytest.approx(whole.operation("o").cost(work, 2).flops)
    assert layout_of("reduce_scatter") == "all_reduce" and layout_of(ALL_GATHER) == ALL_GATHER
    with pytest.raises(ShardError, match="the 60 output columns of o do not divide by 8"):
        shard_graph(graph_of(hidden_size=60), 0, 8, ALL_GATHER)
    with pytest.raises(ValueError, match="reduce_scatter has the weights of all_reduce"):
        shard_graph(whole, 0, 2, "reduce_scatter")


def test_forms_take_time_and_sms_by_ceilings() -> None:
    op = shard_graph(graph_of(), 0, 2, ALL_GATHER).operation("o_all_gather")
    rates = CeilingRates(Ceilings(700e12, 3e12, 150e9), 132, 2)
    work = Work(prefill_rows=1 << 16)
    sent = op.cost(work, 2).wire_bytes
    for form, sms, taken in FORMS_ON:
        assert Running(op, work, sms, form).taken == taken
        assert rates.seconds(op, work, sms, form) == pytest.approx(sent / (150e9 * wire_share(taken)))


def test_forms_in_peer_memory_are_refused_on_a_cpu() -> None:
    communicators = connect(2)
    graphs = [shard_graph(graph_of(), rank, 2, ALL_GATHER) for rank in range(2)]

    def refused(rank: int) -> str:
        kernels = FrozenMapping({"o_all_gather": "push"})
        program = compile_program(replace(Plan.sequential(graphs[rank], 8), kernels=kernels), graphs[rank])
        nothing: Any = None
        with pytest.raises(PlanError) as error:
            BoundPrograms(
                [program], nothing, KVLayout(2, 8), dtype=torch.float32, device=CPU, sampled_rows=8,
                communicator=communicators[rank],
            )  # fmt: skip
        return str(error.value)

    message = (
        "kernels.o_all_gather: 'push' cannot run here: ranks on a CPU have no memory in common; what can: reference, "
        "nccl, nccl_2, nccl_4, nccl_8, nccl_16"
    )
    assert on_all(refused, 2) == [message] * 2
    for communicator in communicators:
        communicator.close()


def test_shares_of_o_are_rows_of_its_weight(tmp_path: Path) -> None:
    source = open_checkpoint(str(save(tmp_path, attention_bias=True)))
    whole = graph_of(attention_bias=True)
    full = load_weights(whole, source, torch.float32, "cpu").layers[1]["o"]
    for rank in range(4):
        graph = shard_graph(whole, rank, 4, ALL_GATHER)
        held = load_weights(graph, source, torch.float32, "cpu").layers[1]["o"]
        assert {op for _, op, _ in weights_of(graph)} == {op for _, op, _ in weights_of(whole)}
        for name in ("weight", "bias"):
            one, all_of = (t.to_dense() if t.is_mkldnn else t for t in (held[name], full[name]))
            assert torch.equal(one, all_of[16 * rank : 16 * (rank + 1)])


def test_it_stands_beside_no_other_sharding() -> None:
    whole = graph_of()
    usual, graph = shard_graph(whole, 0, 2), shard_graph(whole, 0, 2, ALL_GATHER)
    plan = Plan.sequential(graph, 32)
    assert Plan.loads(plan.dumps(), graph) == plan and "sharding: all_gather\n" in plan.dumps()
    with pytest.raises(PlanError, match="sharding: all_gather needs weights that are laid out otherwise than for"):
        validate(plan, usual)
    for sharding in ("all_reduce", "reduce_scatter"):
        with pytest.raises(PlanError, match=f"sharding: {sharding} needs weights .* than for all_gather"):
            validate(replace(plan, sharding=sharding), graph)
    named = replace(Plan.sequential(usual, 32), kernels=FrozenMapping({"o_all_gather": "nccl"}))
    with pytest.raises(PlanError, match="it is there with `sharding: all_gather`, and the plan has all_reduce"):
        validate(named, usual)
    shapes = [graph_shape(each) for each in (usual, graph)]
    assert [ranks_of(shape) for shape in shapes] == [2, 2]
    stamped = Fingerprint(model="m", gpu="g", shape=shapes[1]).stamp(plan)
    (line,) = Fingerprint(model="m", gpu="g", shape=shapes[0]).refusals(stamped)
    assert line.endswith("(sharding: the plan is for the weights of all_gather, the run has those of all_reduce)")
