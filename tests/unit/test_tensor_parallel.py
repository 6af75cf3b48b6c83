"""Tensor parallelism on a CPU: ranks joined by gloo compute what one does, whatever the plan and the order drawn.

Ranks are threads here: see `rank_threads`.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.distributed import HashStore

from nanoflow import RequestOutput, loading
from nanoflow.checkpoints import open_checkpoint
from nanoflow.ops.collectives import CTAS, sum_in_rank_order
from nanoflow.ops.communicator import CommunicatorError, TorchCommunicator
from nanoflow.ops.graph import RESIDUAL
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.checker import check_program
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.executor import KVLayout, Weights
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.weights import load_weights
from tests.unit.ops_harness import Pages, Piece, dense_batch
from tests.unit.plan_strategies import full_batch, plans
from tests.unit.rank_jobs import BASE, FEW, MIX, generate, rows_of, shares, step_logits
from tests.unit.rank_models import graph_of
from tests.unit.rank_threads import CPU, ThreadRanks, connect, on_all
from tests.unit.test_engine import assert_same


def use_ranks(
    monkeypatch: pytest.MonkeyPatch, folder: Path, size: int, make: Any = ReferenceExecutor, **options: Any
) -> list[ThreadRanks]:
    """Engines have `size` ranks from now on; the list gets their executors."""
    made: list[ThreadRanks] = []

    def executor(programs: list[Program], weights: Weights, kv: KVLayout, **sizes: Any) -> ThreadRanks:
        graphs, each = shares(folder, programs[0].graph, size)
        ranks = [[compile_program(program.plan, graph) for program in programs] for graph in graphs]
        made.append(ThreadRanks(make, ranks, each, kv, **sizes, **options))
        return made[-1]

    monkeypatch.setattr(loading, "ReferenceExecutor", executor)
    return made


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
    made = use_ranks(monkeypatch, rank_model(name), size, seed=1)
    assert_same(generate(rank_model(name), MIX), expected)
    (executor,) = made
    kv_heads = 2 if name == "shared-heads" else 4
    assert {bound.kv[0].shape[2] for bound in (rank.bound for rank in executor.ranks)} == {max(1, kv_heads // size)}


def test_launches_of_a_gpu_are_in_one_order(
    rank_model: Callable[[str], Path],
    of_one_rank: Callable[[str], list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other executor, whose head and sampling wait for masks on rank 0 alone."""
    expected = of_one_rank("llama")
    use_ranks(monkeypatch, rank_model("llama"), 2, CudaExecutor, graphs=False)
    assert_same(generate(rank_model("llama"), MIX), expected)


def forms_of(plan: Plan) -> dict[str, str]:
    """Forms of a plan's collectives, of one another's on its last nano-batch, unless it is left whole."""
    if len(plan.nano_batches) < 3:
        return {}
    entries = [entry for stage in plan.period for lane in stage.lanes.values() for entry in lane]
    split = all(entry.nano_batch is not None for entry in entries)
    last = {f"o_all_reduce.{plan.nano_batches[-1].name}": "nccl_8"} if split else {}
    return {"o_all_reduce": "nccl", "down_all_reduce": "nccl_4", **last}


def test_random_plans_give_the_same_tokens(
    rank_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Collectives in several lanes, and an order of its own on every rank."""
    expected = generate(rank_model("llama"), FEW)
    sharded = shard_graph(graph_of(**BASE), 0, 2)
    several_lanes = []

    @settings(max_examples=12, derandomize=True)
    @given(plan=plans(sharded))
    def check(plan: Plan) -> None:
        plan = rows_of(plan, 12)
        plan = replace(plan, kernels=FrozenMapping(forms_of(plan)))
        programs = [compile_program(plan, sharded)]
        assert not check_program(programs[0], full_batch(len(plan.nano_batches)), page_size=2)
        several_lanes.append(len({programs[0].steps[i].lane for i in programs[0].collectives}) > 1)
        made: list[ThreadRanks] = []

        def executor(_: Any, weights: Weights, kv: KVLayout, **sizes: Any) -> ThreadRanks:
            graphs, each = shares(rank_model("llama"), graph_of(**BASE), 2)
            ranks = [[compile_program(programs[0].plan, graph)] for graph in graphs]
            made.append(ThreadRanks(ReferenceExecutor, ranks, each, kv, **sizes, seed=len(several_lanes)))
            return made[-1]

        monkeypatch.setattr(loading, "ReferenceExecutor", executor)
        assert_same(generate(rank_model("llama"), FEW), expected)
        (ranks,) = made
        twins = [len(dict.fromkeys(rank.bound._communicators.values())) for rank in ranks.ranks]
        collectives = [programs[0].steps[i] for i in programs[0].collectives]
        needed = {(step.lane, CTAS.get(plan.kernel(step.nano_op.op, step.nano_op.nano_batch))) for step in collectives}
        assert twins == [len(needed)] * 2

    check()
    assert sum(several_lanes) >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_have_the_same_bits(rank_model: Callable[[str], Path], size: int, dtype: torch.dtype) -> None:
    """Residual and logits, in prompts and decode rows; near those of one rank."""
    whole = graph_of(**BASE)
    source = open_checkpoint(str(rank_model("llama")))
    pages = Pages(page_size=8, requests=2, columns=4)
    batches = [
        dense_batch([[Piece(0, 0, range(20, 31))], [Piece(1, 0, range(7))]], pages, padding=1),
        dense_batch([[Piece(0, 11, [77], decode=True)], [Piece(1, 7, [8, 9, 10])]], pages, padding=1),
    ]
    text = "{capacity: 32, nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, "
    text += "rows: 16}}, period: [whole: {main: [qkv.a, qkv.b, gate_up.a, gate_up.b]}]}"

    def run(size: int) -> list[list[torch.Tensor]]:
        graphs = [shard_graph(whole, rank, size) for rank in range(size)]
        programs = [[compile_program(Plan.loads(text, graph), graph)] for graph in graphs]
        weights = [load_weights(graph, source, dtype, "cpu") for graph in graphs]
        kv = KVLayout(pages.pool, pages.page_size)
        sizes: dict[str, Any] = {"slots": 2, "dtype": dtype, "device": CPU}
        if size == 1:
            executor = ReferenceExecutor(programs[0], weights[0], kv, **sizes)
            found = [step_logits([executor], batch) for batch in batches]
            executor.close()
            return found
        ranks = ThreadRanks(ReferenceExecutor, programs, weights, kv, seed=0, **sizes)
        found = []
        for batch in batches:
            logits = step_logits(ranks.ranks, batch)
            residuals = [rank.bound.buffers[RESIDUAL][: batch.rows] for rank in ranks.ranks]
            assert all(torch.equal(residuals[0], other) for other in residuals[1:])
            found.append(logits)
        ranks.close()
        return found

    for logits, one in zip(run(size), run(1), strict=True):
        assert all(torch.equal(logits[0], other) for other in logits[1:])
        assert logits[0].shape[1] == 301
        off = (logits[0].double() - one[0].double()).square().mean().sqrt() / one[0].double().std()
        assert off <= (1e-5 if dtype is torch.float32 else 0.06), off


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_in_rank_order_in_float32(dtype: torch.dtype) -> None:
    size = 4
    group = connect(size)
    torch.manual_seed(0)
    # Terms that cancel: another order, or rounding in between, gives other bits.
    each = [(torch.randn(33, 7) * 10 ** torch.randint(-3, 3, (33, 7))).to(dtype) for _ in range(size)]
    total = each[0].to(torch.promote_types(dtype, torch.float32))
    for part in each[1:]:
        total = total + part
    mine = [part.clone() for part in each]
    on_all(lambda rank: sum_in_rank_order(group[rank], mine[rank]), size)
    assert all(torch.equal(found, total.to(dtype)) for found in mine)
    library = [part.clone() for part in each]
    on_all(lambda rank: group[rank].all_reduce(library[rank]), size)
    assert all(torch.equal(found, library[0]) for found in library)
    for communicator in group:
        communicator.close()


def test_a_twin_needs_no_order_with_its_original() -> None:
    group = connect(2)
    twins = on_all(lambda rank: group[rank].twin("memory"), 2)
    seen = [[torch.tensor([float(rank)]), torch.tensor([10.0 + rank])] for rank in range(2)]
    started = [threading.Event(), threading.Event()]

    def add(job: int) -> None:
        """On rank 0 the twin comes first, on rank 1 its original, each while the other rank waits in the other."""
        rank, second = divmod(job, 2)
        if second:
            started[rank].wait(timeout=10)
        started[rank].set()
        which = second ^ (rank == 0)
        (twins if which else group)[rank].all_reduce(seen[rank][which])

    on_all(add, 4)
    assert seen == [[torch.tensor([1.0]), torch.tensor([21.0])]] * 2
    empty = torch.empty(0, 3)
    group[0].all_reduce(empty)  # nothing to add, nobody to wait for
    group[0].close()
    with pytest.raises(CommunicatorError, match="rank 0: the communicator is closed"):
        group[0].all_reduce(torch.ones(1))
    with pytest.raises(CommunicatorError, match="closed"):
        twins[0].all_reduce(torch.ones(1))


def test_ranks_that_do_not_come_are_missed_in_time() -> None:
    group = connect(2)
    group[1]._backend.set_timeout(timedelta(seconds=0.3))  # they are to miss each other, not the meeting
    with pytest.raises(CommunicatorError, match=r"rank 1 of 2: the other ranks did not take part in the all-reduce"):
        group[1].all_reduce(torch.ones(4))
    with pytest.raises(CommunicatorError, match=r"rank 0 of 3: .* in the meeting"):
        TorchCommunicator(HashStore(), 0, 3, CPU, timeout=0.3)
    with pytest.raises(ValueError, match="2 ranks or more, not 1"):
        TorchCommunicator(HashStore(), 0, 1, CPU)
    with pytest.raises(ValueError, match="rank 2 is not one of 0 to 1"):
        TorchCommunicator(HashStore(), 2, 2, CPU)


def test_an_executor_needs_the_ranks_that_its_graph_was_split_for(rank_model: Callable[[str], Path]) -> None:
    graphs, weights = shares(rank_model("llama"), graph_of(**BASE), 2)
    program = compile_program(Plan.sequential(graphs[0], 8), graphs[0])
    with pytest.raises(ValueError, match="split for 2 ranks, and the communicator joins 1"):
        ReferenceExecutor([program], weights[0], KVLayout(4, 8), slots=1, dtype=torch.float32, device=CPU)
