"""Fused sums, norms and all-gathers of rows between GPUs, as `test_collectives` has their parts.

Ranks are processes, two and four of them, each on a GPU of its own, or all on one.
"""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoflow.ops.collectives import CTAS
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.fused_rows import FusedRows
from nanoflow.ops.operation import NanoContext
from nanoflow.ops.peer_memory import PeerMemory
from nanoflow.ops.row_sharding import FUSED, with_sharding
from nanoflow.ops.row_shares import row_share
from nanoflow.ops.sharding import shard_graph
from tests.gpu.test_collectives import COLUMNS, REPLAYS, ROWS, captured, in_rank_order, inputs, on_gpus
from tests.unit.rank_models import graph_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NAMES = ("o_add_norm", "down_add", "input_layernorm_gather")
"""In the order of a layer and the begin of the next."""
KERNELS = ("reference", "nccl", "nccl_8", "copy_engine", "push")


class Case:
    """A layer's operations on so many rows of one type, with all that they read and write; `places` by the value."""

    def __init__(
        self,
        ops: dict[str, FusedRows],
        kernel: str,
        rows: int,
        dtype: torch.dtype,
        sms: int | None,
        communicator: Communicator,
        peers: PeerMemory | None,
        places: dict[str, PeerMemory],
        device: torch.device,
    ) -> None:
        self.ops, self.kernel, self.sms = ops, kernel, sms
        self.communicator, self.peers, self.places = communicator, peers, places
        names = {"x", *(op.scatter.buffer for op in ops.values() if op.scatter)}
        names |= {op.gather.buffer for op in ops.values() if op.gather}
        self.buffers = {name: torch.zeros(rows, COLUMNS, dtype=dtype, device=device) for name in names}
        for name, memory in places.items():
            self.buffers[name] = memory.data(communicator.rank, 0, rows * COLUMNS, dtype).view(rows, COLUMNS)
        self.residual, self.parts, self.weight = (torch.zeros_like(self.buffers["x"]) for _ in range(3))
        self.rows = slice(0, rows)
        self.found = {name: torch.zeros_like(self.residual) for name in (*NAMES, "x")}

    def step(self) -> None:
        """Sums of the parts, and of twice and three times as much, with the norms between them."""
        self.buffers["x"].copy_(self.residual)
        for number, name in enumerate(NAMES, 1):
            op = self.ops[name]
            if op.scatter is not None:
                torch.mul(self.parts, number, out=self.buffers[op.scatter.buffer])
            part: Any = SimpleNamespace(rows=self.rows, nano_batch_rows=(self.rows,))
            nothing: Any = None
            value = op.peer_buffer(self.kernel)
            ranks: Any = {
                "communicator": self.communicator, "peers": self.peers,
                "places": None if value is None else self.places[value],
            }  # fmt: skip
            weights = {"weight": self.weight[0]}
            op.kernels[self.kernel](NanoContext(nothing, part, 0, self.buffers, weights, nothing, self.sms, **ranks))
            if op.gather is not None:
                self.found[name].copy_(self.buffers[op.gather.buffer])
        self.found["x"].copy_(self.buffers["x"])

    def check(self, parts: list[torch.Tensor], exactly: bool, where: object) -> None:
        """Against sums in float32 in rank order, bit by bit, or near them; norms near those in float64."""
        own = row_share(self.rows, self.communicator.rank, self.communicator.size)
        rounding = 2**-7 if self.residual.dtype is torch.bfloat16 else 1e-5
        summed = self.residual
        for number, name in enumerate(NAMES, 1):
            if self.ops[name].scatter is not None:
                total = in_rank_order([part * number for part in parts])
                summed = (summed.float() + total.float()).to(summed.dtype)
            if self.ops[name].gather is not None:
                exact = summed.double()
                exact = exact * (exact.square().mean(-1, keepdim=True) + self.ops[name].eps).rsqrt()
                exact = exact * self.weight[0].double()
                assert (self.found[name].double() - exact).abs().amax() <= 4 * rounding * exact.abs().amax(), where
        found = self.found["x"][own]
        if exactly:
            assert torch.equal(found, summed[own]), where
        else:
            assert ((found - summed[own]).abs() <= 8 * rounding * summed.abs().amax()).all(), where


def check_fused(rank: int, communicator: Communicator, kernel: str) -> None:
    """A thousand replays of graphs of several sizes and types in a random order, some launched in their place, the
    ranks at odds in time; also where rows do not divide, and where ranks have none."""
    ranks, device = communicator.size, torch.device("cuda", torch.cuda.current_device())
    graph = with_sharding(shard_graph(graph_of(hidden_size=COLUMNS), rank, ranks), FUSED)
    ops = {op.name: op for op in graph.layer if isinstance(op, FusedRows)}
    assert set(ops) == set(NAMES)
    sizes = (ROWS, ROWS * 33 + 1, 1)
    used = communicator.twin(f"fused {kernel}", CTAS[kernel]) if kernel in CTAS else communicator
    rooms = [op.peer_room(kernel, max(sizes), 4) for op in ops.values()]
    peers = None if rooms[0] is None else communicator.peer_memory(kernel, max(room or 0 for room in rooms))
    values = [value for op in ops.values() if (value := op.peer_buffer(kernel))]
    places = {value: communicator.peer_memory(f"{value} {kernel}", max(sizes) * COLUMNS * 4) for value in values}
    stream = torch.cuda.Stream(device)
    together, apart = random.Random(8), random.Random(rank)
    with torch.cuda.stream(stream):
        cases = []
        for rows in sizes:
            for dtype, sms in ((torch.bfloat16, None), (torch.float32, 8)):
                case = Case(ops, kernel, rows, dtype, sms, used, peers, places, device)
                cases.append((case, captured(case.step, stream)))
        for number in range(REPLAYS):
            case, recorded = cases[together.randrange(len(cases))]
            rows, dtype = len(case.residual), case.residual.dtype
            parts = inputs(number, ranks, device, dtype, rows)
            residual, weight = inputs(REPLAYS + number, 2, device, dtype, rows)
            case.parts.copy_(parts[rank])
            case.residual.copy_(residual)
            case.weight.copy_(weight)
            torch.cuda._sleep(apart.randrange(200_000))
            recorded.replay() if together.random() < 0.9 else case.step()
            case.check(parts, peers is not None or kernel == "reference", (kernel, number))
        stream.synchronize()
        del cases, recorded, case


def checks(rank: int, communicator: Communicator, most_blocks: str) -> None:
    for kernel in (*KERNELS, most_blocks):
        check_fused(rank, communicator, kernel)


@pytest.mark.parametrize("ranks", [2, 4])
def test_fused_rows_between_gpus(ranks: int) -> None:
    on_gpus(ranks, checks)
