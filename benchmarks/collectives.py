"""Collectives between the GPUs of one host: forms of the all-reduce by bytes, alone and beside products; and forms of
what sends half of its bytes, alone: the reduce-scatter and the all-gather of rows, and the all-gather of columns.

    python -m benchmarks.collectives                   # benchmarks/results/collectives.json; on all GPUs of the machine
    python -m benchmarks.collectives --ranks 2 --mib 16
    python -m benchmarks.collectives --device cpu      # a trial of everything but the GPUs, with small buffers

`alone`: milliseconds of an all-reduce of a bfloat16 buffer, in a CUDA graph of several in a row, hot, all forms in
turn. `GB/s` is what a rank sends in a form that sends 2 (N - 1) / N of the buffer, for all forms alike, so that they
compare.

`halves`: the same of reduce-scatters and all-gathers of rows, and of all-gathers of columns; there `GB/s` is
(N - 1) / N of the buffer.

`between`: what stands between two products, whose partial sums become the next one's normed input: `all_reduce`, then
residual sum and norm of all rows; `apart`, reduce-scatter, sum and norm of a rank's rows, all-gather; and `fused`, the
same in one operation. `GB/s` as for `alone`.

`beside`: the four products of a layer of Llama-3-70B, split over the ranks, of one nano-batch, beside the two
all-reduces of another's layer, as plans with a network lane have them. Ways: in sequence; on two plain streams; and,
where SMs can be set apart, on parts of them (the last part is the network's). An all-reduce begins with a pair of
products, and the next pair waits for both. `ratio` is the time in sequence, with the form that is fastest there, over
the time of the way; `products` has no all-reduces.

Every rank runs the same in the same order, as many times. What is recorded is the slowest rank's median.
"""

import argparse
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from math import ceil, log2
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.collective_forms import Between, Forms, Halves
from benchmarks.kernels.__main__ import machine
from nanoflow.ops.communicator import TorchCommunicator
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.gemm import matmul
from nanoflow.pipeline.partitions import Partition, PartitionError

RESULTS = Path(__file__).parent / "results" / "collectives.json"
MIB = (1, 2, 4, 8, 16, 32, 64)
PARTS = ("alone", "halves", "between", "beside")
HIDDEN, FEED_FORWARD, QKV = 8192, 28672, 10240
"""Llama-3-70B's columns; QKV are those of queries, keys and values together."""
NETWORK_SMS = (8, 16, 24)
ROUNDS = 9
SMALLEST = 2.0**-120
"""What the buffers hold at first: each all-reduce makes it N times as much, and random data stay random."""
DOUBLINGS = 224
"""That leave it finite in bfloat16."""
LAYERS = 4
"""Of the part with products, in one graph."""
SECONDS = 580


class Products:
    """The products of a layer's share on this rank, for `rows` rows."""

    def __init__(self, ranks: int, rows: int, device: torch.device, scale: int) -> None:
        shapes = {
            "qkv": (QKV // ranks, HIDDEN),
            "o": (HIDDEN, HIDDEN // ranks),
            "gate_up": (2 * FEED_FORWARD // ranks, HIDDEN),
            "down": (HIDDEN, FEED_FORWARD // ranks),
        }
        self.scratch = DeviceArrays(device)
        self.tensors = {}
        for name, (outputs, inputs) in shapes.items():
            outputs, inputs = max(8, outputs // scale), max(8, inputs // scale)
            x, w = (torch.randn(n, inputs, device=device, dtype=torch.bfloat16) for n in (rows, outputs))
            self.tensors[name] = x, w / inputs**0.5, x.new_empty(rows, outputs)

    def run(self, name: str, sms: int | None = None) -> None:
        x, w, out = self.tensors[name]
        matmul(x, w, out, sms=sms, scratch=self.scratch.kept)


def replayed(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A captured graph of `function`, warmed up; on a CPU the function."""
    function()
    if device.type != "cuda":
        return function
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


def milliseconds(ways: dict[str, Callable[[], None]], times: int, buffers: Sequence[torch.Tensor]) -> dict[str, float]:
    """Median of a call of each, in turn, `times` calls at once; the same calls on every rank."""
    device = buffers[0].device
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 2):  # the first two warm up
        for name, way in ways.items():
            for buffer in buffers:
                buffer.normal_(std=SMALLEST)
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                way()  # the ranks fall into step
                begin.record()
                for _ in range(times):
                    way()
                end.record()
                end.synchronize()
                found[name].append(begin.elapsed_time(end) / times)
            else:
                began = time.perf_counter()
                for _ in range(times):
                    way()
                found[name].append((time.perf_counter() - began) * 1e3 / times)
    return {name: median(values[2:]) for name, values in found.items()}


def alone(forms: Forms | Halves | Between, buffer: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a collective on `buffer` in each form."""
    in_a_row = 8

    def several(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(in_a_row):
                forms.run(name, buffer)

        return run

    graphs = {name: replayed(several(name), forms.device) for name in forms.names}
    most = DOUBLINGS // (in_a_row * ceil(log2(forms.op.ranks))) - 1
    times = min(most, max(2, 2**28 // buffer.nbytes // in_a_row)) if forms.device.type == "cuda" else 1
    return {name: took / in_a_row for name, took in milliseconds(graphs, times, [buffer]).items()}


def beside(forms: Forms, buffers: Sequence[torch.Tensor], products: Products) -> dict[str, dict[str, Any]]:
    """Milliseconds of a layer's products and two all-reduces: in sequence, and beside each other in several ways."""
    device = forms.device

    def layer(form: str | None, streams: Sequence[Any], sms: tuple[int | None, int | None]) -> None:
        """Each all-reduce beside a pair of products, or before it."""
        here = torch.cuda.current_stream(device) if streams else None
        for stream in streams:
            stream.wait_stream(here)
        on = [torch.cuda.stream(stream) for stream in streams] or [nullcontext(), nullcontext()]
        for pair, buffer in zip((("qkv", "o"), ("gate_up", "down")), buffers, strict=True):
            if form is not None:
                with on[1]:
                    forms.run(form, buffer, sms[1])
            with on[0]:
                for name in pair:
                    products.run(name, sms[0])
            if streams:
                for one, other in (streams, streams[::-1]):
                    one.wait_stream(other)
        for stream in streams:
            assert here is not None
            here.wait_stream(stream)

    def way(
        form: str | None, streams: Sequence[Any] = (), sms: tuple[int | None, int | None] = (None, None)
    ) -> Callable[[], None]:
        def run() -> None:
            for _ in range(LAYERS):
                layer(form, streams, sms)

        return replayed(run, device)

    ways = {"products": way(None), **{f"{form}, in sequence": way(form) for form in forms.names}}
    partitions = []
    if device.type == "cuda":
        plain = torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1)
        ways |= {f"{form}, two streams": way(form, plain) for form in forms.names}
        total = torch.cuda.get_device_properties(device).multi_processor_count
        for sms in NETWORK_SMS:
            try:
                partition = Partition((total - sms, sms), device)
            except PartitionError as error:
                forms.missing[f"{total - sms}/{sms} SMs"] = str(error)
                continue
            partitions.append(partition)
            for form in forms.names:
                ways[f"{form}, {total - sms}/{sms} SMs"] = way(form, partition.streams, (total - sms, sms))
    times = 5 if device.type == "cuda" else 1
    found = {name: took / LAYERS for name, took in milliseconds(ways, times, buffers).items()}
    del ways
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for partition in partitions:
        partition.close()
    base = min(took for name, took in found.items() if name.endswith("in sequence"))
    return {name: {"milliseconds": took, "ratio": base / took} for name, took in found.items()}


def measure(
    rank: int, ranks: int, store: Any, device: torch.device, mib: Sequence[int], with_products: Sequence[int]
) -> dict[str, Any]:
    """What one rank measures; every rank calls it. `with_products` are the sizes that `beside` is for."""
    scale = 1 if device.type == "cuda" else 256
    columns = HIDDEN // scale
    rows = [size * 2**20 // (2 * HIDDEN) // (1 if device.type == "cuda" else 16) for size in mib]
    communicator = TorchCommunicator(store, rank, ranks, device)
    record: dict[str, Any] = {part: {} for part in PARTS}
    with torch.inference_mode():
        forms = Forms(communicator, device, columns, max(rows))
        halves = Halves(communicator, device, columns, max(rows))
        between = Between(communicator, device, columns, max(rows))
        buffers = [torch.zeros(max(rows), columns, dtype=forms.dtype, device=device) for _ in range(2)]
        for size, count in zip(mib, rows, strict=True):
            sent = 2 * (ranks - 1) / ranks * buffers[0][:count].nbytes
            took = alone(forms, buffers[0][:count])
            record["alone"][f"{size} MiB"] = {
                name: {"milliseconds": each, "GB/s": sent / each / 1e6} for name, each in took.items()
            }
            took = alone(halves, buffers[0][:count])
            record["halves"][f"{size} MiB"] = {
                name: {"milliseconds": each, "GB/s": sent / 2 / each / 1e6} for name, each in took.items()
            }
            took = alone(between, buffers[0][:count])
            record["between"][f"{size} MiB"] = {
                name: {"milliseconds": each, "GB/s": sent / each / 1e6} for name, each in took.items()
            }
            if size not in with_products:
                continue
            products = Products(ranks, count, device, scale)
            record["beside"][f"{count} rows"] = beside(forms, [buffer[:count] for buffer in buffers], products)
    record["missing"] = {**forms.missing, **halves.missing, **between.missing}
    communicator.close()
    return record


def slowest(records: Sequence[Any]) -> Any:
    """The ranks' records in one: of each time the longest, of each rate and ratio the least."""
    first = records[0]
    if not isinstance(first, dict):
        return first
    if "milliseconds" in first:
        return max(records, key=lambda record: record["milliseconds"])
    return {key: slowest([record[key] for record in records]) for key in first}


def gpu_rank(rank: int, ranks: int, port: int, folder: str, mib: Sequence[int], with_products: Sequence[int]) -> None:
    from torch.distributed import TCPStore

    torch.cuda.set_device(rank)
    store = TCPStore("127.0.0.1", port, ranks, rank == 0, timedelta(seconds=120))
    record = measure(rank, ranks, store, torch.device("cuda", torch.cuda.current_device()), mib, with_products)
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < ranks:
        time.sleep(0.05)
    os._exit(0)  # nothing waits for the others any more


def on_gpus(ranks: int, mib: Sequence[int], with_products: Sequence[int], folder: str) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        gpu_rank, args=(ranks, port, folder, mib, with_products), nprocs=ranks, join=False
    )
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            if time.monotonic() > end:
                raise SystemExit(f"the ranks still ran after {SECONDS} s")
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def on_cpu(ranks: int, mib: Sequence[int], with_products: Sequence[int]) -> list[dict[str, Any]]:
    """Ranks in threads, joined by gloo."""
    from torch.distributed import HashStore

    store, device = HashStore(), torch.device("cpu")
    with ThreadPoolExecutor(ranks) as pool:
        each = [pool.submit(measure, rank, ranks, store, device, mib, with_products) for rank in range(ranks)]
        return [one.result() for one in each]


def main(arguments: Sequence[str] | None = None) -> None:
    import tempfile

    parser = argparse.ArgumentParser(description="Collectives between GPUs.")
    parser.add_argument("--ranks", type=int, help="GPUs; all of the machine by default, two ranks on a CPU")
    parser.add_argument("--mib", type=int, nargs="+", default=MIB, help="sizes of the buffer")
    parser.add_argument("--beside", type=int, nargs="*", help="of them, those also beside products; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--out", type=Path, default=None, help="where results are merged by size; of a trial on a CPU, nowhere"
    )
    args = parser.parse_args(arguments)
    found = torch.cuda.device_count() if args.device == "cuda" else 2
    ranks = args.ranks or found
    if ranks < 2 or (args.device == "cuda" and ranks > found):
        raise SystemExit(f"--ranks {ranks}: it takes two or more, and this machine has {found} GPUs")
    with_products = args.mib if args.beside is None else args.beside
    if args.device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            records = on_gpus(ranks, args.mib, with_products, folder)
    else:
        records = on_cpu(ranks, args.mib, with_products)
    record = {**machine(args.device), "ranks": ranks, **slowest(records)}
    for part in PARTS:
        for size, ways in record[part].items():
            print(f"{part}, {size}")
            for name, row in sorted(ways.items(), key=lambda item: item[1]["milliseconds"]):
                last = f"{row['ratio']:.3f}" if part == "beside" else f"{row['GB/s']:.1f} GB/s"
                print(f"  {name:32} {row['milliseconds']:.4f} ms  {last}")
    for reason in dict.fromkeys(record["missing"].values()):
        names = [name for name, why in record["missing"].items() if why == reason]
        print(f"left out: {', '.join(names)}: {reason}")
    out = args.out or (RESULTS if args.device == "cuda" else None)
    if out is not None:
        known = json.loads(out.read_text()) if out.exists() else {}
        for part in PARTS:
            both = {**known.get(part, {}), **record[part]}
            record[part] = dict(sorted(both.items(), key=lambda item: int(item[0].split()[0])))
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
