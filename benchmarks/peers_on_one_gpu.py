"""What stands between two products of a layer, with both ranks on one GPU: the parts of collectives that no link takes.

    python -m benchmarks.peers_on_one_gpu                  # benchmarks/results/peers_on_one_gpu.json
    python -m benchmarks.peers_on_one_gpu --rows 1024

Each of two ranks has a stream of its own, and memory of the GPU stands for the other's: flags, sums and norms are what
they are between GPUs, and the bytes that a link would carry go through the memory, which both ranks share. So it says
which form of kernels is the faster one, on how many thread blocks, and not how fast collectives are; for that there is
`python -m benchmarks.collectives`, whose `between` measures the same.

Milliseconds are of one time, in CUDA graphs of several in a row on each stream, begun together, the slower rank's.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from benchmarks.collective_forms import Between
from benchmarks.kernels.__main__ import machine
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.peer_memory import FLAGS, PeerMemory, data_begin
from nanoflow.search.files import replace_file

RESULTS = Path(__file__).parent / "results" / "peers_on_one_gpu.json"
ROWS = (256, 512, 1024, 2048)
COLUMNS = 8192
"""Of Llama-3-70B."""
RANKS = 2
IN_A_ROW = 16
ROUNDS = 15
WARM_UP = 5
SMALLEST = 2.0**-60
"""What partial sums begin with: some forms make them twice as much each time."""
RAISED = 2**20
"""Flags that nothing waits for."""


class OneGpu:
    """One rank's end of a group whose ranks are all on this GPU. It has peer memory, and no library's collectives."""

    size = RANKS

    def __init__(self, rank: int, blocks: dict[str, list[torch.Tensor]]) -> None:
        self.rank = rank
        self.blocks = blocks
        """Of all ranks, by name."""

    def twin(self, name: str, max_ctas: int | None = None) -> "OneGpu":
        return self

    def peer_memory(self, name: str, room: int) -> PeerMemory:
        if name not in self.blocks:
            count = data_begin(RANKS) + room
            self.blocks[name] = [torch.zeros(count, dtype=torch.uint8, device="cuda") for _ in range(RANKS)]
        return PeerMemory(self.rank, self.blocks[name], 20.0)


class Pair:
    """Both ranks, for batches of up to `rows` rows."""

    def __init__(self, rows: int) -> None:
        device = torch.device("cuda")
        self.blocks: dict[str, list[torch.Tensor]] = {}
        ends = [cast(Communicator, OneGpu(rank, self.blocks)) for rank in range(RANKS)]
        self.ranks = [Between(end, device, COLUMNS, rows) for end in ends]
        self.buffers = [torch.zeros(rows, COLUMNS, dtype=torch.bfloat16, device=device) for _ in range(RANKS)]
        self.streams = [torch.cuda.Stream() for _ in range(RANKS)]
        names = self.ranks[0].names
        self.names = [name for name in names if "nccl" not in name and not name.endswith("reference")]

    def milliseconds(self, name: str) -> list[float]:
        """Of each round, without those that warm up."""
        # One rank at a time, with all flags raised: a kernel may not be loaded while another one waits for its rank.
        for block in self._all_blocks():
            block[: data_begin(RANKS)].view(torch.int32)[FLAGS:] = RAISED
        for rank in range(RANKS):
            self.ranks[rank].run(name, self.buffers[rank])
            torch.cuda.synchronize()
        for block in self._all_blocks():
            block.zero_()
        torch.cuda.synchronize()
        graphs = [self._captured(name, rank) for rank in range(RANKS)]
        found = []
        for _ in range(ROUNDS + WARM_UP):
            for buffer in self.buffers:
                buffer.normal_(std=SMALLEST)
            torch.cuda.synchronize()
            events = []
            for rank, stream in enumerate(self.streams):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with torch.cuda.stream(stream):
                    begin.record()
                    graphs[rank].replay()
                    end.record()
                events.append((begin, end))
            torch.cuda.synchronize()
            found.append(max(begin.elapsed_time(end) for begin, end in events) / IN_A_ROW)
        return found[WARM_UP:]

    def _all_blocks(self) -> list[torch.Tensor]:
        return [block for blocks in self.blocks.values() for block in blocks]

    def _captured(self, name: str, rank: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.streams[rank], capture_error_mode="thread_local"):
            for _ in range(IN_A_ROW):
                self.ranks[rank].run(name, self.buffers[rank])
        return graph


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("it takes an NVIDIA GPU, and this machine has none")
    record: dict[str, Any] = {**machine("cuda"), "columns": COLUMNS, "rounds": ROUNDS, "rows": {}}
    with torch.inference_mode():
        for rows in args.rows:
            pair, found = Pair(rows), {}
            for name in pair.names:
                times = pair.milliseconds(name)
                found[name] = {"milliseconds": median(times), "least": min(times), "most": max(times)}
                print(f"{rows:5} rows  {name:26} {median(times) * 1e3:7.1f} us", flush=True)
            record["rows"][str(rows)] = found
    replace_file(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
