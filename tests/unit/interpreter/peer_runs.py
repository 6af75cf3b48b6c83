"""Whole iterations of one of two ranks, in a process of its own: tests of forms between peers compare plans by them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import FileStore

from nanoflow.checkpoints import open_checkpoint
from nanoflow.ops.batch import DenseBatch
from nanoflow.ops.communicator import TorchCommunicator
from nanoflow.ops.graph import RESIDUAL
from nanoflow.ops.peer_memory import PeerMemory, data_begin
from nanoflow.ops.row_sharding import ALL_REDUCE
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.weights import load_weights
from tests.unit.ops_harness import Pages, Piece, dense_batch
from tests.unit.rank_models import graph_of

PAGES = Pages(page_size=8, requests=2, columns=4)
BATCHES = (
    dense_batch([[Piece(0, 0, range(20, 31))], [Piece(1, 0, range(6))]], PAGES),
    dense_batch([[Piece(0, 11, [77], decode=True)], [Piece(1, 6, [8, 9, 10, 11])]], PAGES, padding=1),
    dense_batch([[], [Piece(0, 12, [78], decode=True)]], PAGES),
)
"""Of two nano-batches, with rows that do not divide, one row and none."""


class Shared(TorchCommunicator):
    """Joined by gloo; and what it has in common of its memory was there before the ranks."""

    memory: dict[str, list[torch.Tensor]]

    def peer_memory(self, name: str, room: int) -> PeerMemory:
        begin = data_begin(self.size)
        return PeerMemory(self.rank, [block[: begin + room] for block in self.memory[name]], 60.0)


class RankRuns:
    """One of two ranks of the model in `folder` / model; they meet in `folder` / store.

    Attributes:
        graph: the rank's own.
    """

    def __init__(self, rank: int, folder: Path, layout: str = ALL_REDUCE) -> None:
        self.rank = rank
        self.graph = shard_graph(graph_of(), rank, 2, layout)
        self._weights = load_weights(self.graph, open_checkpoint(str(folder / "model")), torch.float32, "cpu")
        self._store = FileStore(str(folder / "store"), 2)

    def residuals(
        self, plan: Plan, name: str, memory: dict[str, list[torch.Tensor]], batches: Sequence[DenseBatch] = BATCHES
    ) -> list[torch.Tensor]:
        """The rank's rows of the residual behind the last layer of each batch, with nano-ops in an order of its own.

        Args:
            name: of the run, the same on both ranks, which no other has.
            memory: both ranks' blocks of peer memory, by name.
        """
        communicator = Shared(self._store, self.rank, 2, torch.device("cpu"), timeout=60.0, name=name)
        communicator.memory = memory
        executor = ReferenceExecutor(
            [compile_program(plan, self.graph)], self._weights, KVLayout(PAGES.pool, PAGES.page_size), slots=2,
            dtype=torch.float32, device=torch.device("cpu"), seed=self.rank, communicator=communicator,
        )  # fmt: skip
        found = []
        for batch in batches:
            executor.launch(batch)
            executor.collect()
            found.append(executor.bound.buffers[RESIDUAL][: batch.rows][executor.bound.own(batch)].clone())
        executor.close()
        communicator.close()
        return found
