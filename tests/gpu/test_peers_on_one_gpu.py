"""Collectives between peers with both ranks on one GPU, each on a stream of its own: what the kernels do on a device,
where there are no two. Their memory is the GPU's own, so this says nothing of what links do to the order of writes."""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoflow.ops.collectives import AllReduce, LayerAllGather
from nanoflow.ops.fused_rows import FusedRows
from nanoflow.ops.peer_all_reduce import PEER_FORMS
from nanoflow.ops.peer_memory import PeerMemory, data_begin
from nanoflow.ops.peer_rows import ROW_FORMS
from nanoflow.ops.row_collectives import ReduceScatter, RowsAllGather
from nanoflow.ops.row_sharding import FUSED, with_sharding
from nanoflow.ops.row_shares import row_share
from nanoflow.ops.sharding import shard_graph
from tests.gpu.test_collectives import COLUMNS, ROWS, in_rank_order, inputs, run
from tests.gpu.test_fused_rows import NAMES, Case
from tests.unit.rank_models import graph_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
RANKS, REPLAYS = 2, 200
SECONDS = 20.0
"""After which a kernel gives up."""
CASES = ((torch.bfloat16, None), (torch.float32, 8))
SIZES = (ROWS, ROWS * 33 + 1, 1)


class Memories:
    """What both ranks have in common, each block in a piece of this GPU's memory."""

    def __init__(self) -> None:
        self.blocks: list[torch.Tensor] = []

    def make(self, room: int) -> list[PeerMemory]:
        """Both ranks' ends of a new one."""
        own = [torch.zeros(data_begin(RANKS) + room, dtype=torch.uint8, device="cuda") for _ in range(RANKS)]
        self.blocks += own
        return [PeerMemory(rank, own, SECONDS) for rank in range(RANKS)]

    def one_by_one(self, steps: Sequence[Callable[[], None]]) -> None:
        """Run a step of each rank alone: kernels are compiled and loaded while nothing waits on the device. All flags
        are raised for that, and all is as it was then."""
        for block in self.blocks:
            block[: data_begin(RANKS)].view(torch.int32)[32:] = 2**20
        for step in steps:
            step()
            torch.cuda.synchronize()
        for block in self.blocks:
            block.zero_()
        torch.cuda.synchronize()


def captured(steps: Sequence[Callable[[], None]], streams: Sequence[torch.cuda.Stream]) -> list[torch.cuda.CUDAGraph]:
    graphs = []
    for step, stream in zip(steps, streams, strict=True):
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            step()
            graph.capture_end()
        graphs.append(graph)
    return graphs


def replay(graphs: Sequence[torch.cuda.CUDAGraph], streams: Sequence[torch.cuda.Stream], drawn: random.Random) -> None:
    """Both ranks, begun at odds."""
    torch.cuda.synchronize()
    for rank in drawn.sample(range(RANKS), RANKS):
        with torch.cuda.stream(streams[rank]):
            torch.cuda._sleep(drawn.randrange(200_000))
            graphs[rank].replay()
    torch.cuda.synchronize()


@pytest.mark.parametrize("kernel", ROW_FORMS)
def test_fused_rows(kernel: str) -> None:
    memories, device = Memories(), torch.device("cuda")
    streams = [torch.cuda.Stream() for _ in range(RANKS)]
    ranks: list[Any] = [SimpleNamespace(rank=rank, size=RANKS) for rank in range(RANKS)]
    ops = []
    for rank in range(RANKS):
        graph = with_sharding(shard_graph(graph_of(hidden_size=COLUMNS), rank, RANKS), FUSED)
        ops.append({op.name: op for op in graph.layer if isinstance(op, FusedRows)})
    assert set(ops[0]) == set(NAMES)
    peers = memories.make(max(op.peer_room(kernel, max(SIZES), 4) or 0 for op in ops[0].values()))
    values = [value for op in ops[0].values() if (value := op.peer_buffer(kernel))]
    places = {value: memories.make(max(SIZES) * COLUMNS * 4) for value in values}
    found = []
    for rows in SIZES:
        for dtype, sms in CASES:
            cases = [
                Case(
                    ops[rank], kernel, rows, dtype, sms, ranks[rank], peers[rank],
                    {value: both[rank] for value, both in places.items()}, device,
                )
                for rank in range(RANKS)
            ]  # fmt: skip
            steps = [case.step for case in cases]
            memories.one_by_one(steps)
            found.append((cases, captured(steps, streams)))
    drawn = random.Random(9)
    for number in range(REPLAYS):
        cases, graphs = found[drawn.randrange(len(found))]
        rows, dtype = len(cases[0].residual), cases[0].residual.dtype
        parts = inputs(number, RANKS, device, dtype, rows)
        residual, weight = inputs(REPLAYS + number, 2, device, dtype, rows)
        for case, part in zip(cases, parts, strict=True):
            case.parts.copy_(part)
            case.residual.copy_(residual)
            case.weight.copy_(weight)
        replay(graphs, streams, drawn)
        for case in cases:
            case.check(parts, True, (kernel, number))


KINDS = {
    "all_reduce": (AllReduce("sum", "x", COLUMNS, RANKS), PEER_FORMS),
    "scatter": (ReduceScatter("rows", "x", COLUMNS, RANKS), ROW_FORMS),
    "gather": (RowsAllGather("rows", "x", COLUMNS, RANKS), ROW_FORMS),
    "columns": (LayerAllGather("all", "source", "gathered", "target", COLUMNS, RANKS), ROW_FORMS),
}


@pytest.mark.parametrize(("kind", "kernel"), [(kind, kernel) for kind, (_, forms) in KINDS.items() for kernel in forms])
def test_collectives(kind: str, kernel: str) -> None:
    op, memories = KINDS[kind][0], Memories()
    nothing: Any = None
    streams = [torch.cuda.Stream() for _ in range(RANKS)]
    peers = memories.make(op.peer_room(kernel, max(SIZES), 4) or 0)
    reached = op.peer_buffer(kernel)
    places = memories.make(max(SIZES) * RANKS * COLUMNS * 4) if reached else None
    found = []
    for rows in SIZES:
        for dtype, sms in CASES:
            sources, outputs, steps = [], [], []
            for rank in range(RANKS):
                width = {"x": 1, "source": 1, "gathered": RANKS, "target": RANKS}
                buffers = {
                    name: torch.zeros(rows, times * COLUMNS, dtype=dtype, device="cuda")
                    for name, times in width.items()
                }
                if reached and places:
                    data = places[rank].data(rank, 0, buffers[reached].numel(), dtype)
                    buffers[reached] = data.view(buffers[reached].shape)
                source = torch.zeros(rows, COLUMNS, dtype=dtype, device="cuda")
                result = "target" if kind == "columns" else "x"
                mine = row_share(slice(0, rows), rank, RANKS) if kind == "gather" else slice(0, rows)
                out = torch.zeros_like(buffers[result])

                def step(
                    rank: int = rank,
                    buffers: dict[str, torch.Tensor] = buffers,
                    source: torch.Tensor = source,
                    mine: slice = mine,
                    out: torch.Tensor = out,
                    result: str = result,
                    sms: int | None = sms,
                ) -> None:
                    buffers["source" if result == "target" else "x"][mine].copy_(source[mine])
                    own = places[rank] if places else None
                    run(op, kernel, buffers, len(source), nothing, peers[rank], sms, own)
                    out.copy_(buffers[result])

                sources.append(source)
                outputs.append(out)
                steps.append(step)
            memories.one_by_one(steps)
            found.append((sources, outputs, captured(steps, streams), steps))  # steps: graphs hold no buffer
    drawn = random.Random(10)
    for number in range(REPLAYS):
        sources, outputs, graphs, _ = found[drawn.randrange(len(found))]
        rows, dtype = sources[0].shape[0], sources[0].dtype
        each = inputs(number, RANKS, torch.device("cuda"), dtype, rows)
        for source, part in zip(sources, each, strict=True):
            source.copy_(part)
        replay(graphs, streams, drawn)
        for rank, out in enumerate(outputs):
            own = row_share(slice(0, rows), rank, RANKS)
            if kind == "columns":
                assert torch.equal(out, torch.cat(each, 1)), (kernel, number)
            elif kind == "gather":
                shares = [row_share(slice(0, rows), other, RANKS) for other in range(RANKS)]
                assert torch.equal(out, torch.cat([part[s] for part, s in zip(each, shares, strict=True)])), number
            else:
                mine = own if kind == "scatter" else slice(0, rows)
                assert torch.equal(out[mine], in_rank_order(each)[mine]), (kernel, number)
