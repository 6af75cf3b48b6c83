"""The fused operations on rows between peers, as `test_peer_rows` has their parts: several processes on memory that
they share, at odds in time, each running the kernel in the interpreter."""

import random
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoflow.ops import fused_rows_triton
from nanoflow.ops.fused_rows import FusedRows
from nanoflow.ops.norm import rms_norm
from nanoflow.ops.operation import NanoContext
from nanoflow.ops.peer_memory import FLAGS, PeerMemory, data_begin
from nanoflow.ops.row_sharding import FUSED, with_sharding
from nanoflow.ops.row_shares import row_share
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.plan import Plan
from tests.unit.interpreter.peer_runs import RankRuns
from tests.unit.interpreter.test_peer_all_reduce import TILE, at_odds, blocks, expected, on_ranks, parts
from tests.unit.rank_models import graph_of, save

COLUMNS, ROWS = 40, 21
EPS = 1e-5
DTYPES = (torch.float32, torch.float16)


def late(rank: int) -> None:
    """`at_odds`, also around the kernel that the copy engines' form has, and tiles so small that the rows of a program
    are several of them."""
    drawn = random.Random(50 + rank)
    own_rows = fused_rows_triton.own_rows

    def slow(*arguments: Any) -> None:
        time.sleep(drawn.random() * 0.002)
        own_rows(*arguments)
        time.sleep(drawn.random() * 0.002)

    at_odds(rank)
    fused_rows_triton.own_rows = slow
    fused_rows_triton.LARGE = TILE


def operations(ranks: int) -> dict[str, FusedRows]:
    """The three of a layer, for a model of COLUMNS columns."""
    config = {"hidden_size": COLUMNS, "num_attention_heads": 6, "num_key_value_heads": 6}
    graph = with_sharding(shard_graph(graph_of(**config), 0, ranks), FUSED)
    found = {op.name: op for op in graph.layer if isinstance(op, FusedRows)}
    assert set(found) == {"input_layernorm_gather", "o_add_norm", "down_add"}
    return found


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Norms may be off by what rounding in another order gives."""
    close = (2e-3 if found.dtype is torch.float16 else 3e-6) * wanted.float().abs().max() if len(wanted) else 0.0
    return torch.allclose(found.float(), wanted.float(), rtol=0, atol=float(close))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("form", ["copy_engine", "push"])
def test_own_rows_get_sums_and_all_rows_norms_whoever_is_late(form: str, ranks: int) -> None:
    """Kernels of all three kinds in one order on all ranks, of sizes, programs and types that change. What a rank reads
    of the old normed rows before it comes to the next kernel is not written over."""
    ops = operations(ranks)
    room = max(op.peer_room(form, ROWS, 4) or 0 for op in ops.values())
    memory, flags = blocks(ranks, 2 * ROWS * COLUMNS * 4), blocks(ranks, room)
    drawn = random.Random(ranks)
    steps = [(drawn.choice(list(ops)), drawn.choice([1, 2, 5, 12, ROWS]), drawn.choice([1, 2, 3])) for _ in range(15)]
    assert {name for name, *_ in steps} == set(ops)

    def rank_main(rank: int) -> None:
        late(rank)
        apart = random.Random(rank)
        peers, places = PeerMemory(rank, flags, 60.0), PeerMemory(rank, memory, 60.0)
        for step, (name, rows, sms) in enumerate(steps):
            dtype, first = DTYPES[step % 2], (0, ROWS)[step % 3 == 0]
            op, at, own = ops[name], slice(first, first + rows), row_share(slice(0, rows), rank, ranks)
            whole = places.data(rank, 0, 2 * ROWS * COLUMNS, dtype).view(2 * ROWS, COLUMNS)
            before = whole.view(torch.uint8).clone()
            each = [part.view(rows, COLUMNS) for part in parts(ranks, step, dtype, rows * COLUMNS)]
            generator = torch.Generator().manual_seed(1000 + step)
            residual = torch.randn(rows, COLUMNS, generator=generator).to(dtype)
            weight = torch.rand(COLUMNS, generator=generator).to(dtype)
            summed = residual.clone()
            if op.scatter is not None:
                summed += expected([part.reshape(-1) for part in each]).view(rows, COLUMNS)
            normed = torch.empty_like(residual)
            rms_norm(summed, weight, EPS, normed)
            buffers = {"x": torch.full((2 * ROWS, COLUMNS), 7.0, dtype=dtype)}
            buffers["x"][at][own] = residual[own]
            if op.scatter is not None:
                buffers[op.scatter.buffer] = torch.full_like(buffers["x"], 7.0)
                buffers[op.scatter.buffer][at] = each[rank]
            if op.gather is not None:
                buffers[op.gather.buffer] = whole
            for _ in range(apart.randrange(5)):  # others may have come: they wait for this rank
                assert torch.equal(whole.view(torch.uint8), before), (name, rank, step, "written too early")
            part: Any = SimpleNamespace(rows=at, nano_batch_rows=(at,))
            nothing: Any = None
            ranks_have: Any = {"peers": peers, "places": places if op.gather else None}
            op.kernels[form](NanoContext(nothing, part, 0, buffers, {"weight": weight}, nothing, sms, **ranks_have))
            wanted = torch.full_like(buffers["x"], 7.0)
            wanted[at][own] = summed[own]
            assert torch.equal(buffers["x"], wanted), (name, rank, step, "own rows alone")
            if op.gather is not None:
                assert same(whole[at], normed), (name, rank, step)
                rest = torch.ones(2 * ROWS, dtype=torch.bool)
                rest[at] = False
                old = before.view(dtype).view(2 * ROWS, COLUMNS)
                assert torch.equal(whole[rest].view(torch.uint8), old[rest].view(torch.uint8)), "rows of no one's"

    on_ranks(ranks, rank_main)
    for block in flags:
        numbers = block[: 4 * FLAGS].view(torch.int32)
        kernels, told = len(steps), 0
        if form == "copy_engine":  # the ranks meet when parts have come, and when rows have
            meetings = {"o_add_norm": 2, "down_add": 1, "input_layernorm_gather": 2}
            counts = list(accumulate(meetings[name] for name, *_ in steps))
            kernels = counts[-1]
            told = max(
                count - meetings[name] + 1
                for count, (name, *_) in zip(counts, steps, strict=True)
                if name != "input_layernorm_gather"
            )
        assert numbers.tolist() == [kernels, 0, told] + [0] * (FLAGS - 3), "counted, and nothing left behind"


def test_memory_in_common_is_needed() -> None:
    op = operations(2)["o_add_norm"]
    peers, few = (
        PeerMemory(0, [torch.zeros(data_begin(2) + room, dtype=torch.uint8) for _ in range(2)], 60.0)
        for room in (2**14, 64)
    )
    part: Any = SimpleNamespace(rows=slice(0, 2), nano_batch_rows=(slice(0, 2),))
    nothing: Any = None
    buffers = {name: torch.zeros(2, COLUMNS) for name in ("x", "o", "post_attention_layernorm")}
    context = NanoContext(nothing, part, 0, buffers, {"weight": torch.ones(COLUMNS)}, nothing, peers=peers)
    with pytest.raises(ValueError, match="o_add_norm needs post_attention_layernorm in memory that all ranks reach"):
        op.kernels["push"](context)
    for form in ("push", "copy_engine"):
        with pytest.raises(ValueError, match=rf"o_add_norm by {form} of 2 rows needs \d+ bytes of peer memory"):
            op.kernels[form](replace(context, peers=few, places=peers))


LANES = """
sharding: fused_reduce_scatter
capacity: 32
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, rows: 16}}
kernels: {o_add_norm: SECOND, o_add_norm.a: FIRST, down_add: SECOND, input_layernorm_gather: SECOND}
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      gate_up.a, down.a, gate_up.b, down.b]
    one: [o_add_norm.a, down_add.a, input_layernorm_gather@1]
    two: [o_add_norm.b, down_add.b]
"""


def test_plans_give_what_the_parts_give(tmp_path: Path) -> None:
    """Whole iterations of two ranks on two lanes whose nano-ops run in random orders, one of them whole: the bits of
    the reference in what the residual adds up, and those of the parts one after the other in all."""
    (tmp_path / "model").mkdir()
    save(tmp_path / "model")
    forms = ("copy_engine", "push_32")
    names = [f"{lane}-{form}-fused" for lane in ("one", "two") for form in forms]
    names += ["buffer-input_layernorm", "buffer-post_attention_layernorm"]
    memory = {name: blocks(2, 2**17) for name in names}

    def rank_main(rank: int) -> None:
        runs = RankRuns(rank, tmp_path)
        share, run = runs.graph, runs.residuals

        reference = LANES.replace("FIRST", "reference").replace("SECOND", "reference")
        wanted = run(Plan.loads(reference, share), "reference", {})
        apart = run(Plan.sequential(share, 32, sharding="reduce_scatter"), "parts", {})
        for own, mine in zip(run(Plan.sequential(share, 32, sharding=FUSED), "whole", {}), apart, strict=True):
            assert torch.equal(own, mine), "the parts one after the other"
        late(rank)
        plan = Plan.loads(LANES.replace("FIRST", forms[0]).replace("SECOND", forms[1]), share)
        found = run(plan, "push", memory)
        assert all(map(same, found, wanted))

    on_ranks(2, rank_main)
    used = {name for name, pair in memory.items() if pair[0][:4].view(torch.int32).item()}
    assert used == {"one-copy_engine-fused", "one-push_32-fused", "two-push_32-fused"}, "a nano-batch has its own form"
    assert all(pair[0].any() for name, pair in memory.items() if name.startswith("buffer"))
