"""Forms of collectives that meet in memory of all ranks, as a profile measures them: in the interpreter, on memory that
two processes share."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore

from nanoflow.ops.peer_memory import FLAGS
from nanoflow.ops.row_sharding import ALL_GATHER, ALL_REDUCE
from nanoflow.ops.sharding import shard_graph
from nanoflow.profiling.rank_bench import RankBench, collectives_in
from nanoflow.search.profiler import Case, SoloCase
from tests.unit.interpreter.peer_runs import Shared
from tests.unit.interpreter.test_peer_all_reduce import blocks, on_ranks
from tests.unit.rank_models import graph_of

ROWS = 8


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (ALL_REDUCE, ("o_all_reduce", "o_reduce_scatter", "add_norm_all_gather", "o_add_norm", "down_add")),
        (ALL_GATHER, ("attention_all_gather", "o_all_gather")),
    ],
)
def test_every_form_is_measured_on_both_ranks(tmp_path: Path, layout: str, names: tuple[str, ...]) -> None:
    graphs = [shard_graph(graph_of(), rank, 2, layout) for rank in range(2)]
    collectives = collectives_in(graphs[0])
    forms = [
        (name, form)
        for name in names
        for form in collectives[name].kernels
        if collectives[name].peer_room(form, 1, 1) is not None
    ]
    assert {name for name, _ in forms} == set(names)
    cases: list[Case] = [SoloCase(name, "rows", None, ((3,), (ROWS,)), form) for name, form in forms]
    memory = {f"profile-{name}-{form}": blocks(2, 2**16) for name, form in forms}
    buffers = {collectives[name].peer_buffer(form) for name, form in forms} - {None}
    memory |= {f"profile-buffer-{value}": blocks(2, 2**16) for value in buffers}

    def rank_main(rank: int) -> None:
        communicator = Shared(FileStore(str(tmp_path / "store"), 2), rank, 2, torch.device("cpu"), timeout=60.0)
        communicator.memory = memory
        values = {name: torch.randn(ROWS, columns) for name, columns in graphs[rank].values.items()}
        own = collectives_in(graphs[rank])
        with torch.inference_mode():
            bench = RankBench(communicator, own, cases, values, torch.device("cpu"), torch.float32, lambda: None)
            assert not bench.missing
            found = [[point.seconds for point in bench.solo(case, lambda at: 1e-6)] for case in cases]
        (tmp_path / str(rank)).write_text(json.dumps(found))
        bench.close()
        communicator.close()

    on_ranks(2, rank_main)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first == second and all(len(seconds) == 2 and min(seconds) > 0 for seconds in first)
    for name, pair in memory.items():
        counted = {block[: 4 * FLAGS].view(torch.int32)[0].item() for block in pair}
        assert len(counted) == 1, "as often on both"
        assert "buffer" in name or counted != {0}, name
