"""All-gather of columns between peers, as `test_peer_rows` has collectives over rows: several processes on memory that
they share, at odds in time, each running the kernels in the interpreter."""

import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoflow.ops import columns_triton
from nanoflow.ops.collectives import LayerAllGather
from nanoflow.ops.operation import NanoContext
from nanoflow.ops.peer_memory import FLAGS, PeerMemory
from nanoflow.ops.row_sharding import ALL_GATHER
from nanoflow.pipeline.plan import Plan
from tests.unit.interpreter.peer_runs import RankRuns
from tests.unit.interpreter.test_peer_all_reduce import TILE, at_odds, blocks, on_ranks
from tests.unit.rank_models import save

FORMS = ("copy_engine", "push")
COLUMNS, ROWS = (24, 8, 5), 21
"""Also such columns as end in the middle of 16 bytes."""
DTYPES = (torch.float32, torch.float16)


def late(rank: int) -> None:
    """`at_odds`, also with the kernel that puts shares side by side, which has small tiles."""
    at_odds(rank)
    drawn, kernel = random.Random(rank), columns_triton.side_by_side

    def called(*arguments: Any) -> None:
        time.sleep(drawn.random() * 0.002)
        kernel(*arguments, block=TILE[0])
        time.sleep(drawn.random() * 0.002)

    columns_triton.side_by_side = called  # type: ignore[assignment]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_columns_come_side_by_side_whoever_is_late(form: str, ranks: int) -> None:
    """What a rank reads of the old rows before it comes to the next all-gather is not written over, nor are other
    nano-batches' rows."""
    memory, flags = blocks(ranks, 2 * ROWS * ranks * max(COLUMNS) * 4), blocks(ranks, 0)
    together = random.Random(ranks)
    steps = [
        (together.choice([0, 1, 2, 7, ROWS]), together.choice(COLUMNS), together.choice([1, 2, 3])) for _ in range(9)
    ]
    steps += [(ROWS, columns, 2) for columns in COLUMNS]

    def rank_main(rank: int) -> None:
        late(rank)
        apart = random.Random(rank)
        peers, places = PeerMemory(rank, flags, 60.0), PeerMemory(rank, memory, 60.0)
        for step, (rows, columns, sms) in enumerate(steps):
            dtype, first = DTYPES[step % 2], (0, 1, ROWS)[step % 3]
            op = LayerAllGather("gather", "source", "gathered", "target", columns, ranks)
            generator = torch.Generator().manual_seed(step)
            each = torch.randn(ranks, 2 * ROWS, columns, generator=generator).to(dtype)
            shape = 2 * ROWS, ranks * columns
            buffers = {name: torch.zeros(shape, dtype=dtype) for name in ("gathered", "target")}
            buffers["source"] = each[rank]
            reached = places.data(rank, 0, shape[0] * shape[1], dtype).view(shape)
            buffers[str(op.peer_buffer(form))] = reached
            before = {name: buffer.clone() for name, buffer in buffers.items()}
            for _ in range(apart.randrange(5)):  # others may have come: they wait for this rank
                assert torch.equal(reached.view(torch.uint8), before[str(op.peer_buffer(form))].view(torch.uint8))
            part: Any = SimpleNamespace(rows=slice(first, first + rows))
            nothing: Any = None
            op.kernels[form](NanoContext(nothing, part, 0, buffers, {}, nothing, sms, peers=peers, places=places))
            expected = before["target"]
            expected[part.rows] = torch.cat(list(each[:, part.rows]), 1)
            assert torch.equal(buffers["target"].view(torch.uint8), expected.view(torch.uint8)), (form, rank, step)
            outside = torch.ones(shape[0], dtype=torch.bool)
            outside[part.rows] = False
            gathered = (buffers["gathered"][outside], before["gathered"][outside])
            assert torch.equal(*(rows.view(torch.uint8) for rows in gathered)), (form, rank, step)

    on_ranks(ranks, rank_main)
    kernels = sum(rows > 0 for rows, *_ in steps) * (2 if form == "copy_engine" else 1)
    for block in flags:
        numbers = block[: 4 * FLAGS].view(torch.int32)
        assert numbers.tolist() == [kernels] + [0] * (FLAGS - 1), "counted, and nothing left behind"


def test_without_memory_that_all_ranks_reach_it_is_refused() -> None:
    op = LayerAllGather("o_all_gather", "share", "gathered", "o", 4, 2)
    nothing: Any = None
    part: Any = SimpleNamespace(rows=slice(0, 2))
    buffers = {"share": torch.zeros(2, 4), "gathered": torch.zeros(2, 8), "o": torch.zeros(2, 8)}
    context = NanoContext(nothing, part, 0, buffers, {}, nothing, peers=PeerMemory(0, blocks(2, 0), 1.0))
    for form, value in (("push", "o"), ("copy_engine", "gathered")):
        with pytest.raises(ValueError, match=f"o_all_gather needs {value} in memory that all ranks reach"):
            op.kernels[form](context)


LANES = """
sharding: all_gather
capacity: 32
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, rows: 16}}
kernels: {attention_all_gather: FIRST, o_all_gather: SECOND, down_all_reduce: THIRD}
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, qkv.b, decode_attention.b, prefill_attention.b, o.a, o.b,
      add_norm.a, gate_up.a, down.a, add_norm.b, gate_up.b, down.b]
    one: ONE
    two: TWO
"""
CUT = LANES.replace("ONE", "[attention_all_gather.a, o_all_gather.b, down_all_reduce.a]").replace(
    "TWO", "[attention_all_gather.b, o_all_gather.a, down_all_reduce.b]"
)
WHOLE = LANES.replace("ONE", "[attention_all_gather, down_all_reduce.b]").replace(
    "TWO", "[o_all_gather, down_all_reduce.a]"
)
"""The all-gathers of both nano-batches at once."""


def test_plans_give_the_bits_of_the_reference(tmp_path: Path) -> None:
    """Whole iterations of two ranks, the forms on two lanes whose nano-ops run in random orders."""
    (tmp_path / "model").mkdir()
    save(tmp_path / "model")
    reference = ("reference", "reference", "reference")
    plans = [
        (CUT, ("copy_engine", "push", "copy_engine")),
        (CUT, ("push", "copy_engine", "two_shot")),
        (CUT, ("push", "push", "reference")),
        (WHOLE, ("push", "copy_engine", "reference")),
    ]
    names = [f"{lane}-{form}" for lane in ("one", "two") for form in ("copy_engine", "two_shot")]
    names += [f"{lane}-{form}-columns" for lane in ("one", "two") for form in FORMS]
    names += [f"buffer-{value}" for value in ("attention_all", "attention_gathered", "o", "o_share_gathered")]
    memory = [{name: blocks(2, 2**17) for name in names} for _ in plans]

    def rank_main(rank: int) -> None:
        runs = RankRuns(rank, tmp_path, ALL_GATHER)

        def residuals(
            text: str, kernels: tuple[str, str, str], name: str, memory: dict[str, list[torch.Tensor]]
        ) -> list[torch.Tensor]:
            for place, kernel in zip(("FIRST", "SECOND", "THIRD"), kernels, strict=True):
                text = text.replace(place, kernel)
            return runs.residuals(Plan.loads(text, runs.graph), name, memory)

        expected = residuals(CUT, reference, "reference", {})
        late(rank)
        for number, (text, kernels) in enumerate(plans):
            found = residuals(text, kernels, str(number), memory[number])
            assert all(map(torch.equal, found, expected)), kernels

    on_ranks(2, rank_main)
    used = [{name for name, (own, _) in each.items() if own.any()} for each in memory]
    both = {"one", "two"}
    assert used == [
        {f"{lane}-{form}" for lane in both for form in ("copy_engine-columns", "push-columns", "copy_engine")}
        | {"buffer-attention_gathered", "buffer-o"},
        {f"{lane}-{form}" for lane in both for form in ("push-columns", "copy_engine-columns", "two_shot")}
        | {"buffer-attention_all", "buffer-o_share_gathered"},
        {"one-push-columns", "two-push-columns", "buffer-attention_all", "buffer-o"},
        {"one-push-columns", "two-copy_engine-columns", "buffer-attention_all", "buffer-o_share_gathered"},
    ]
