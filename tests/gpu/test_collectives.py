"""Collectives between GPUs: against float64 sums of fresh inputs, launched and replayed, ranks at odds in time.

Ranks are processes, two and four of them, each on a GPU of its own, or all on one.
"""

import os
import random
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nanoflow.ops.collectives import CTAS, AllGather, AllReduce, LayerAllGather
from nanoflow.ops.communicator import Communicator, TorchCommunicator
from nanoflow.ops.operation import NanoContext, Operation
from nanoflow.ops.peer_all_reduce import PEER_FORMS
from nanoflow.ops.peer_memory import PeerMemory
from nanoflow.ops.row_collectives import ReduceScatter, RowsAllGather
from nanoflow.ops.row_shares import row_share
from tests.gpu.sharing import environment, why_not, widest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ROWS, COLUMNS = 160, 1024
FORMS = ("copy_engine", "push")
"""Of collectives over rows, or columns; the others are `push` on other numbers of thread blocks."""
REPLAYS = 1000
SECONDS = 900
Check = Callable[[int, Communicator, str], None]


def run(
    op: Operation,
    kernel: str,
    buffers: dict[str, torch.Tensor],
    rows: int,
    communicator: Communicator,
    peers: PeerMemory | None = None,
    sms: int | None = None,
    places: PeerMemory | None = None,
    first: int = 0,
) -> None:
    """`op` on so many rows from `first` on."""
    own = slice(first, first + rows)
    part: Any = SimpleNamespace(rows=own, nano_batch_rows=(own,))
    nothing: Any = None
    ranks: Any = {"communicator": communicator, "peers": peers, "places": places}
    context = NanoContext(nothing, part, 0, buffers, {}, nothing, sms, **ranks)
    op.kernels[kernel](context)


def inputs(
    seed: int, ranks: int, device: torch.device, dtype: torch.dtype, rows: int = ROWS, columns: int = COLUMNS
) -> list[torch.Tensor]:
    """What every rank has, made on each of them."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, device=device).to(dtype) for _ in range(ranks)]


def captured(step: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of `step` on the current stream, which ran once before: kernels are compiled and loaded by then."""
    step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    step()
    graph.capture_end()
    return graph


def in_rank_order(each: list[torch.Tensor]) -> torch.Tensor:
    total = each[0].float()
    for part in each[1:]:
        total = total + part.float()
    return total.to(each[0].dtype)


def check_peer_form(rank: int, communicator: Communicator, device: torch.device, form: str) -> None:
    """A thousand replays of graphs of several sizes and types in a random order, some launched in their place, the
    ranks at odds in time: the bits of the sum in rank order, near the sum in float64.

    A graph has an odd number of all-reduces, two of them in a row on one memory: what counts must count on.
    """
    ranks = communicator.size
    op = AllReduce("sum", "x", COLUMNS, ranks)
    sizes = (ROWS, ROWS * 33, 1)
    peers = communicator.peer_memory(form, op.peer_room(form, max(sizes), 4))
    stream = torch.cuda.Stream(device)
    together, apart = random.Random(5), random.Random(rank)
    with torch.cuda.stream(stream):
        cases = []
        for rows in sizes:
            for dtype, sms in ((torch.bfloat16, None), (torch.float32, 8)):
                source = torch.zeros(rows, COLUMNS, dtype=dtype, device=device)
                outputs = [torch.zeros_like(source) for _ in range(3)]

                def step(
                    source: torch.Tensor = source, outputs: list[torch.Tensor] = outputs, sms: int | None = sms
                ) -> None:
                    for number, out in enumerate(outputs):
                        torch.mul(source, number + 1, out=out)
                        run(op, form, {"x": out}, len(out), communicator, peers, sms)

                cases.append((source, outputs, step, captured(step, stream)))
        for number in range(REPLAYS):
            source, outputs, step, graph = cases[together.randrange(len(cases))]
            each = inputs(number, ranks, device, source.dtype, len(source))
            source.copy_(each[rank])
            torch.cuda._sleep(apart.randrange(200_000))
            graph.replay() if together.random() < 0.9 else step()
            for times, out in enumerate(outputs, 1):
                parts = [part * times for part in each]
                assert torch.equal(out, in_rank_order(parts)), (form, number, times)
                exact = torch.stack(parts).double().sum(0)
                rounding = 2**-8 if out.dtype is torch.bfloat16 else 1e-5
                assert ((out.double() - exact).abs() <= rounding * exact.abs() + 1e-5).all(), (form, number, times)
        stream.synchronize()
        del cases, graph


def check_peer_forms_at_once(rank: int, communicator: Communicator, device: torch.device) -> None:
    """One of each form on streams of their own, launched in one order, delayed on either, products on the main one."""
    ranks = communicator.size
    op = AllReduce("sum", "x", COLUMNS, ranks)
    memories = {form: communicator.peer_memory(f"at once {form}", op.peer_room(form, ROWS, 4)) for form in PEER_FORMS}
    streams = {form: torch.cuda.Stream(device) for form in PEER_FORMS}
    drawn = random.Random(20 + rank)
    product = torch.zeros(4096, 4096, dtype=torch.bfloat16, device=device)
    for number in range(200):
        results = []
        torch.mm(product, product)
        for lane, form in enumerate(PEER_FORMS):
            with torch.cuda.stream(streams[form]):
                each = inputs(3 * number + lane, ranks, device, torch.float32)
                torch.cuda._sleep(drawn.randrange(100_000))
                x = each[rank].clone()
                run(op, form, {"x": x}, ROWS, communicator, memories[form])
                results.append((x, in_rank_order(each)))
        torch.cuda.synchronize(device)
        assert all(torch.equal(x, expected) for x, expected in results), number


def check_all_reduce(rank: int, communicator: Communicator, device: torch.device, kernel: str) -> None:
    """A thousand replays of a graph on fresh inputs, each begun by the ranks at another time."""
    ranks = communicator.size
    op = AllReduce("sum", "x", COLUMNS, ranks)
    source = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    x = torch.zeros_like(source)

    def step() -> None:
        x.copy_(source)
        run(op, kernel, {"x": x}, ROWS, communicator)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        graph = captured(step, stream)
        drawn = random.Random(rank)
        for number in range(REPLAYS):
            each = inputs(number, ranks, device, torch.bfloat16)
            source.copy_(each[rank])
            torch.cuda._sleep(drawn.randrange(200_000))
            graph.replay() if number % 10 else step()
            expected = torch.stack(each).double().sum(0)
            # Rounded once to bfloat16, or by a library on the way of each further part too.
            largest = torch.stack(each).double().abs().sum(0)
            assert ((x.double() - expected).abs() <= 2**-8 * ranks * largest).all(), (kernel, number)
            if number % 50 == 0:
                bits = x.view(torch.int16).view(torch.uint8)
                of_all = bits.new_empty(ranks, *bits.shape)
                communicator.all_gather(bits, of_all)
                assert all(torch.equal(of_all[0], other) for other in of_all[1:]), (kernel, number)
        stream.synchronize()
        del graph


def check_all_gather(rank: int, communicator: Communicator, device: torch.device) -> None:
    ranks = communicator.size
    op = AllGather("all", "share", "gathered", "logits", COLUMNS, ranks * COLUMNS - 3, ranks)
    for rows in (1, 7, ROWS):
        each = inputs(rows, ranks, device, torch.float32)
        buffers = {
            "share": each[rank],
            "gathered": torch.zeros(ROWS, ranks * COLUMNS, device=device),
            "logits": torch.zeros(ROWS, ranks * COLUMNS - 3, device=device),
        }
        run(op, "nccl", buffers, rows, communicator)
        assert torch.equal(buffers["logits"][:rows], torch.cat(each, 1)[:rows, :-3])
        assert not buffers["logits"][rows:].any()


def check_rows(rank: int, communicator: Communicator, device: torch.device, kernel: str, *, gather: bool) -> None:
    """A thousand replays of reduce-scatters or all-gathers of rows, as `check_peer_form` has all-reduces; also where
    rows do not divide, and where ranks have none.

    In an all-gather each rank reads all rows before the next one, which others may have come to long before.
    """
    ranks = communicator.size
    op = (RowsAllGather if gather else ReduceScatter)("rows", "x", COLUMNS, ranks)
    sizes = (ROWS, ROWS * 33 + 1, 1)
    name = f"{kernel} {'gather' if gather else 'scatter'}"
    used = communicator.twin(name, CTAS[kernel]) if kernel in CTAS else communicator
    room = op.peer_room(kernel, max(sizes), 4)
    peers = None if room is None else communicator.peer_memory(name, room)
    places = None
    if op.peer_buffer(kernel):
        places = communicator.peer_memory(f"places {name}", max(sizes) * COLUMNS * 4)
    stream = torch.cuda.Stream(device)
    together, apart = random.Random(6), random.Random(rank)
    with torch.cuda.stream(stream):
        cases = []
        for rows in sizes:
            own = row_share(slice(0, rows), rank, ranks)
            for dtype, sms in ((torch.bfloat16, None), (torch.float32, 8)):
                source = torch.zeros(rows, COLUMNS, dtype=dtype, device=device)
                x = torch.zeros_like(source)
                if places is not None:
                    x = places.data(rank, 0, rows * COLUMNS, dtype).view(rows, COLUMNS)
                outputs = [torch.zeros_like(source) for _ in range(3)]

                def step(
                    source: torch.Tensor = source,
                    x: torch.Tensor = x,
                    outputs: list[torch.Tensor] = outputs,
                    mine: slice = own if gather else slice(0, rows),
                    sms: int | None = sms,
                ) -> None:
                    for number, out in enumerate(outputs):
                        torch.mul(source[mine], number + 1, out=x[mine])
                        run(op, kernel, {"x": x}, len(x), used, peers, sms, places)
                        out.copy_(x)

                cases.append((source, own, outputs, step, captured(step, stream)))
        for number in range(REPLAYS):
            source, own, outputs, step, graph = cases[together.randrange(len(cases))]
            each = inputs(number, ranks, device, source.dtype, len(source))
            source.copy_(each[rank])
            torch.cuda._sleep(apart.randrange(200_000))
            graph.replay() if together.random() < 0.9 else step()
            for times, out in enumerate(outputs, 1):
                parts = [part * times for part in each]
                if gather:
                    shares = [row_share(slice(0, len(source)), other, ranks) for other in range(ranks)]
                    expected = torch.cat([part[share] for part, share in zip(parts, shares, strict=True)])
                    assert torch.equal(out, expected), (name, number, times)
                    continue
                if peers is not None:
                    assert torch.equal(out[own], in_rank_order(parts)[own]), (name, number, times)
                exact, largest = (torch.stack(p).double().sum(0)[own] for p in (parts, [p.abs() for p in parts]))
                rounding = 2**-8 * ranks if out.dtype is torch.bfloat16 else 1e-5
                assert ((out[own].double() - exact).abs() <= rounding * largest + 1e-5).all(), (name, number, times)
        stream.synchronize()
        del cases, graph


def check_columns(rank: int, communicator: Communicator, device: torch.device, kernel: str) -> None:
    """A thousand replays of all-gathers of columns, as `check_rows` has those of rows; also in the middle of a buffer,
    and of columns that end in the middle of 16 bytes."""
    ranks = communicator.size
    used = communicator.twin(f"columns {kernel}", CTAS[kernel]) if kernel in CTAS else communicator
    sizes = ((ROWS, 0, COLUMNS), (ROWS * 33 + 1, 3, COLUMNS), (1, 5, COLUMNS), (77, 1, 37))
    room = max((first + rows) * columns for rows, first, columns in sizes) * ranks * 4
    ops = {columns: LayerAllGather("all", "source", "gathered", "target", columns, ranks) for *_, columns in sizes}
    peers = places = None
    reached = ops[COLUMNS].peer_buffer(kernel)
    if reached is not None:
        peers = communicator.peer_memory(f"columns {kernel}", ops[COLUMNS].peer_room(kernel, ROWS, 4))
        places = communicator.peer_memory(f"places of columns {kernel}", room)
    stream = torch.cuda.Stream(device)
    together, apart = random.Random(7), random.Random(rank)
    with torch.cuda.stream(stream):
        cases = []
        for rows, first, columns in sizes:
            for dtype, sms in ((torch.bfloat16, None), (torch.float32, 8)):
                source = torch.zeros(rows, columns, dtype=dtype, device=device)
                whole = first + rows
                buffers = {
                    name: torch.zeros(whole, count * columns, dtype=dtype, device=device)
                    for name, count in (("source", 1), ("gathered", ranks), ("target", ranks))
                }
                if places is not None and reached is not None:
                    data = places.data(rank, 0, buffers[reached].numel(), dtype)
                    buffers[reached] = data.view(buffers[reached].shape)
                outputs = [torch.zeros(rows, ranks * columns, dtype=dtype, device=device) for _ in range(3)]

                def step(
                    op: LayerAllGather = ops[columns],
                    source: torch.Tensor = source,
                    buffers: dict[str, torch.Tensor] = buffers,
                    outputs: list[torch.Tensor] = outputs,
                    first: int = first,
                    sms: int | None = sms,
                ) -> None:
                    for number, out in enumerate(outputs):
                        torch.mul(source, number + 1, out=buffers["source"][first:])
                        run(op, kernel, buffers, len(source), used, peers, sms, places, first)
                        out.copy_(buffers["target"][first:])

                cases.append((source, outputs, step, captured(step, stream)))
        for number in range(REPLAYS):
            source, outputs, step, graph = cases[together.randrange(len(cases))]
            each = inputs(number, ranks, device, source.dtype, *source.shape)
            source.copy_(each[rank])
            torch.cuda._sleep(apart.randrange(200_000))
            graph.replay() if together.random() < 0.9 else step()
            for times, out in enumerate(outputs, 1):
                assert torch.equal(out, torch.cat(each, 1) * times), (kernel, number, times)
        stream.synchronize()
        del cases, graph


def check_two_at_once(rank: int, communicator: Communicator, device: torch.device) -> None:
    """Communicators of two lanes, on two streams, launched in one order, delayed on either."""
    twins = [communicator.twin("one"), communicator.twin("two", 4)]
    streams = [torch.cuda.Stream(device) for _ in twins]
    drawn = random.Random(10 + rank)
    for number in range(200):
        buffers = []
        for lane, (twin, stream) in enumerate(zip(twins, streams, strict=True)):
            with torch.cuda.stream(stream):
                each = inputs(2 * number + lane, communicator.size, device, torch.float32)
                torch.cuda._sleep(drawn.randrange(100_000))
                x = each[rank].clone()
                twin.all_reduce(x)
                buffers.append((x, torch.stack(each).double().sum(0)))
        for stream in streams:
            stream.synchronize()
        assert all(torch.allclose(x.double(), expected, atol=1e-6) for x, expected in buffers)


def check_a_kernel_gives_up(rank: int, communicator: Communicator, device: torch.device) -> None:
    """One rank does not come: the others' kernels end with an error, after which their devices do nothing more."""
    op = AllReduce("sum", "x", COLUMNS, communicator.size)
    peers = communicator.peer_memory("given up", op.peer_room("two_shot", ROWS, 4))
    peers.timeout = 1.0
    x = torch.ones(ROWS, COLUMNS, device=device)
    torch.cuda.synchronize(device)
    if rank == 0:
        time.sleep(10)  # it stays, so that its memory does
        os._exit(0)  # on a GPU of both ranks its kernels fail too
    began = time.monotonic()
    run(op, "two_shot", {"x": x}, ROWS, communicator, peers)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.cuda.synchronize(device)
    assert time.monotonic() - began > 1.0
    os._exit(0)  # what is left of the device's context cannot be put away


def checks(rank: int, communicator: Communicator, most_blocks: str) -> None:
    """Every check, in the same order on all ranks."""
    device = torch.device("cuda", torch.cuda.current_device())
    for kernel in ("nccl", "nccl_8", "reference"):
        used = communicator.twin(kernel, 8) if kernel == "nccl_8" else communicator
        check_all_reduce(rank, used, device, kernel)
    for form in PEER_FORMS:
        check_peer_form(rank, communicator, device, form)
    check_peer_forms_at_once(rank, communicator, device)
    for kernel in ("reference", "nccl", "nccl_8", *FORMS, most_blocks):
        for gather in (False, True):
            check_rows(rank, communicator, device, kernel, gather=gather)
        check_columns(rank, communicator, device, kernel)
    check_all_gather(rank, communicator, device)
    check_two_at_once(rank, communicator, device)
    token = torch.tensor([rank + 5], device=device)
    communicator.broadcast(token)
    assert token.item() == 5
    torch.cuda.synchronize(device)
    check_a_kernel_gives_up(rank, communicator, device)


def rank_main(rank: int, port: int, ranks: int, function: Check, most_blocks: str) -> None:
    from torch.distributed import TCPStore

    torch.cuda.set_device(rank)
    device = torch.device("cuda", torch.cuda.current_device())
    store = TCPStore("127.0.0.1", port, ranks, rank == 0, timedelta(seconds=60))
    communicator = TorchCommunicator(store, rank, ranks, device, timeout=60.0)
    function(rank, communicator, most_blocks)
    torch.cuda.synchronize(device)
    communicator.close()


def on_gpus(ranks: int, function: Check) -> None:
    """Run `function`, a module's own, of every rank in a process of its own, with the form on most thread blocks."""
    if reason := why_not(ranks):
        pytest.skip(reason)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with patch.dict(os.environ, environment()):
        processes = torch.multiprocessing.spawn(  # type: ignore[attr-defined]
            rank_main, args=(port, ranks, function, widest(ranks)), nprocs=ranks, join=False
        )
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, f"the ranks still ran after {SECONDS} s"
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_between_gpus(ranks: int) -> None:
    on_gpus(ranks, checks)
