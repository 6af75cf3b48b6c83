"""Collectives between GPUs: against float64 sums of fresh inputs, launched and replayed, ranks at odds in time.

A process for each of two GPUs; skipped with fewer.
"""

import random
import socket
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoflow.ops.collectives import AllGather, AllReduce
from nanoflow.ops.communicator import Communicator, TorchCommunicator
from nanoflow.ops.operation import NanoContext, Operation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
RANKS, ROWS, COLUMNS = 2, 160, 1024
REPLAYS = 1000
SECONDS = 240


def run(op: Operation, kernel: str, buffers: dict[str, torch.Tensor], rows: int, communicator: Communicator) -> None:
    part: Any = SimpleNamespace(rows=slice(0, rows))
    nothing: Any = None
    op.kernels[kernel](NanoContext(nothing, part, 0, buffers, {}, nothing, communicator=communicator))


def inputs(seed: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """What every rank has, made on each of them."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(ROWS, COLUMNS, generator=generator, device=device).to(dtype) for _ in range(RANKS)]


def check_all_reduce(rank: int, communicator: Communicator, device: torch.device, kernel: str) -> None:
    """A thousand replays of a graph on fresh inputs, each begun by the ranks at another time."""
    op = AllReduce("sum", "x", COLUMNS, RANKS)
    source = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    x = torch.zeros_like(source)

    def step() -> None:
        x.copy_(source)
        run(op, kernel, {"x": x}, ROWS, communicator)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        step()  # kernels are loaded before the capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        step()
        graph.capture_end()
        drawn = random.Random(rank)
        for number in range(REPLAYS):
            each = inputs(number, device, torch.bfloat16)
            source.copy_(each[rank])
            torch.cuda._sleep(drawn.randrange(200_000))
            graph.replay() if number % 10 else step()
            expected = torch.stack(each).double().sum(0)
            # Two bfloat16 numbers added exactly and rounded once, or once more on the way of a third.
            assert ((x.double() - expected).abs() <= 2**-7 * expected.abs() + 1e-6).all(), (kernel, number)
            if number % 50 == 0:
                bits = x.view(torch.int16).view(torch.uint8)
                of_all = bits.new_empty(RANKS, *bits.shape)
                communicator.all_gather(bits, of_all)
                assert all(torch.equal(of_all[0], other) for other in of_all[1:]), (kernel, number)
        stream.synchronize()
        del graph


def check_all_gather(rank: int, communicator: Communicator, device: torch.device) -> None:
    op = AllGather("all", "share", "gathered", "logits", COLUMNS, RANKS * COLUMNS - 3, RANKS)
    for rows in (1, 7, ROWS):
        each = inputs(rows, device, torch.float32)
        buffers = {
            "share": each[rank],
            "gathered": torch.zeros(ROWS, RANKS * COLUMNS, device=device),
            "logits": torch.zeros(ROWS, RANKS * COLUMNS - 3, device=device),
        }
        run(op, "nccl", buffers, rows, communicator)
        assert torch.equal(buffers["logits"][:rows], torch.cat(each, 1)[:rows, :-3])
        assert not buffers["logits"][rows:].any()


def check_two_at_once(rank: int, communicator: Communicator, device: torch.device) -> None:
    """Communicators of two lanes, on two streams, launched in one order, delayed on either."""
    twins = [communicator.twin("one"), communicator.twin("two", 4)]
    streams = [torch.cuda.Stream(device) for _ in twins]
    drawn = random.Random(10 + rank)
    for number in range(200):
        buffers = []
        for lane, (twin, stream) in enumerate(zip(twins, streams, strict=True)):
            with torch.cuda.stream(stream):
                each = inputs(2 * number + lane, device, torch.float32)
                torch.cuda._sleep(drawn.randrange(100_000))
                x = each[rank].clone()
                twin.all_reduce(x)
                buffers.append((x, torch.stack(each).double().sum(0)))
        for stream in streams:
            stream.synchronize()
        assert all(torch.allclose(x.double(), expected, atol=1e-6) for x, expected in buffers)


def rank_main(rank: int, port: int) -> None:
    """One rank: every check, in the same order on all."""
    from torch.distributed import TCPStore

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = TCPStore("127.0.0.1", port, RANKS, rank == 0, timedelta(seconds=60))
    communicator = TorchCommunicator(store, rank, RANKS, device, timeout=60.0)
    for kernel in ("nccl", "nccl_8", "reference"):
        used = communicator.twin(kernel, 8) if kernel == "nccl_8" else communicator
        check_all_reduce(rank, used, device, kernel)
    check_all_gather(rank, communicator, device)
    check_two_at_once(rank, communicator, device)
    token = torch.tensor([rank + 5], device=device)
    communicator.broadcast(token)
    assert token.item() == 5
    torch.cuda.synchronize(device)
    communicator.close()


def test_collectives_between_two_gpus() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = torch.multiprocessing.spawn(rank_main, args=(port,), nprocs=RANKS, join=False)  # type: ignore[attr-defined]
    end = time.monotonic() + SECONDS
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < end, f"the ranks still ran after {SECONDS} s"
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
