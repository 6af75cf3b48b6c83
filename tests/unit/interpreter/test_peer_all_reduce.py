"""All-reduces between peers: several processes on memory that they share, each running the kernels in the interpreter.

The processes are at odds: before and after every flag, and between the kernels of a form, each sleeps for a random
while. What one of them overwrites too early, or reads too early, comes out wrong.
"""

import mmap
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from nanoflow.ops import all_reduce_triton, peer_all_reduce as forms
from nanoflow.ops.peer_all_reduce import PEER_FORMS, peer_room
from nanoflow.ops.peer_memory import FLAGS, PeerMemory, data_begin
from nanoflow.pipeline.plan import Plan
from tests.unit.interpreter.peer_runs import PAGES, RankRuns
from tests.unit.ops_harness import Piece, dense_batch
from tests.unit.rank_models import save

SECONDS = 120
"""Until processes that wait for each other are given up, on any machine."""
TILE = (64, 1)
"""Small, so that a few elements are several tiles of several programs."""


def shared(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that a fork has at the same address."""
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)


def blocks(ranks: int, room: int) -> list[torch.Tensor]:
    return [shared(data_begin(ranks) + room, torch.uint8) for _ in range(ranks)]


def on_ranks(ranks: int, function: Callable[[int], None]) -> None:
    """Run `function` of every rank in a process of its own; none outlives the call."""
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                function(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(pid)
    end = time.monotonic() + SECONDS
    left = dict.fromkeys(children)
    try:
        while left:
            for pid in list(left):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del left[pid]
                    assert status == 0, "a rank failed"
            assert time.monotonic() < end, f"ranks still wait for each other after {SECONDS} s"
            time.sleep(0.005)
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def at_odds(rank: int) -> None:
    """From now on, this process sleeps for random whiles where the order between ranks matters, and tiles are so small
    that a few rows are several of them."""
    drawn = random.Random(rank)

    def late(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            if drawn.random() < 0.3:
                time.sleep(drawn.random() * 0.002)
            result = function(*arguments, **named)
            if drawn.random() < 0.3:
                time.sleep(drawn.random() * 0.002)
            return result

        return called

    builder = interpreter.InterpreterBuilder
    builder.create_atomic_rmw = late(builder.create_atomic_rmw)
    for name in ("meet", "add_arrived", "wait_for_readers"):
        setattr(all_reduce_triton, name, late(getattr(all_reduce_triton, name)))
    all_reduce_triton.LARGE = all_reduce_triton.SMALL = TILE


def parts(ranks: int, step: int, dtype: torch.dtype, size: int) -> list[torch.Tensor]:
    """What every rank has: terms that cancel, so that another order, or rounding in between, gives other bits."""
    generator = torch.Generator().manual_seed(step)
    scales = 10 ** torch.randint(-3, 3, (ranks, size), generator=generator)
    return list((torch.randn(ranks, size, generator=generator) * scales).to(dtype))


def expected(each: list[torch.Tensor]) -> torch.Tensor:
    total = each[0].float()
    for part in each[1:]:
        total = total + part.float()
    return total.to(each[0].dtype)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("form", PEER_FORMS)
def test_sums_in_rank_order_whoever_is_late(form: str, ranks: int) -> None:
    """Also where shares are uneven or empty, and where sizes, programs and types change from one to the next."""
    largest = 777
    memory = blocks(ranks, peer_room(form, largest, ranks, 4))
    drawn = random.Random(ranks)
    steps = [(drawn.choice([1, 130, 256, 500, largest]), drawn.choice([1, 2, 3])) for _ in range(9)]

    def rank_main(rank: int) -> None:
        at_odds(rank)
        peers = PeerMemory(rank, memory, 60.0)
        for step, (size, sms) in enumerate(steps):
            each = parts(ranks, step, (torch.float32, torch.float16)[step % 2], size)
            x = each[rank].clone()
            forms.peer_all_reduce(form, x, peers, sms)
            assert torch.equal(x, expected(each)), (form, rank, step)

    on_ranks(ranks, rank_main)
    kernels = 2 if form == "copy_engine" and ranks > 2 else 1
    for block in memory:
        numbers = block[: 4 * FLAGS].view(torch.int32)
        told = len(steps) * kernels if form == "copy_engine" and ranks == 2 else 0
        assert numbers.tolist() == [len(steps) * kernels, 0, told] + [0] * (FLAGS - 3), (
            "counted, and nothing left behind"
        )


@pytest.mark.parametrize("form", PEER_FORMS)
def test_numbers_wrap_around(form: str) -> None:
    size = 300
    memory = blocks(2, peer_room(form, size, 2, 4))
    for block in memory:
        begin = data_begin(2)
        block[:4].view(torch.int32).fill_(2**31 - 3)
        block[4 * FLAGS : begin].view(torch.int32).fill_(2**31 - 3)

    def rank_main(rank: int) -> None:
        at_odds(rank)
        peers = PeerMemory(rank, memory, 60.0)
        for step in range(5):
            each = parts(2, step, torch.float32, size)
            x = each[rank].clone()
            forms.peer_all_reduce(form, x, peers, 2)
            assert torch.equal(x, expected(each)), (form, rank, step)

    on_ranks(2, rank_main)
    assert memory[0][:4].view(torch.int32).item() == -(2**31) + 2


def test_too_little_memory_is_refused() -> None:
    peers = PeerMemory(0, [torch.zeros(data_begin(2) + 1024, dtype=torch.uint8) for _ in range(2)], 60.0)
    with pytest.raises(ValueError, match="one_shot of 300 elements needs 6144 bytes of peer memory, and has 1024"):
        forms.peer_all_reduce("one_shot", torch.zeros(300), peers, None)


LANES = """
capacity: 32
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, rows: 16}}
kernels: {o_all_reduce: FIRST, down_all_reduce: SECOND}
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      add_norm.a, gate_up.a, down.a, add_norm.b, gate_up.b, down.b]
    one: [o_all_reduce.a, o_all_reduce.b, down_all_reduce.a]
    two: [down_all_reduce.b]
"""


def test_plans_give_the_bits_of_the_reference(tmp_path: Path) -> None:
    """Whole iterations of two ranks, the forms on two lanes whose nano-ops run in random orders."""
    batches = [
        dense_batch([[Piece(0, 0, range(20, 31))], [Piece(1, 0, range(7))]], PAGES, padding=1),
        dense_batch([[Piece(0, 11, [77], decode=True)], [Piece(1, 7, [8, 9, 10])]], PAGES, padding=1),
        dense_batch([[Piece(0, 12, [78], decode=True)], [Piece(1, 10, [11], decode=True)]], PAGES),
    ]
    (tmp_path / "model").mkdir()
    save(tmp_path / "model")
    plans = [("copy_engine", "two_shot"), ("one_shot", "copy_engine"), ("two_shot", "one_shot")]
    memory = [{f"{lane}-{form}": blocks(2, 2**18) for lane in ("one", "two") for form in PEER_FORMS} for _ in plans]

    def rank_main(rank: int) -> None:
        runs = RankRuns(rank, tmp_path)

        def residuals(first: str, second: str, name: str, memory: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
            plan = Plan.loads(LANES.replace("FIRST", first).replace("SECOND", second), runs.graph)
            return runs.residuals(plan, name, memory, batches)

        expected = residuals("reference", "reference", "reference", {})
        at_odds(rank)
        for number, (first, second) in enumerate(plans):
            found = residuals(first, second, str(number), memory[number])
            assert all(map(torch.equal, found, expected)), (first, second)

    on_ranks(2, rank_main)
    used = [name for each in memory for name, pair in each.items() if pair[0][:4].view(torch.int32).item()]
    assert sorted(used) == sorted(
        [
            "one-copy_engine",
            "one-two_shot",
            "two-two_shot",
            "one-one_shot",
            "one-copy_engine",
            "two-copy_engine",
            "one-two_shot",
            "one-one_shot",
            "two-one_shot",
        ]
    )
