"""Reduce-scatter and all-gather of rows between peers, as `test_peer_all_reduce` has all-reduces: several processes on
memory that they share, at odds in time, each running the kernels in the interpreter."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.ops.peer_memory import FLAGS, PeerMemory, data_begin
from nanoflow.ops.peer_rows import gather_rows, programs_of, scatter_room, scatter_sums
from nanoflow.ops.row_shares import row_share
from nanoflow.pipeline.plan import Plan
from tests.unit.interpreter.peer_runs import BATCHES, RankRuns
from tests.unit.interpreter.test_peer_all_reduce import at_odds, blocks, expected, on_ranks, parts
from tests.unit.rank_models import save

COLUMNS, ROWS = 40, 21
FORMS = ("copy_engine", "push")
"""Others are `push` on more thread blocks."""
DTYPES = (torch.float32, torch.float16)


def drawn_steps(ranks: int) -> list[tuple[int, int]]:
    """Rows, also fewer than ranks and such as do not divide, and SMs."""
    drawn = random.Random(ranks)
    return [(drawn.choice([1, 2, 5, 12, ROWS]), drawn.choice([1, 2, 3])) for _ in range(9)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_sums_of_own_rows_in_rank_order_whoever_is_late(form: str, ranks: int) -> None:
    memory = blocks(ranks, scatter_room(form, ROWS, COLUMNS, ranks, 4))
    steps = drawn_steps(ranks)

    def rank_main(rank: int) -> None:
        at_odds(rank)
        peers = PeerMemory(rank, memory, 60.0)
        for step, (rows, sms) in enumerate(steps):
            each = parts(ranks, step, DTYPES[step % 2], rows * COLUMNS)
            x = each[rank].clone().view(rows, COLUMNS)
            scatter_sums(form, x, peers, sms)
            own = row_share(slice(0, rows), rank, ranks)
            total = each[rank].clone().view(rows, COLUMNS)
            total[own] = expected(each).view(rows, COLUMNS)[own]
            assert torch.equal(x, total), (form, rank, step, "own rows alone")

    on_ranks(ranks, rank_main)
    for block in memory:
        numbers = block[: 4 * FLAGS].view(torch.int32)
        told = len(steps) if form == "copy_engine" else 0
        assert numbers.tolist() == [len(steps), 0, told] + [0] * (FLAGS - 3), "counted, and nothing left behind"


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_rows_come_to_their_places_whoever_is_late(form: str, ranks: int) -> None:
    """What a rank reads of the old rows before it comes to the next all-gather is not written over."""
    memory, flags = blocks(ranks, 2 * ROWS * COLUMNS * 4), blocks(ranks, 0)
    steps = drawn_steps(ranks)

    def rank_main(rank: int) -> None:
        at_odds(rank)
        drawn = random.Random(rank)
        peers, places = PeerMemory(rank, flags, 60.0), PeerMemory(rank, memory, 60.0)
        for step, (rows, sms) in enumerate(steps):
            dtype, first = DTYPES[step % 2], (0, ROWS)[step % 3 == 0]
            whole = places.data(rank, 0, 2 * ROWS * COLUMNS, dtype).view(2 * ROWS, COLUMNS)
            x, before = whole[first : first + rows], whole.clone()
            values = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(step)).to(dtype)
            own = row_share(slice(0, rows), rank, ranks)
            x[own] = values[own]
            for _ in range(drawn.randrange(5)):  # others may have come: they wait for this rank
                others = torch.ones(rows, dtype=torch.bool)
                others[own] = False
                assert torch.equal(x[others].view(torch.uint8), before[first : first + rows][others].view(torch.uint8))
            gather_rows(form, x, first, peers, places, sms)
            assert torch.equal(x, values), (form, rank, step)

    on_ranks(ranks, rank_main)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_wrap_around(form: str) -> None:
    memory, flags, values = (blocks(2, scatter_room(form, ROWS, COLUMNS, 2, 4)) for _ in range(3))
    for block in (*memory, *flags):
        block[:4].view(torch.int32).fill_(2**31 - 3)
        block[4 * FLAGS : data_begin(2)].view(torch.int32).fill_(2**31 - 3)

    def rank_main(rank: int) -> None:
        at_odds(rank)
        scatter, gather, places = (PeerMemory(rank, each, 60.0) for each in (memory, flags, values))
        for step in range(5):
            each = parts(2, step, torch.float32, ROWS * COLUMNS)
            x = places.data(rank, 0, ROWS * COLUMNS, torch.float32).view(ROWS, COLUMNS)
            # A rank may still be on its way from the all-gather before: its rows of this buffer are its own again.
            mine = each[rank].clone().view(ROWS, COLUMNS)
            scatter_sums(form, mine, scatter, 2)
            own = row_share(slice(0, ROWS), rank, 2)
            x[own] = mine[own]
            gather_rows(form, x, 0, gather, places, 2)
            assert torch.equal(x.view(-1), expected(each)), (form, rank, step)

    on_ranks(2, rank_main)


def test_more_thread_blocks_where_the_lane_is_not_confined() -> None:
    assert [programs_of(form, None) for form in ("push", "push_32", "push_64", "push_128")] == [16, 32, 64, 128]
    assert [programs_of(form, 8) for form in ("push", "push_64")] == [8, 8] and programs_of("push", 132) == 128


def test_too_little_memory_is_refused() -> None:
    peers = PeerMemory(0, [torch.zeros(data_begin(2) + 1024, dtype=torch.uint8) for _ in range(2)], 60.0)
    with pytest.raises(ValueError, match="push of 30 rows needs 4096 bytes of peer memory, and has 1024"):
        scatter_sums("push", torch.zeros(30, 10), peers, None)


LANES = """
sharding: reduce_scatter
capacity: 32
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, rows: 16}}
kernels: {o_reduce_scatter: FIRST, add_norm_all_gather: SECOND, down_reduce_scatter: SECOND,
  input_layernorm_all_gather: FIRST}
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      add_norm.a, gate_up.a, down.a, add_norm.b, gate_up.b, down.b, add, input_layernorm@1]
    one: [o_reduce_scatter.a, o_reduce_scatter.b, add_norm_all_gather.b, down_reduce_scatter.a]
    two: [add_norm_all_gather.a, down_reduce_scatter.b, input_layernorm_all_gather@1]
"""


def test_plans_give_the_bits_of_the_reference(tmp_path: Path) -> None:
    """Whole iterations of two ranks, the forms on two lanes whose nano-ops run in random orders, one of them whole."""
    (tmp_path / "model").mkdir()
    save(tmp_path / "model")
    plans = [("copy_engine", "push"), ("push", "copy_engine")]
    names = [f"{lane}-{form}-{kind}" for lane in ("one", "two") for form in FORMS for kind in ("scatter", "gather")]
    names += ["buffer-input_layernorm", "buffer-post_attention_layernorm"]
    memory = [{name: blocks(2, 2**17) for name in names} for _ in plans]

    def rank_main(rank: int) -> None:
        runs = RankRuns(rank, tmp_path)
        share, run = runs.graph, runs.residuals

        text = LANES.replace("FIRST", "reference").replace("SECOND", "reference")
        wanted = run(Plan.loads(text, share), "reference", {})
        whole = run(Plan.sequential(share, 32), "all-reduce", {})
        for batch, own, all_rows in zip(BATCHES, wanted, whole, strict=True):
            mine: Any = torch.zeros(batch.rows, dtype=torch.bool)
            for each in batch.nano_batches:
                mine[row_share(slice(each.start, each.end), rank, 2)] = True
            assert torch.equal(own, all_rows[mine]), "what all-reduces give"
        at_odds(rank)
        for number, (first, second) in enumerate(plans):
            plan = Plan.loads(LANES.replace("FIRST", first).replace("SECOND", second), share)
            found = run(plan, str(number), memory[number])
            assert all(map(torch.equal, found, wanted)), (first, second)

    on_ranks(2, rank_main)
    for each in memory:
        used = {name for name, pair in each.items() if pair[0][:4].view(torch.int32).item()}
        assert len(used) == 6 and all(pair[0].any() for name, pair in each.items() if name.startswith("buffer"))
